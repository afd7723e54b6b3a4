//! Keeps addresses ready ahead of the pods, and the pool true to EC2.
//!
//! One loop owns all calls to EC2: it plans, puts intents on record, runs the calls side by side,
//! and reports what came of them. A look at EC2 is due every minute, and at once after an answer
//! that did not come or that says our view is old.

mod call;
mod calls;
mod look;

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};
use turnpike_cloud::{Cloud, CloudError};
use turnpike_ipam::{Action, Intent, IntentId};
use turnpike_wire::backoff::Backoff;

use self::calls::Calls;
use crate::{node::Node, restore};

const PLAN_EVERY: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Between looks that were asked for out of turn.
const LOOK_PAUSE: Duration = Duration::from_secs(2);
/// After a look that failed, at most, and twice as long after each further one: EC2 throttles the
/// whole account, and every node of a cluster would ask at the same time.
const LOOK_RETRY: Duration = Duration::from_secs(4);
const BURY_EVERY: Duration = Duration::from_secs(30);

/// Runs until the node stops; calls under way are left to finish or to the next start.
pub async fn run<C: Cloud>(node: Arc<Node>, cloud: Arc<C>) {
    let caller = Arc::new(call::Caller::new(Arc::clone(&node), Arc::clone(&cloud)));
    let mut calls = Calls::default();
    // Nothing is asked for before EC2 has said what is there.
    let mut looked = false;
    let mut looks = Looks::new();
    let mut next_bury = Instant::now() + BURY_EVERY;
    loop {
        if looks.is_due() {
            let seen = look::look(&node, &*cloud).await;
            if let Err(error) = &seen {
                tracing::error!(%error, "EC2 could not be looked at; the pool is as it was");
            }
            looked |= seen.is_ok();
            looks.done(seen.unwrap_or(false));
        }
        if Instant::now() >= next_bury {
            if let Err(error) = restore::bury(&node).await {
                tracing::error!(%error, "tombstones cannot be read");
            }
            next_bury = Instant::now() + BURY_EVERY;
        }
        if looked {
            for intent in due(&node).await {
                let caller = Arc::clone(&caller);
                node.metrics.actions.inc();
                calls.spawn(intent.id, async move { caller.run(intent).await });
            }
        }
        tokio::select! {
            () = node.stop.cancelled() => return,
            () = node.pool_wanted.notified() => {}
            Some(ended) = calls.next() => {
                node.metrics.actions.dec();
                let done = match ended {
                    Ok(done) => done,
                    Err(broke_off) => broke_off.leave_to_look(&node.store, node.now()).await,
                };
                if done.look_again {
                    looks.hasten();
                }
            }
            () = sleep_until(looks.next.min(Instant::now() + PLAN_EVERY)) => {}
        }
    }
}

/// When EC2 is looked at.
#[derive(Debug)]
struct Looks {
    next: Instant,
    /// The last one failed, or found what it could not set right.
    failing: bool,
    backoff: Backoff,
}

impl Looks {
    fn new() -> Self {
        Self {
            next: Instant::now(),
            failing: false,
            backoff: Backoff::new(LOOK_RETRY, LOOK_EVERY),
        }
    }

    fn is_due(&self) -> bool {
        Instant::now() >= self.next
    }

    fn done(&mut self, well: bool) {
        self.failing = !well;
        let pause = if well {
            self.backoff.reset();
            LOOK_EVERY
        } else {
            self.backoff.next_pause()
        };
        self.next = Instant::now() + pause;
    }

    /// Out of turn, unless EC2 has just failed to answer one.
    fn hasten(&mut self) {
        if !self.failing {
            self.next = self.next.min(Instant::now() + LOOK_PAUSE);
        }
    }
}

/// What a finished call leaves to do.
#[derive(Debug)]
struct Done {
    look_again: bool,
}

/// Intents to run now, on record: what the plan says, and creations that nobody runs any more.
async fn due(node: &Node) -> Vec<Intent> {
    let expected = expected(node);
    let now = node.now();
    let plan = node.store.read(|pool| pool.plan(now));
    let keep_leaked = node.settings.keep_leaked;
    let (intents, recorded) = node
        .store
        .change(|pool, log| {
            pool.expect(expected);
            let held = pool.is_held(now);
            let orphans: Vec<_> = pool
                .unresolved()
                .filter(|_| !held)
                .filter(|intent| matches!(intent.action, Action::Create { .. }))
                .cloned()
                .collect();
            orphans.iter().for_each(|intent| pool.resumed(intent.id));
            let known: BTreeSet<_> = pool.enis().map(|eni| eni.id.clone()).collect();
            let is_leak =
                |action: &Action| matches!(action, Action::Delete { eni } if !known.contains(eni));
            let begun: Vec<_> = plan
                .into_iter()
                .filter(|action| !(keep_leaked && is_leak(action)))
                .filter_map(|action| pool.begin(action, token(), now, log))
                .collect();
            orphans.into_iter().chain(begun).collect::<Vec<_>>()
        })
        .await;
    if let Err(error) = recorded {
        // Without a record a lost answer could not be told from a call never made.
        tracing::error!(%error, "EC2 is not asked: the intents are not on record");
        let ids: Vec<IntentId> = intents.iter().map(|intent| intent.id).collect();
        let undone = node.store.change(|pool, log| {
            ids.iter()
                .for_each(|id| pool.fail(*id, LOOK_PAUSE, now, log));
        });
        undone.await.1.ok();
        return Vec::new();
    }
    intents
}

/// Pods that are bound to the node and hold no address yet, and ADDs that wait for one.
fn expected(node: &Node) -> u32 {
    let holding: BTreeSet<_> = node
        .leases()
        .into_iter()
        .map(|lease| (lease.holder.pod.namespace, lease.holder.pod.name))
        .collect();
    let snapshot = node.policy.watch();
    let snapshot = snapshot.borrow();
    let bound = snapshot
        .pods()
        .filter(|pod| !holding.contains(&(pod.namespace.to_string(), pod.name.to_string())))
        .count();
    let bound = u32::try_from(bound).unwrap_or(u32::MAX);
    bound.max(node.parked.load(Ordering::Relaxed))
}

/// New for every intent, so that EC2 makes one interface of it however often it is asked.
fn token() -> String {
    let random = std::iter::repeat_with(fastrand::alphanumeric).take(24);
    format!("turnpike-{}", random.collect::<String>())
}

fn count(node: &Node, api: &'static str, error: Option<&CloudError>) {
    let calls = crate::metrics::Api { api };
    node.metrics.api_calls.get_or_create(&calls).inc();
    if let Some(error) = error {
        let call = crate::metrics::Call {
            api,
            error: error.kind(),
        };
        node.metrics.api_errors.get_or_create(&call).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn looks_that_fail_become_rarer_and_one_that_does_not_begins_anew() {
        let mut looks = Looks::new();
        assert!(looks.is_due());
        let fail = |looks: &mut Looks| {
            looks.done(false);
            // What else fails meanwhile hastens nothing.
            looks.hasten();
            looks.next - Instant::now()
        };
        let pauses: Vec<_> = (0..8).map(|_| fail(&mut looks)).collect();
        assert!(pauses[0] >= LOOK_RETRY / 2, "{pauses:?}");
        assert!(pauses[0] <= LOOK_RETRY, "{pauses:?}");
        assert!(pauses[7] >= LOOK_EVERY / 2, "{pauses:?}");
        assert!(pauses.iter().all(|it| *it <= LOOK_EVERY), "{pauses:?}");
        looks.done(true);
        assert_eq!(looks.next - Instant::now(), LOOK_EVERY);
        looks.hasten();
        assert_eq!(looks.next - Instant::now(), LOOK_PAUSE);
        assert!(fail(&mut looks) <= LOOK_RETRY);
    }
}
