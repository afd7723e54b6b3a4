//! Streams: bytes already read are given back, sockets are set up, peers may be TLS or not.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use turnpike_detect::Detection;

/// A byte stream of either kind.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for T {}

/// A stream whose first bytes were read to see what they are.
#[derive(Debug)]
pub(crate) struct Rewind<T> {
    read: Bytes,
    inner: T,
}

impl<T> Rewind<T> {
    pub(crate) fn new(read: Bytes, inner: T) -> Self {
        Self { read, inner }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Rewind<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let here = self.read.len().min(buf.remaining());
        buf.put_slice(&self.read[..here]);
        self.read.advance(here);
        if self.read.is_empty() {
            // Gives the memory back for the rest of the connection.
            self.read = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

/// Of `AsyncWrite`, all but the end: goes to `inner` as it is.
macro_rules! writes_through {
    () => {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.inner).poll_write(cx, buf)
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bufs: &[io::IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
        }

        fn is_write_vectored(&self) -> bool {
            self.inner.is_write_vectored()
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_flush(cx)
        }
    };
}
pub(crate) use writes_through;

impl<T: AsyncWrite + Unpin> AsyncWrite for Rewind<T> {
    writes_through!();

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A connection to a server that may answer before it has read all of a request, and close
/// (RFC 9112 §9.5). What it takes no more is no reason not to read its answer: writing waits, and
/// reading tells how the connection ends.
#[derive(Debug)]
pub(crate) struct Answering<T> {
    inner: T,
    takes_no_more: bool,
}

impl<T> Answering<T> {
    pub(crate) fn new(inner: T) -> Self {
        Self {
            inner,
            takes_no_more: false,
        }
    }

    fn written<R>(&mut self, polled: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        match polled {
            Poll::Ready(Err(error)) if is_closed(&error) => {
                self.takes_no_more = true;
                // Whoever waits here reads too, and is woken by that.
                Poll::Pending
            }
            polled => polled,
        }
    }
}

fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset
    )
}

impl<T: AsyncRead + Unpin> AsyncRead for Answering<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Answering<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.takes_no_more {
            return Poll::Pending;
        }
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.written(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.takes_no_more {
            return Poll::Pending;
        }
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.written(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.takes_no_more {
            return Poll::Pending;
        }
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.written(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// What [`first_flight`] ended with.
#[derive(Debug)]
pub(crate) enum Flight {
    Detected(Detection),
    /// The client sent nothing at all in the time given.
    Silent,
    /// It began something and did not finish it in time.
    Slow,
    Closed,
}

/// A post-quantum ClientHello fits.
const FIRST_READ: usize = 2048;

/// Waits until there is something to read, without reading it; false at the end of the stream.
pub(crate) async fn speaks(stream: &TcpStream) -> bool {
    matches!(stream.peek(&mut [0]).await, Ok(1..))
}

/// Reads until the protocol is known. `silence` bounds the wait for a first byte, `head` the rest.
pub(crate) async fn first_flight(
    stream: &mut TcpStream,
    silence: Duration,
    head: Duration,
) -> (Bytes, Flight) {
    let mut read = BytesMut::with_capacity(FIRST_READ);
    // Not `readable()`, which may say so of a socket that was just accepted and has nothing.
    match timeout(silence, stream.read_buf(&mut read)).await {
        Err(_) => return (Bytes::new(), Flight::Silent),
        Ok(Ok(1..)) => {}
        Ok(Ok(0) | Err(_)) => return (Bytes::new(), Flight::Closed),
    }
    let detect = async {
        loop {
            match turnpike_detect::detect(&read) {
                Detection::NeedMore => {}
                decided => return Flight::Detected(decided),
            }
            read.reserve(FIRST_READ);
            if !matches!(stream.read_buf(&mut read).await, Ok(1..)) {
                return Flight::Closed;
            }
        }
    };
    let flight = timeout(head, detect).await.unwrap_or(Flight::Slow);
    (read.freeze(), flight)
}

/// Connects; `deadline` bounds it.
pub(crate) async fn connect(address: SocketAddr, deadline: Duration) -> io::Result<TcpStream> {
    let stream = timeout(deadline, TcpStream::connect(address))
        .await
        .map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer in {deadline:?}"),
            )
        })??;
    prepare(&stream);
    Ok(stream)
}

/// How long sent bytes may stay unacknowledged, and how long a silent peer is not probed: a dead
/// peer's connections end instead of hanging.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

/// Sets what every carried socket has. Failing is no reason to refuse the connection.
pub(crate) fn prepare(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10));
    let _ = socket.set_tcp_keepalive(&keepalive);
}
