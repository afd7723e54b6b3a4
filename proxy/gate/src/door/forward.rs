//! An allowed connection whose bytes are not read: recorded, dialled, relayed, cut.

use std::{sync::Arc, time::Instant};

use bytes::BytesMut;
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::watch};
use tokio_util::sync::CancellationToken;
use turnpike_ledger::{
    Event,
    record::{Attempt, Closed, End, Verdict},
};
use turnpike_rules::pod::PodEgress;

use super::{
    Door,
    accept::{Client, abort},
    dial::{DialError, dial},
    judge::{Caller, Claim, grounds, judge, refuse},
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
    /// By what the claim was last allowed here.
    allowed_by: Option<Arc<PodEgress>>,
}

impl Revocation {
    /// Made before the verdict it guards, so that no change falls between the two.
    pub(super) fn guard(state: &State) -> Self {
        Self {
            state: state.clone(),
            changes: state.changes(),
            allowed_by: None,
        }
    }

    pub(super) fn view(&self) -> Arc<View> {
        self.state.view()
    }

    /// Waits for the next change; false when there will be none.
    pub(super) async fn changed(&mut self) -> bool {
        self.changes.changed().await.is_ok()
    }

    /// Why the claim is denied by now. Most changes are other pods': they do not have it judged. A
    /// claim that took the place of another was judged when it came, by rules no older than these.
    pub(super) fn denied(&mut self, caller: &Caller, claim: &Claim) -> Option<String> {
        let view = self.state.view();
        let grounds = grounds(&view, caller);
        if self.stands_on(grounds.as_ref()) {
            return None;
        }
        let verdict = judge(&view, caller, claim);
        if verdict.verdict == Verdict::Denied {
            return Some(verdict.reason.unwrap_or_default());
        }
        self.allowed_by = grounds;
        None
    }

    /// Whether the last verdict was by these very rules.
    fn stands_on(&self, grounds: Option<&Arc<PodEgress>>) -> bool {
        let before = self.allowed_by.as_ref();
        matches!((grounds, before), (Some(now), Some(before)) if Arc::ptr_eq(now, before))
    }

    /// Waits for a change by which the claim is denied, and returns why.
    pub(super) async fn revoked(&mut self, caller: &Caller, claim: &Claim) -> String {
        loop {
            if let Some(why) = self.denied(caller, claim) {
                return why;
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

#[cfg(test)]
mod tests {
    use turnpike_rules::{
        egress::{EgressProtocol, Mode},
        pod::Members,
    };

    use super::{
        super::judge::tests::{HOST, caller, rule, sni, state},
        *,
    };
    use crate::state::{Change, PodInfo};

    fn members(address: &str) -> Change {
        let members = Members {
            name: "cluster/node-b".into(),
            addresses: vec![address.parse().unwrap()],
            services: vec![],
        };
        Change::Members {
            added: vec![("cluster/node-b".into(), members)],
            removed: vec![],
        }
    }

    fn policies(added: Vec<PodEgress>) -> Change {
        Change::Policies {
            added,
            removed: vec![],
        }
    }

    #[test]
    fn a_change_that_is_not_the_callers_does_not_have_it_judged() {
        let (owner, state) = state(Mode::Enforce, rule(EgressProtocol::Tls, 443, false));
        let (caller, claim) = (caller("203.0.113.66:443", HOST), sni(HOST));
        let own = grounds(&state.view(), &caller).unwrap();
        let other = PodEgress {
            uid: "u2".into(),
            name: "pay-1".into(),
            ..(*own).clone()
        };
        let mut revocation = Revocation::guard(&state);
        let stands = |revocation: &Revocation| {
            revocation.stands_on(grounds(&state.view(), &caller).as_ref())
        };
        assert!(!stands(&revocation), "not judged yet");
        assert_eq!(revocation.denied(&caller, &claim), None);
        assert!(stands(&revocation));

        owner.apply(Change::PodAdded(PodInfo {
            uid: "u2".into(),
            container_id: "c2".into(),
            addresses: vec!["10.0.1.6".parse().unwrap()],
            ..PodInfo::default()
        }));
        owner.apply(members("10.0.2.5"));
        assert!(
            stands(&revocation),
            "another pod, on this node and elsewhere"
        );
        owner.apply(policies(vec![other]));
        assert!(stands(&revocation), "another pod's policy");
        owner.apply(policies(vec![(*own).clone()]));
        assert!(!stands(&revocation), "its own");
        assert_eq!(revocation.denied(&caller, &claim), None);
        assert!(stands(&revocation), "judged by it");
        owner.apply(members("203.0.113.66"));
        let why = revocation.denied(&caller, &claim).unwrap();
        assert!(why.contains("address of the cluster"), "{why}");
    }
}
