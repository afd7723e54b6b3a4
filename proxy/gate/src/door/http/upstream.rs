//! The connection to the destination under one client connection.

use std::time::Instant;

use http::{Request, Response};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use socket2::{SockRef, Socket};
use tokio::{net::TcpStream, task::JoinHandle};
use turnpike_ledger::record::{Attempt, Closed, End, RuleRef};

use crate::{
    door::{
        Door,
        dial::DialError,
        forward::{OpenError, millis, not_opened, open, record_closed},
        judge::Caller,
        tcp_info::{counts, is_closed},
    },
    state::Pod,
};

/// Recorded as opened; whoever has it must [`Upstream::close`] it.
pub(super) struct Upstream {
    id: String,
    sender: http1::SendRequest<Incoming>,
    /// hyper's half; ends with the connection.
    driver: JoinHandle<()>,
    /// The same socket, to count and to abort what hyper holds.
    socket: Socket,
    on_record: (Option<String>, Option<RuleRef>),
    opened: Instant,
    requests: u64,
    failed: Option<String>,
}

type Connection = http1::Connection<TokioIo<TcpStream>, Incoming>;

async fn begin(
    stream: TcpStream,
) -> std::io::Result<(Socket, http1::SendRequest<Incoming>, Connection)> {
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
    pub(super) async fn open(
        door: &Door,
        caller: &Caller,
        pod: &Pod,
        mut attempt: Attempt,
    ) -> Result<Self, OpenError> {
        attempt.connection = door.spool.connection_id();
        let opened = Instant::now();
        let stream = match open(door, caller, attempt.clone()).await {
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
            id: attempt.connection.clone(),
            sender,
            driver,
            socket,
            on_record: (attempt.claimed, attempt.rule),
            opened,
            requests: 0,
            failed: None,
        })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
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
        request: Request<Incoming>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let sending = async {
            self.sender.ready().await?;
            self.requests += 1;
            self.sender.send_request(request).await
        };
        sending
            .await
            .inspect_err(|error| self.failed = Some(error.to_string()))
    }

    /// Ends the connection and records it.
    pub(super) async fn close(self, door: &Door, mut end: End, mut reason: Option<String>) {
        let Self {
            id,
            sender,
            mut driver,
            socket,
            opened,
            requests,
            failed,
            ..
        } = self;
        if end == End::Finished && failed.is_some() {
            (end, reason) = (End::Broken, failed);
        }
        drop(sender);
        let abort = matches!(end, End::Revoked | End::GateStopped | End::Broken);
        if abort
            || tokio::time::timeout(super::CLOSE, &mut driver)
                .await
                .is_err()
        {
            let _ = socket.set_linger(Some(std::time::Duration::ZERO));
            driver.abort();
        }
        let ended = end == End::Finished && is_closed(&socket);
        let counted = counts(&socket, ended).unwrap_or_default();
        drop(socket);
        door.metrics.open_connections.dec();
        let closed = Closed {
            connection: id,
            bytes_out: counted.sent,
            bytes_in: counted.received,
            duration_ms: millis(opened),
            end,
            reason,
            requests,
        };
        record_closed(door, closed).await;
    }
}
