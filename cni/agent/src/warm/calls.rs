//! The calls to EC2 under way.

use std::collections::HashMap;

use tokio::task::{Id, JoinSet};
use turnpike_ipam::{IntentId, Moment, Store};

use super::{Done, LOOK_EVERY};

/// One for each intent that somebody is at work on.
#[derive(Debug, Default)]
pub(super) struct Calls {
    tasks: JoinSet<Done>,
    intents: HashMap<Id, IntentId>,
}

/// The intent whose call broke off: nobody knows what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BrokeOff(IntentId);

impl Calls {
    pub(super) fn spawn(
        &mut self,
        intent: IntentId,
        call: impl Future<Output = Done> + Send + 'static,
    ) {
        let task = self.tasks.spawn(call).id();
        self.intents.insert(task, intent);
    }

    /// The next that ends; None while there is none. Safe to drop and call again.
    pub(super) async fn next(&mut self) -> Option<Result<Done, BrokeOff>> {
        loop {
            match self.tasks.join_next_with_id().await? {
                Ok((task, done)) => {
                    self.intents.remove(&task);
                    return Some(Ok(done));
                }
                Err(error) => {
                    tracing::error!(%error, "a call to EC2 broke off");
                    // Every task was entered when it was spawned.
                    if let Some(intent) = self.intents.remove(&error.id()) {
                        return Some(Err(BrokeOff(intent)));
                    }
                }
            }
        }
    }
}

impl BrokeOff {
    /// Leaves the intent to the next look at EC2. What breaks once may break at once again.
    pub(super) async fn leave_to_look(self, store: &Store, now: Moment) -> Done {
        let change = store.change(|pool, _| {
            pool.unknown(self.0);
            pool.hold_growth(LOOK_EVERY, now);
        });
        // Nothing to put on record: after a restart an open intent is one of an unknown end.
        change.await.1.ok();
        Done { look_again: true }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use turnpike_ipam::{Action, Config, Limits, Targets};

    use super::*;

    #[tokio::test]
    async fn what_a_broken_call_leaves_open_is_found_out_by_a_look() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config {
            limits: Limits {
                enis: 3,
                addresses_per_eni: 10,
            },
            targets: Targets::default(),
            cooldown: Duration::ZERO,
        };
        let store = Store::open(folder.path(), config, "boot", Moment(1)).unwrap();
        let begin = |token: &'static str| {
            store.change(move |pool, log| {
                let create = Action::Create { addresses: 1 };
                pool.begin(create, token.to_owned(), Moment(1), log)
            })
        };
        let (ends, breaks) = (begin("a").await.0.unwrap(), begin("b").await.0.unwrap());
        let unresolved =
            || store.read(|pool| pool.unresolved().map(|it| it.id).collect::<Vec<_>>());
        let mut calls = Calls::default();
        calls.spawn(ends.id, async { Done { look_again: false } });
        let ended = calls.next().await.unwrap().unwrap();
        assert!(!ended.look_again);
        calls.spawn(breaks.id, async { panic!("a fault") });
        let broke_off = calls.next().await.unwrap().unwrap_err();
        assert_eq!(broke_off, BrokeOff(breaks.id));
        assert_eq!(unresolved(), []);
        let done = broke_off.leave_to_look(&store, Moment(1)).await;
        assert!(done.look_again);
        assert_eq!(unresolved(), [breaks.id]);
        assert!(calls.next().await.is_none());
    }
}
