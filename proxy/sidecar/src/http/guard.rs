//! What stands between a client's bytes and the HTTP/1 parser: ambiguous framing never reaches it.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turnpike_detect::http1::{Scanner, Violation};

use crate::clock::Clock;

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
}

impl<T> Guarded<T> {
    pub(crate) fn new(inner: T, watched: Arc<Watched>, clock: Clock) -> Self {
        Self {
            inner,
            scanner: Scanner::default(),
            watched,
            clock,
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

impl<T: AsyncWrite + Unpin> AsyncWrite for Guarded<T> {
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

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
