//! What stands between a client's bytes and the HTTP/1 parser: ambiguous framing never reaches it.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use turnpike_detect::http1::{Scanner, Violation};

use crate::{clock::Clock, io::writes_through};

/// What is known of a connection from the bytes that came in.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    /// When the client began a request head that it has not ended; 0: it has.
    head_since: AtomicU64,
    violation: OnceLock<Violation>,
}

impl Watched {
    /// How long the client has been at a request head, in milliseconds.
    pub(crate) fn in_head_for(&self, now_ms: u64) -> Option<u64> {
        match self.head_since.load(Relaxed) {
            0 => None,
            since => Some(now_ms.saturating_sub(since)),
        }
    }

    pub(crate) fn violation(&self) -> Option<Violation> {
        self.violation.get().copied()
    }
}

/// A client's stream under a [`Scanner`]. On a violation the parser is given a byte that it must
/// refuse, so that it answers 400 and closes, and nothing after it.
#[derive(Debug)]
pub(crate) struct Guarded<T> {
    inner: T,
    scanner: Scanner,
    watched: Arc<Watched>,
    clock: Clock,
    /// Set once nothing more is written.
    linger: Option<Pin<Box<Sleep>>>,
}

impl<T> Guarded<T> {
    pub(crate) fn new(inner: T, watched: Arc<Watched>, clock: Clock) -> Self {
        Self {
            inner,
            scanner: Scanner::default(),
            watched,
            clock,
            linger: None,
        }
    }

    fn inspect(&mut self, bytes: &mut [u8]) {
        if let Err((at, violation)) = self.scanner.scan(bytes) {
            // NUL is refused in every line that the scanner reads.
            bytes[at] = 0;
            let _ = self.watched.violation.set(violation);
        }
        let was = self.watched.head_since.load(Relaxed);
        match (self.scanner.in_head(), was) {
            (true, 0) => self
                .watched
                .head_since
                .store(self.clock.now_ms().max(1), Relaxed),
            (false, 1..) => self.watched.head_since.store(0, Relaxed),
            _ => {}
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Guarded<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.watched.violation.get().is_some() {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        self.inspect(&mut buf.filled_mut()[before..]);
        Poll::Ready(Ok(()))
    }
}

/// How long what a client still sends is read after the last answer.
const LINGER: Duration = Duration::from_secs(5);

impl<T: AsyncRead + AsyncWrite + Unpin> Guarded<T> {
    /// Reads and forgets until the client closes too. With its bytes unread the kernel would reset
    /// the connection, and the client might lose the answer (RFC 9112 §9.6).
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let end = self.linger.get_or_insert_with(|| Box::pin(sleep(LINGER)));
        if end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let mut forgotten = [0; 8 * 1024];
        // Not without end: a fast client must not hold the worker up.
        for _ in 0..16 {
            let mut buf = ReadBuf::new(&mut forgotten);
            let read = ready!(Pin::new(&mut self.inner).poll_read(cx, &mut buf));
            if read.is_err() || buf.filled().is_empty() {
                return Poll::Ready(());
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guarded<T> {
    writes_through!();

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.linger.is_none() {
            ready!(Pin::new(&mut self.inner).poll_shutdown(cx))?;
        }
        if self.scanner.in_body() || self.watched.violation.get().is_some() {
            ready!(self.poll_linger(cx));
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        time::timeout,
    };

    use super::*;

    fn guarded<T>(stream: T) -> Guarded<T> {
        Guarded::new(stream, Arc::default(), Clock::start())
    }

    #[tokio::test]
    async fn what_a_client_still_sends_is_read_when_nothing_more_is_written() {
        let (mut client, server) = duplex(128);
        let mut server = guarded(server);
        let head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n";
        client.write_all(head).await.unwrap();
        server.read_exact(&mut [0; 8]).await.unwrap();
        server.read_buf(&mut Vec::with_capacity(100)).await.unwrap();
        let shutting = tokio::spawn(async move { server.shutdown().await });
        let rest = vec![b'x'; 4000];
        let sent = timeout(LINGER / 2, client.write_all(&rest)).await;
        sent.expect("it is not read").unwrap();
        assert!(!shutting.is_finished());
        drop(client);
        shutting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_never_closes_is_not_waited_for_for_good() {
        let (mut client, server) = duplex(1024);
        let mut server = guarded(server);
        let head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n";
        client.write_all(head).await.unwrap();
        server.read_buf(&mut Vec::with_capacity(100)).await.unwrap();
        timeout(2 * LINGER, server.shutdown())
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn between_requests_nobody_is_waited_for() {
        let (mut client, server) = duplex(1024);
        let mut server = guarded(server);
        client
            .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            .await
            .unwrap();
        server.read_buf(&mut Vec::with_capacity(100)).await.unwrap();
        timeout(LINGER / 2, server.shutdown())
            .await
            .unwrap()
            .unwrap();
    }
}
