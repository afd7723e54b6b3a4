//! Bytes in both directions, with nothing held back and no buffer held while nothing moves.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
};

use crate::{
    http::exchange::Connection,
    observe::{AccessRecord, Flags, TcpSeries},
    worker::Worker,
};

/// What has moved so far.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// From the client.
    pub(crate) received: Cell<u64>,
    /// To the client.
    pub(crate) sent: Cell<u64>,
}

/// Which side ended a connection by an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// Read at once; shared by all connections of a worker.
const SCRATCH: usize = 64 * 1024;

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into_boxed_slice());
}

/// Copies until both sides have ended, each end passed on as it comes. `server_first` is told of the
/// first bytes.
pub(crate) async fn relay<A, B>(
    client: &mut A,
    server: &mut B,
    counts: &Counts,
    mut server_first: Option<Learn>,
) -> Result<(), (Side, io::Error)>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut up, mut down) = (Half::default(), Half::default());
    poll_fn(|cx| {
        let sent_up = up.poll(cx, client, server, &counts.received);
        let sent_up = sent_up
            .map_err(|(read, error)| (if read { Side::Client } else { Side::Server }, error))?;
        let sent_down = down.poll(cx, server, client, &counts.sent);
        let sent_down = sent_down
            .map_err(|(read, error)| (if read { Side::Server } else { Side::Client }, error))?;
        let (received, sent) = (counts.received.get(), counts.sent.get());
        if received + sent > 0
            && let Some(server_first) = server_first.take()
        {
            server_first(received == 0);
        }
        if sent_up.is_ready() && sent_down.is_ready() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    })
    .await
}

/// One direction.
#[derive(Default)]
struct Half {
    /// What the writer did not take; rarely anything.
    left: Vec<u8>,
    written: usize,
    unflushed: bool,
    ended: bool,
    closed: bool,
}

impl Half {
    /// The error says whether reading failed (else writing).
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        moved: &Cell<u64>,
    ) -> Poll<Result<(), (bool, io::Error)>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            if self.closed {
                return Poll::Ready(Ok(()));
            }
            ready!(self.write_left(cx, writer)).map_err(|error| (false, error))?;
            if self.ended {
                ready!(Pin::new(&mut *writer).poll_shutdown(cx)).map_err(|error| (false, error))?;
                self.closed = true;
                continue;
            }
            match self.transfer(cx, reader, writer, moved) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    if self.unflushed {
                        ready!(Pin::new(&mut *writer).poll_flush(cx))
                            .map_err(|error| (false, error))?;
                        self.unflushed = false;
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    fn write_left<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Poll<io::Result<()>> {
        while self.written < self.left.len() {
            let part = &self.left[self.written..];
            let count = ready!(Pin::new(&mut *writer).poll_write(cx, part))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count;
        }
        if !self.left.is_empty() {
            // Given back rather than kept: most connections never need it again.
            (self.left, self.written) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once into the shared buffer and writes what the writer takes of it.
    fn transfer<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        moved: &Cell<u64>,
    ) -> Poll<Result<(), (bool, io::Error)>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        BUFFER.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            ready!(Pin::new(reader).poll_read(cx, &mut read)).map_err(|error| (true, error))?;
            let bytes = read.filled();
            if bytes.is_empty() {
                self.ended = true;
                return Poll::Ready(Ok(()));
            }
            moved.set(moved.get() + bytes.len() as u64);
            self.unflushed = true;
            let written = match Pin::new(writer).poll_write(cx, bytes) {
                Poll::Ready(Ok(count)) => count,
                Poll::Ready(Err(error)) => return Poll::Ready(Err((false, error))),
                Poll::Pending => 0,
            };
            self.left.extend_from_slice(&bytes[written..]);
            Poll::Ready(Ok(()))
        })
    }
}

/// How an opaque connection is carried and reported.
pub(crate) struct Carried {
    pub(crate) connection: Rc<Connection>,
    pub(crate) series: std::sync::Arc<dyn TcpSeries>,
    pub(crate) idle: Option<Duration>,
    pub(crate) upstream: std::net::SocketAddr,
    pub(crate) service: Option<turnpike_rules::ServiceKey>,
    pub(crate) callee: Option<turnpike_rules::Identity>,
    /// Whether it may go on; asked at every sweep.
    pub(crate) still_allowed: Option<Box<dyn FnMut() -> bool>>,
    /// Told whether the server spoke first, where that is yet to be seen.
    pub(crate) server_first: Option<Learn>,
}

pub(crate) type Learn = Box<dyn FnOnce(bool)>;

/// How often bytes of a long connection are reported, in milliseconds.
const REPORT: u64 = 5_000;

impl Carried {
    /// Relays to the end, and reports it.
    pub(crate) async fn run<A, B>(mut self, worker: &Rc<Worker>, client: &mut A, server: &mut B)
    where
        A: AsyncRead + AsyncWrite + Unpin,
        B: AsyncRead + AsyncWrite + Unpin,
    {
        let begun = worker.now();
        self.series.opened();
        let state = Rc::new(State::default());
        self.watch(worker, &state);
        let server_first = self.server_first.take();
        let flags = tokio::select! {
            biased;
            relayed = relay(client, server, &state.counts, server_first) => match relayed {
                Ok(()) => Flags::NONE,
                Err((Side::Client, _)) => Flags::CLIENT_GONE,
                Err((Side::Server, _)) => Flags::UPSTREAM_CLOSED,
            },
            () = state.end.notified() => state.why.get(),
        };
        let (received, sent) = (state.counts.received.get(), state.counts.sent.get());
        let reported = state.reported.get();
        self.series
            .transferred(received - reported.0, sent - reported.1);
        self.series.closed(flags);
        let connection = &self.connection;
        if connection.observer.logs() {
            connection.observer.log(&AccessRecord {
                direction: connection.direction,
                http: None,
                flags,
                details: None,
                duration: worker.now().saturating_duration_since(begun),
                received,
                sent,
                downstream: connection.downstream,
                original: connection.original,
                upstream: Some(self.upstream),
                peer: connection.peer.as_ref().or(self.callee.as_ref()),
                service: self.service.as_ref(),
                route: None,
                attempts: 1,
                sni: connection.sni.as_deref(),
            });
        }
    }

    /// Looks at every sweep whether the connection is idle or not allowed any more, and reports
    /// what it has moved.
    fn watch(&mut self, worker: &Worker, state: &Rc<State>) {
        let watched = Rc::downgrade(state);
        let series = self.series.clone();
        let idle = self
            .idle
            .map(|idle| u64::try_from(idle.as_millis()).unwrap_or(u64::MAX));
        let mut still_allowed = self.still_allowed.take();
        let (mut last, mut moved_at, mut reported_at) = ((0, 0), None, None);
        worker.watch(move |now_ms| {
            let Some(state) = watched.upgrade() else {
                return false;
            };
            let now = (state.counts.received.get(), state.counts.sent.get());
            if now != last || moved_at.is_none() {
                (last, moved_at) = (now, Some(now_ms));
            }
            let silent = now_ms.saturating_sub(moved_at.unwrap_or(now_ms));
            if still_allowed.as_mut().is_some_and(|allowed| !allowed()) {
                state.stop(Flags::UNAUTHORIZED);
                return false;
            }
            if idle.is_some_and(|idle| silent > idle) {
                state.stop(Flags::IDLE);
                return false;
            }
            if now_ms.saturating_sub(*reported_at.get_or_insert(now_ms)) >= REPORT {
                let before = state.reported.replace(now);
                series.transferred(now.0 - before.0, now.1 - before.1);
                reported_at = Some(now_ms);
            }
            true
        });
    }
}

/// What a carried connection shares with the sweep.
#[derive(Default)]
struct State {
    counts: Counts,
    reported: Cell<(u64, u64)>,
    end: Notify,
    why: Cell<Flags>,
}

impl State {
    fn stop(&self, why: Flags) {
        self.why.set(why);
        self.end.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn large_transfers_through_small_buffers_arrive_whole() {
        let (mut client, mut near) = duplex(100);
        let (mut far, mut server) = duplex(7);
        let data: Vec<u8> = (0..200_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let counts = Counts::default();
        let expected = data.clone();
        let (relayed, ..) = tokio::join!(
            relay(&mut near, &mut far, &counts, None),
            async {
                client.write_all(&data).await.unwrap();
                client.shutdown().await.unwrap();
                let mut answer = Vec::new();
                client.read_to_end(&mut answer).await.unwrap();
                assert_eq!(answer, b"done");
            },
            async {
                let mut got = Vec::new();
                server.read_to_end(&mut got).await.unwrap();
                assert_eq!(got, expected);
                server.write_all(b"done").await.unwrap();
                server.shutdown().await.unwrap();
            }
        );
        relayed.unwrap();
        assert_eq!((counts.received.get(), counts.sent.get()), (200_000, 4));
    }
}
