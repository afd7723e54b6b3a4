//! Changed subscriptions on their way to the stream.

use std::collections::{BTreeMap, BTreeSet};

use turnpike_wire::ads::Subscription;

/// Changes that wait to be sent, merged by name, so that they are never more than the entries.
#[derive(Debug, Default)]
pub(super) struct Subscriptions(BTreeMap<&'static str, Pending>);

#[derive(Debug, Default)]
struct Pending {
    subscribe: BTreeSet<String>,
    unsubscribe: BTreeSet<String>,
}

impl Subscriptions {
    pub(super) fn add(&mut self, type_url: &'static str, name: String) {
        let pending = self.0.entry(type_url).or_default();
        pending.unsubscribe.remove(&name);
        pending.subscribe.insert(name);
    }

    pub(super) fn remove(&mut self, type_url: &'static str, name: String) {
        let pending = self.0.entry(type_url).or_default();
        pending.subscribe.remove(&name);
        pending.unsubscribe.insert(name);
    }

    /// What has changed since the last call.
    pub(super) fn take(&mut self) -> Vec<Subscription> {
        let Self(pending) = std::mem::take(self);
        let subscription = |(type_url, pending): (&'static str, Pending)| Subscription {
            type_url,
            subscribe: pending.subscribe.into_iter().collect(),
            unsubscribe: pending.unsubscribe.into_iter().collect(),
        };
        pending.into_iter().map(subscription).collect()
    }
}
