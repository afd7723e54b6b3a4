//! A client's stream as the HTTP parser sees it: nothing whose framing is in doubt gets that far.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use turnpike_detect::http1::{Scanner, Violation};

/// Ends, for its reader, where the client's bytes could be read in two ways. What came before that
/// is answered as usual, and then [`Scanned::violation`] says why it ended.
#[derive(Debug)]
pub(super) struct Scanned {
    stream: TcpStream,
    /// Read before it was known to be HTTP.
    first: BytesMut,
    scanner: Scanner,
    violation: Option<Violation>,
}

impl Scanned {
    pub(super) fn new(stream: TcpStream, first: BytesMut) -> Self {
        Self {
            stream,
            first,
            scanner: Scanner::default(),
            violation: None,
        }
    }

    pub(super) fn violation(&self) -> Option<Violation> {
        self.violation
    }

    pub(super) fn into_inner(self) -> TcpStream {
        self.stream
    }

    fn scan(&mut self, buffer: &mut ReadBuf<'_>, from: usize) {
        if let Err((_, why)) = self.scanner.scan(&buffer.filled()[from..]) {
            self.violation = Some(why);
            buffer.set_filled(from);
        }
    }
}

impl AsyncRead for Scanned {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.violation.is_some() {
            return Poll::Ready(Ok(()));
        }
        let from = buffer.filled().len();
        if self.first.is_empty() {
            std::task::ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        } else {
            let length = self.first.len().min(buffer.remaining());
            buffer.put_slice(&self.first[..length]);
            self.first.advance(length);
        }
        self.scan(buffer, from);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Scanned {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }
}
