//! What became of each policy and route, written on it for whoever runs `kubectl get`.
//!
//! 1. [`judge`] joins what the source refused, what the model found and what proxies have
//!    acknowledged into a verdict on each object's generation.
//! 2. Where the object does not say so already, and the verdict lasts, it is written. Nothing is
//!    looked at while nothing changes, and a verdict that proxies are about to make obsolete, such
//!    as while they come back to a controller that was restarted, is not written at all.

mod judge;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use kube::Client;
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::{MissedTickBehavior, interval, sleep};
use turnpike_api::ObjectKey;
use turnpike_discovery::{Counters, Discovery};
use turnpike_kubernetes::{
    Impairment, Impairments,
    cluster::{PolicyObject, PolicyStore},
    status::{Verdict, write},
};

pub(crate) use judge::{Applied, judge};

/// Between looks at whether anything has changed.
const INTERVAL: Duration = Duration::from_millis(250);
/// Looking takes at most a tenth of a CPU, however many policies there are.
const SHARE: u32 = 10;
/// Between two writes of one verdict: the first failed, or somebody undid it.
const RETRY: Duration = Duration::from_secs(5);
/// Writes at once.
const WRITERS: usize = 8;
const WHAT: &str = "statuses of policies and routes";

/// Writes statuses for as long as it is polled.
pub(crate) struct StatusWriter {
    pub(crate) client: Client,
    pub(crate) policies: PolicyStore,
    pub(crate) discovery: Discovery,
    pub(crate) applied: Applied,
    pub(crate) impairments: Impairments,
}

impl std::fmt::Debug for StatusWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StatusWriter").finish_non_exhaustive()
    }
}

/// What verdicts depend on; while it is the same, they are.
type Fingerprint = (u64, Counters, usize);

/// Verdicts that are not on their objects yet.
#[derive(Default)]
struct Waiting(HashMap<ObjectKey, Wait>);

struct Wait {
    verdict: Verdict,
    since: Instant,
    /// After a failure, and after a write that did not last.
    not_before: Option<Instant>,
    /// The version of the object that it was written for last.
    written: Option<String>,
}

struct Due {
    key: ObjectKey,
    object: std::sync::Arc<PolicyObject>,
    status: Value,
}

impl StatusWriter {
    pub(crate) async fn run(self) {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut changes = self.policies.changes();
        let mut seen: Option<Fingerprint> = None;
        let mut waiting = Waiting::default();
        let start = Instant::now();
        loop {
            ticks.tick().await;
            let fingerprint = (
                self.applied.version(),
                self.discovery.counters(),
                self.discovery.subscribers(),
            );
            let stored = changes.has_changed().unwrap_or(false);
            if seen.as_ref() == Some(&fingerprint) && !stored && waiting.0.is_empty() {
                continue;
            }
            changes.mark_unchanged();
            seen = Some(fingerprint);
            let begin = Instant::now();
            let due = self.look(&mut waiting, start, begin);
            let spent = begin.elapsed();
            self.write(due, &mut waiting).await;
            sleep(spent * SHARE).await;
        }
    }

    /// The statuses that are to be written now.
    fn look(&self, waiting: &mut Waiting, start: Instant, now: Instant) -> Vec<Due> {
        let verdicts = judge(&self.policies, &self.discovery, &self.applied);
        let time = OffsetDateTime::now_utc();
        let time = time.replace_nanosecond(0).unwrap_or(time);
        let time = time.format(&Rfc3339).unwrap_or_default();
        let mut due = Vec::new();
        let mut open = HashMap::new();
        for (key, object, verdict) in verdicts {
            let Some(status) = verdict.status(&object, &time) else {
                continue;
            };
            let mut wait = match waiting.0.remove(&key) {
                Some(wait) if wait.verdict == verdict => wait,
                before => Wait {
                    since: now,
                    not_before: None,
                    written: before.and_then(|before| before.written),
                    verdict,
                },
            };
            let patience = judge::patience(&wait.verdict, &object, now.duration_since(start));
            // What was written for this very version is on its way back to us.
            let in_flight = wait.written.as_ref() == Some(&object.resource_version);
            let held_back = wait.not_before.is_some_and(|until| now < until);
            if now.duration_since(wait.since) >= patience && !in_flight && !held_back {
                wait.written = Some(object.resource_version.clone());
                wait.not_before = Some(now + RETRY);
                due.push(Due {
                    key: key.clone(),
                    object,
                    status,
                });
            }
            open.insert(key, wait);
        }
        waiting.0 = open;
        due
    }

    async fn write(&self, due: Vec<Due>, waiting: &mut Waiting) {
        if due.is_empty() {
            if waiting.0.is_empty() {
                self.impairments.set(WHAT, None);
            }
            return;
        }
        let writes = due.into_iter().map(
            |Due {
                 key,
                 object,
                 status,
             }| async move {
                let written = write(&self.client, &key, &object, &status).await;
                (key, written)
            },
        );
        let mut written = stream::iter(writes).buffer_unordered(WRITERS);
        let mut failure = None;
        while let Some((key, result)) = written.next().await {
            match result {
                Ok(()) => tracing::debug!(object = %key, "wrote its status"),
                // Changed or deleted meanwhile: the watch brings what it is now.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => {
                    if let Some(wait) = waiting.0.get_mut(&key) {
                        wait.written = None;
                    }
                    failure = Some((key, error));
                }
            }
        }
        self.impairments
            .set(WHAT, failure.map(|(key, error)| impaired(&key, &error)));
    }
}

fn impaired(key: &ObjectKey, error: &kube::Error) -> Impairment {
    let resource = key.kind.resource();
    let message = match error {
        kube::Error::Api(status) if status.code == 403 => format!(
            "that of {key} cannot be written: {}; grant verb patch on resource `{}/status` of \
             apiGroup `{}` in the controller's ClusterRole",
            status.message, resource.plural, resource.group
        ),
        kube::Error::Api(status) => format!(
            "that of {key} cannot be written: {} {}; it is tried again",
            status.code, status.message
        ),
        error => format!("that of {key} cannot be written: {error}; it is tried again"),
    };
    Impairment {
        what: WHAT.to_owned(),
        message,
        blocking: false,
    }
}
