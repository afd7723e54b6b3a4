//! Keeps addresses ready ahead of the pods, and the pool true to EC2.
//!
//! One loop owns all calls to EC2: it plans, puts intents on record, runs the calls side by side,
//! and reports what came of them. A look at EC2 is due every minute, and at once after an answer
//! that did not come or that says our view is old.

mod call;
mod look;

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};
use turnpike_cloud::{Cloud, CloudError};
use turnpike_ipam::{Action, Intent, IntentId};

use crate::{node::Node, restore};

const PLAN_EVERY: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Between looks that were asked for out of turn.
const LOOK_PAUSE: Duration = Duration::from_secs(2);
const BURY_EVERY: Duration = Duration::from_secs(30);

/// Runs until the node stops; calls under way are left to finish or to the next start.
pub async fn run<C: Cloud>(node: Arc<Node>, cloud: Arc<C>) {
    let caller = Arc::new(call::Caller::new(Arc::clone(&node), Arc::clone(&cloud)));
    let mut calls: JoinSet<Done> = JoinSet::new();
    // Nothing is asked for before EC2 has said what is there.
    let mut looked = false;
    let mut next_look = Instant::now();
    let mut next_bury = Instant::now() + BURY_EVERY;
    loop {
        if Instant::now() >= next_look {
            let pause = match look::look(&node, &*cloud).await {
                Ok(()) => {
                    looked = true;
                    LOOK_EVERY
                }
                Err(error) => {
                    tracing::error!(%error, "EC2 could not be looked at; the pool is as it was");
                    LOOK_PAUSE
                }
            };
            next_look = Instant::now() + pause;
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
                calls.spawn(async move { caller.run(intent).await });
            }
        }
        tokio::select! {
            () = node.stop.cancelled() => return,
            () = node.pool_wanted.notified() => {}
            Some(done) = calls.join_next() => {
                node.metrics.actions.dec();
                match done {
                    Ok(Done { look_again: true }) => {
                        next_look = next_look.min(Instant::now() + LOOK_PAUSE);
                    }
                    Ok(Done { look_again: false }) => {}
                    Err(error) => tracing::error!(%error, "a call to EC2 broke off"),
                }
            }
            () = sleep_until(next_look.min(Instant::now() + PLAN_EVERY)) => {}
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
