//! The [`Directory`] of the data plane, and the handler of the controller's updates.

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, timeout_at},
};
use turnpike_rules::{
    Identity, ServiceKey,
    service::{EndpointShard, Service},
    workload::{Destination, SelfConfig},
};
use turnpike_wire::{
    ads::{Added, Handler, Subscription, Update},
    resource::Resource,
};

use super::{
    change::{Change, changes},
    dump,
    index::{AddressState, Asked, Index, Names},
};
use crate::mesh::{Answer, Directory, Lookup, Missing, ServiceWatch};

/// The longest that a connection waits for the controller's answer.
pub const DEADLINE: Duration = Duration::from_secs(2);

/// Everything the proxy knows of the mesh. Cheap to clone.
///
/// The lock is held for lookups in maps and for swapping in an update, never across an await.
#[derive(Clone)]
pub struct Store(Arc<Shared>);

struct Shared {
    index: Mutex<Index>,
    /// The subscriptions have changed.
    wake: Notify,
    /// This pod's own configuration has come.
    own_came: watch::Sender<bool>,
    refused: watch::Sender<u64>,
}

impl Store {
    pub fn new(cluster: &str, network: &str, pod_uid: &str, identity: Identity) -> Self {
        let names = Names {
            cluster: cluster.to_owned(),
            network: network.to_owned(),
            pod_uid: pod_uid.to_owned(),
            identity,
        };
        let wake = Notify::new();
        // Its own configuration is asked for from the start.
        wake.notify_one();
        Self(Arc::new(Shared {
            index: Mutex::new(Index::new(names)),
            wake,
            own_came: watch::Sender::new(false),
            refused: watch::Sender::new(0),
        }))
    }

    /// This pod's own configuration, as soon as it is there.
    pub async fn own(&self) -> watch::Receiver<Arc<SelfConfig>> {
        let mut came = self.0.own_came.subscribe();
        loop {
            if let Some(own) = &self.0.index.lock().own {
                return own.subscribe();
            }
            // The sender is `self`, so it outlives this wait.
            let _ = came.changed().await;
        }
    }

    /// This pod's own configuration, if it is there.
    pub fn own_now(&self) -> Option<Arc<SelfConfig>> {
        self.0
            .index
            .lock()
            .own
            .as_ref()
            .map(|own| own.borrow().clone())
    }

    /// What the ADS client gives its updates to.
    pub fn handler(&self) -> impl Handler + use<> {
        Updates(self.clone())
    }

    /// Takes one update of the last snapshot.
    pub fn restore(&self, update: Update) -> Result<(), String> {
        let changes = self.checked(update)?;
        self.0.index.lock().restore(changes, Instant::now());
        self.0.wake.notify_one();
        self.tell_own();
        Ok(())
    }

    /// The state in effect, if it has changed since the last call.
    pub fn unsaved(&self) -> Option<Vec<Update>> {
        let mut index = self.0.index.lock();
        std::mem::take(&mut index.unsaved).then(|| saved(&index))
    }

    /// The state could not be written after all.
    pub fn not_saved(&self) {
        self.0.index.lock().unsaved = true;
    }

    pub fn evict(&self, now: Instant) {
        self.0.index.lock().evict(now);
        self.0.wake.notify_one();
    }

    /// Updates that were refused so far.
    pub fn refused(&self) -> u64 {
        *self.0.refused.borrow()
    }

    pub fn connected(&self) -> bool {
        self.0.index.lock().connected
    }

    /// Everything known, for people. No secret is among it.
    pub fn dump(&self) -> serde_json::Value {
        dump::config(&self.0.index.lock())
    }

    /// The endpoints in effect, a line each.
    pub fn clusters(&self) -> String {
        dump::clusters(&self.0.index.lock())
    }

    /// Carries changed subscriptions to the ADS client, for as long as it is there.
    pub async fn subscribe_to(self, subscriptions: mpsc::Sender<Subscription>) {
        loop {
            self.0.wake.notified().await;
            let changed = self.0.index.lock().take_subscriptions();
            for subscription in changed {
                if subscriptions.send(subscription).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Decodes an update, and refuses a configuration that is another workload's.
    fn checked(&self, update: Update) -> Result<Vec<Change>, String> {
        let changes = changes(update)?;
        let index = self.0.index.lock();
        for change in &changes {
            if let Change::Own(Some(own)) = change
                && own.identity != index.names.identity
            {
                let expected = &index.names.identity;
                return Err(format!(
                    "identity: {}, but this proxy is {expected}",
                    own.identity
                ));
            }
        }
        Ok(changes)
    }

    fn tell_own(&self) {
        if self.0.index.lock().own.is_some() {
            self.0
                .own_came
                .send_if_modified(|came| !std::mem::replace(came, true));
        }
    }

    /// Asks until there is an answer or the deadline has passed.
    async fn ask<T>(
        self,
        mut first: Option<watch::Receiver<()>>,
        question: impl Fn(&mut Index, Instant) -> Asked<T>,
    ) -> Option<T> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let asked = match first.take() {
                Some(waiting) => Asked::Waiting(waiting),
                None => question(&mut self.0.index.lock(), Instant::now()),
            };
            match asked {
                Asked::Known(answer) => return Some(answer),
                Asked::Full => return None,
                // Its sender is dropped when the answer is there.
                Asked::Waiting(mut waiting) => {
                    timeout_at(deadline, waiting.changed()).await.ok();
                    if Instant::now() >= deadline {
                        return None;
                    }
                }
            }
        }
    }
}

impl Directory for Store {
    fn destination(&self, address: IpAddr) -> Answer<Lookup> {
        let ip = address.to_canonical();
        let asked = self.0.index.lock().address(ip, Instant::now());
        match asked {
            Asked::Known(lookup) => Box::pin(std::future::ready(lookup)),
            Asked::Full => Box::pin(std::future::ready(Lookup::Unanswered)),
            Asked::Waiting(waiting) => {
                self.0.wake.notify_one();
                let answer = self
                    .clone()
                    .ask(Some(waiting), move |index, now| index.address(ip, now));
                Box::pin(async move { answer.await.unwrap_or(Lookup::Unanswered) })
            }
        }
    }

    fn service(&self, key: &ServiceKey) -> Answer<Result<ServiceWatch, Missing>> {
        let asked = self.0.index.lock().service(key, Instant::now());
        match asked {
            Asked::Known(service) => Box::pin(std::future::ready(service.ok_or(Missing::Absent))),
            Asked::Full => Box::pin(std::future::ready(Err(Missing::Unanswered))),
            Asked::Waiting(waiting) => {
                self.0.wake.notify_one();
                let key = key.clone();
                let answer = self
                    .clone()
                    .ask(Some(waiting), move |index, now| index.service(&key, now));
                Box::pin(async move {
                    let service = answer.await.ok_or(Missing::Unanswered)?;
                    service.ok_or(Missing::Absent)
                })
            }
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

/// Gives the controller's updates to the store: whole, or not at all.
struct Updates(Store);

impl Handler for Updates {
    fn apply(&mut self, update: Update) -> Result<(), String> {
        let changes = self.0.checked(update).inspect_err(|_| {
            self.0.0.refused.send_modify(|refused| *refused += 1);
        })?;
        self.0.0.index.lock().apply(changes);
        self.0.0.wake.notify_one();
        self.0.tell_own();
        Ok(())
    }

    fn connection(&mut self, connected: bool) {
        self.0.0.index.lock().connected = connected;
    }
}

/// The state in effect as updates, so that it is read back the way it came.
fn saved(index: &Index) -> Vec<Update> {
    let mut own = update::<SelfConfig>();
    if let Some(sender) = &index.own {
        let config = sender.borrow();
        own.added.push(added(config.uid.to_string(), &**config));
    }
    let mut addresses = update::<Destination>();
    for (ip, entry) in &index.addresses {
        let destination = match &entry.state {
            AddressState::Found(Lookup::Service(key)) => Destination::Service(key.clone()),
            AddressState::Found(Lookup::Workload(found)) => {
                Destination::Workload(found.as_ref().clone())
            }
            _ => continue,
        };
        addresses
            .added
            .push(added(index.address_name(*ip), &destination));
    }
    let mut shards = update::<EndpointShard>();
    let mut services = update::<Service>();
    for (key, entry) in &index.services {
        if let Some((service, parts)) = entry.saved() {
            services.added.push(added(index.service_name(key), service));
            shards
                .added
                .extend(parts.map(|shard| added(shard.name.to_string(), shard)));
        }
    }
    // As they are read back: a shard is taken where a Service names it.
    vec![own, addresses, services, shards]
}

fn update<R: Resource>() -> Update {
    Update {
        type_url: R::TYPE_URL.to_owned(),
        added: Vec::new(),
        removed: Vec::new(),
    }
}

fn added<R: Resource>(name: String, resource: &R) -> Added {
    Added {
        name,
        version: String::new(),
        bytes: resource.encode(),
    }
}
