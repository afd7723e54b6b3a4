//! The connection to the destination under one client connection.

use std::{sync::Arc, time::Instant};

use http::{Request, Response};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use socket2::{SockRef, Socket};
use tokio::{net::TcpStream, sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use turnpike_ledger::record::{Attempt, Closed, End, RuleRef};

use super::Body;
use crate::{
    door::{
        Door,
        dial::DialError,
        forward::{OpenError, millis, not_opened, open, record_closed},
        judge::Caller,
        relay::drained,
        tcp_info::{counts, is_closed},
    },
    state::Pod,
};

/// Recorded as opened; whoever has it must [`Upstream::finish`] or [`Upstream::close`] it.
pub(super) struct Upstream {
    sender: http1::SendRequest<Body>,
    on_record: (Option<String>, Option<RuleRef>),
    link: Link,
}

/// What is left when the last request was sent.
struct Link {
    id: String,
    /// hyper's half; ends with the connection.
    driver: JoinHandle<()>,
    /// The same socket, to count and to abort what hyper holds.
    socket: Socket,
    opened: Instant,
    requests: u64,
    failed: Option<String>,
}

/// Why a request has no answer.
pub(super) enum Unanswered {
    /// Nothing of it has left; it is given back.
    Unsent(Box<Request<Body>>, hyper::Error),
    Sent(hyper::Error),
}

type Connection = http1::Connection<TokioIo<TcpStream>, Body>;

async fn begin(
    stream: TcpStream,
) -> std::io::Result<(Socket, http1::SendRequest<Body>, Connection)> {
    // Fails where no descriptor is left.
    let socket = SockRef::from(&stream).try_clone()?;
    let (sender, connection) = http1::Builder::new()
        .preserve_header_case(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(std::io::Error::other)?;
    Ok((socket, sender, connection))
}

impl Upstream {
    /// Opens in a task of its own: if whoever waits for it is cut, it still ends on record.
    pub(super) async fn open(
        door: &Arc<Door>,
        caller: &Caller,
        pod: &Arc<Pod>,
        attempt: Attempt,
    ) -> Result<Self, OpenError> {
        const CUT: &str = "the request was cut before the connection came about";
        let (mut sender, receiver) = oneshot::channel();
        let (owned, caller, pod) = (door.clone(), caller.clone(), pod.clone());
        door.tasks.spawn(async move {
            let cut = async {
                sender.closed().await;
                CUT.to_owned()
            };
            let opened = Self::open_here(&owned, &caller, &pod, attempt, cut).await;
            if let Err(Ok(unwanted)) = sender.send(opened) {
                unwanted.close(&owned, End::Broken, Some(CUT.into())).await;
            }
        });
        let ended = || Err(DialError::GivenUp(CUT.into()).into());
        receiver.await.unwrap_or_else(|_| ended())
    }

    async fn open_here(
        door: &Door,
        caller: &Caller,
        pod: &Pod,
        mut attempt: Attempt,
        cut: impl Future<Output = String>,
    ) -> Result<Self, OpenError> {
        attempt.connection = door.spool.connection_id();
        let opened = Instant::now();
        let stream = match open(door, caller, attempt.clone(), cut).await {
            Ok(stream) => stream,
            Err(error) => {
                not_opened(door, pod, attempt, &error, opened).await;
                return Err(error);
            }
        };
        door.count(&attempt);
        door.metrics.open_connections.inc();
        let (socket, sender, connection) = match begin(stream).await {
            Ok(begun) => begun,
            Err(error) => {
                // It is on record as opened.
                door.metrics.open_connections.dec();
                let closed = Closed {
                    connection: attempt.connection,
                    bytes_out: 0,
                    bytes_in: 0,
                    duration_ms: millis(opened),
                    end: End::Broken,
                    reason: Some(error.to_string()),
                    requests: 0,
                };
                record_closed(door, closed).await;
                return Err(DialError::Io(error).into());
            }
        };
        let driver = tokio::spawn(async move {
            // What went wrong, the request that waits for an answer is told.
            let _ = connection.await;
        });
        Ok(Self {
            sender,
            on_record: (attempt.claimed, attempt.rule),
            link: Link {
                id: attempt.connection,
                driver,
                socket,
                opened,
                requests: 0,
                failed: None,
            },
        })
    }

    pub(super) fn id(&self) -> &str {
        &self.link.id
    }

    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Whether what is on record says what this verdict says.
    pub(super) fn covers(&self, verdict: &Attempt) -> bool {
        self.on_record.0 == verdict.claimed && self.on_record.1 == verdict.rule
    }

    pub(super) fn cover(&mut self, verdict: &Attempt) {
        self.on_record = (verdict.claimed.clone(), verdict.rule.clone());
    }

    pub(super) async fn send(
        &mut self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, Unanswered> {
        if let Err(error) = self.sender.ready().await {
            return Err(Unanswered::Unsent(Box::new(request), error));
        }
        let sent = self.sender.try_send_request(request).await;
        let unanswered = sent.map_err(|mut error| match error.take_message() {
            Some(request) => Unanswered::Unsent(Box::new(request), error.into_error()),
            None => Unanswered::Sent(error.into_error()),
        });
        if let Err(Unanswered::Sent(error)) = &unanswered {
            self.link.failed = Some(error.to_string());
        }
        self.link.requests += u64::from(!matches!(unanswered, Err(Unanswered::Unsent(..))));
        unanswered
    }

    /// Ends the connection when the destination has all of it, and records that. Until then its
    /// last bytes are held to the policy like the first.
    pub(super) async fn finish(
        self,
        door: &Door,
        revoked: impl Future<Output = String>,
        stop: &CancellationToken,
    ) {
        let Self {
            sender, mut link, ..
        } = self;
        drop(sender);
        let (end, reason) = tokio::select! {
            biased;
            reason = revoked => (End::Revoked, Some(reason)),
            drained = link.drained() => match drained {
                Ok(()) => (End::Finished, None),
                Err(error) => (End::Broken, Some(error.to_string())),
            },
            () = stop.cancelled() => (End::GateStopped, None),
        };
        link.close(door, end, reason).await;
    }

    /// Ends the connection at once and records it.
    pub(super) async fn close(self, door: &Door, end: End, reason: Option<String>) {
        self.link.close(door, end, reason).await;
    }
}

impl Link {
    async fn drained(&mut self) -> std::io::Result<()> {
        let ended = tokio::time::timeout(super::CLOSE, &mut self.driver).await;
        // Before hyper's half goes: the kernel's queue is empty only when it has nothing to add.
        let drained = drained(&self.socket).await;
        if ended.is_err() {
            self.driver.abort();
        }
        drained
    }

    fn abort(&self) {
        // Nothing to do where the socket is gone.
        let _ = self.socket.set_linger(Some(std::time::Duration::ZERO));
        self.driver.abort();
    }

    async fn close(self, door: &Door, mut end: End, mut reason: Option<String>) {
        if end != End::Finished {
            self.abort();
        } else if self.failed.is_some() {
            (end, reason) = (End::Broken, self.failed);
        }
        let ended = end == End::Finished && is_closed(&self.socket);
        let counted = counts(&self.socket, ended).unwrap_or_default();
        drop(self.socket);
        door.metrics.open_connections.dec();
        if end == End::Revoked {
            door.metrics.revoked.inc();
        }
        let closed = Closed {
            connection: self.id,
            bytes_out: counted.sent,
            bytes_in: counted.received,
            duration_ms: millis(self.opened),
            end,
            reason,
            requests: self.requests,
        };
        record_closed(door, closed).await;
    }
}
