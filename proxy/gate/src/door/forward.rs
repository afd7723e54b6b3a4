//! An allowed connection whose bytes are not read: recorded, dialled, relayed, cut.

use std::time::Instant;

use bytes::BytesMut;
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::watch};
use tokio_util::sync::CancellationToken;
use turnpike_ledger::{
    Event,
    record::{Attempt, Closed, End, Verdict},
};

use super::{
    Door,
    accept::{Client, abort},
    dial::{DialError, dial},
    judge::{Caller, Claim, judge, refuse},
    relay::{Ended, drained, relay},
    tcp_info::counts,
};
use crate::{
    spool::NotRecorded,
    state::{State, View},
};

/// Why a connection did not come about.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error("nothing leaves unrecorded: {0}")]
    NotRecorded(#[from] NotRecorded),
    #[error("the destination cannot be reached: {0}")]
    Dial(#[from] DialError),
}

/// Tells when a verdict no longer holds.
pub(super) struct Revocation {
    state: State,
    changes: watch::Receiver<u64>,
}

impl Revocation {
    /// Made before the verdict it guards, so that no change falls between the two.
    pub(super) fn guard(state: &State) -> Self {
        Self {
            state: state.clone(),
            changes: state.changes(),
        }
    }

    pub(super) fn view(&self) -> std::sync::Arc<View> {
        self.state.view()
    }

    /// Waits for the next change; false when there will be none.
    pub(super) async fn changed(&mut self) -> bool {
        self.changes.changed().await.is_ok()
    }

    /// Waits for a change by which the claim is denied, and returns why.
    pub(super) async fn revoked(&mut self, caller: &Caller, claim: &Claim) -> String {
        loop {
            let verdict = judge(&self.state.view(), caller, claim);
            if verdict.verdict == Verdict::Denied {
                return verdict.reason.unwrap_or_default();
            }
            if !self.changed().await {
                return "the gate stops".into();
            }
        }
    }
}

/// Relays an allowed connection to its end and records it. Judges once more with the guard in
/// place.
pub(super) async fn forward(client: Client<'_>, claim: Claim, first: BytesMut) {
    let Client {
        door,
        stream,
        caller,
        pod,
        stop,
    } = client;
    let mut revocation = Revocation::guard(&door.state);
    let mut attempt = judge(&revocation.view(), &caller, &claim);
    attempt.connection = door.spool.connection_id();
    let connection = attempt.connection.clone();
    if attempt.verdict == Verdict::Denied {
        abort(&stream);
        return door.record_denial(Some(&pod), attempt).await;
    }
    let opened = Instant::now();
    let revoked = revocation.revoked(&caller, &claim);
    let upstream = match open(door, &caller, attempt.clone(), revoked).await {
        Ok(upstream) => upstream,
        Err(error) => {
            abort(&stream);
            drop(stream);
            return not_opened(door, &pod, attempt, &error, opened).await;
        }
    };
    door.count(&attempt);
    door.metrics.open_connections.inc();
    let mut relaying = Relaying {
        client: stream,
        upstream,
        ended: Ended::default(),
    };
    let (end, reason) = relaying
        .run(first, &stop, revocation.revoked(&caller, &claim))
        .await;
    let counted = counts(&relaying.upstream, relaying.ended.upstream).unwrap_or_default();
    drop(relaying);
    door.metrics.open_connections.dec();
    if end == End::Revoked {
        door.metrics.revoked.inc();
        tracing::info!(connection, reason, "a connection was cut");
    }
    let closed = Closed {
        connection,
        bytes_out: counted.sent,
        bytes_in: counted.received,
        duration_ms: millis(opened),
        end,
        reason,
        requests: 0,
    };
    record_closed(door, closed).await;
}

struct Relaying {
    client: TcpStream,
    upstream: TcpStream,
    ended: Ended,
}

impl Relaying {
    async fn run(
        &mut self,
        first: BytesMut,
        stop: &CancellationToken,
        revoked: impl Future<Output = String>,
    ) -> (End, Option<String>) {
        let Self {
            client,
            upstream,
            ended,
        } = self;
        let relaying = async {
            upstream.write_all(&first).await?;
            drop(first);
            relay(client, upstream, ended).await?;
            drained(upstream).await
        };
        let result = tokio::select! {
            biased;
            reason = revoked => (End::Revoked, Some(reason)),
            result = relaying => match result {
                Ok(()) => (End::Finished, None),
                Err(error) => (End::Broken, Some(error.to_string())),
            },
            () = stop.cancelled() => (End::GateStopped, None),
        };
        if result.0 != End::Finished {
            abort(&self.client);
            abort(&self.upstream);
        }
        result
    }
}

/// Records the attempt as opened and dials at the same time, until `given_up`, which says why. The
/// connection may be used when this returns it: then the record is on disk.
pub(super) async fn open(
    door: &Door,
    caller: &Caller,
    attempt: Attempt,
    given_up: impl Future<Output = String>,
) -> Result<TcpStream, OpenError> {
    let recording = door.spool.record(Event::Opened(attempt));
    let dialling = async {
        tokio::select! {
            biased;
            why = given_up => Err(DialError::GivenUp(why)),
            dialled = dial(caller.source, caller.destination, door.config.dial) => dialled,
        }
    };
    let (recorded, dialled) = tokio::join!(recording, dialling);
    if let Err(error) = recorded {
        if let Ok(stream) = &dialled {
            abort(stream);
        }
        return Err(error.into());
    }
    Ok(dialled?)
}

/// Puts on record why an allowed connection did not open.
pub(super) async fn not_opened(
    door: &Door,
    pod: &crate::state::Pod,
    attempt: Attempt,
    error: &OpenError,
    since: Instant,
) {
    match error {
        OpenError::NotRecorded(_) => {
            tracing::warn!(%error, "egress denied");
            door.record_denial(Some(pod), refuse(attempt, error.to_string()))
                .await;
        }
        OpenError::Dial(_) => {
            door.count(&attempt);
            let closed = Closed {
                connection: attempt.connection,
                bytes_out: 0,
                bytes_in: 0,
                duration_ms: millis(since),
                end: End::NotConnected,
                reason: Some(error.to_string()),
                requests: 0,
            };
            record_closed(door, closed).await;
        }
    }
}

pub(super) async fn record_closed(door: &Door, closed: Closed) {
    door.metrics.bytes_out.inc_by(closed.bytes_out);
    door.metrics.bytes_in.inc_by(closed.bytes_in);
    let connection = closed.connection.clone();
    if let Err(error) = door.spool.record_end(Event::Closed(closed)).await {
        tracing::error!(%error, connection, "the end of a connection was not recorded");
    }
}

pub(super) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
