//! What is known, what was asked, and what must be subscribed. Pure: no locks, no clock, no I/O.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, time::Instant};
use turnpike_rules::{
    Identity, ServiceKey,
    service::{EndpointShard, Service},
    workload::{Destination, Names as WorkloadNames, SelfConfig},
};
use turnpike_wire::{ads::Subscription, names, resource::Resource};

use self::subscriptions::Subscriptions;
use super::change::Change;
use crate::mesh::{EndpointView, Lookup, ServiceView, ServiceWatch};

mod subscriptions;
#[cfg(test)]
mod tests;

/// What nobody has asked for in this time is evicted.
pub(super) const IDLE: Duration = Duration::from_secs(300);
/// Questions of one type that are open or were answered "no such thing". Past it the oldest that
/// nobody waits for goes; where all are waited for, no new question is asked.
pub(super) const UNANSWERED: usize = 1024;

/// The answer to a question, as far as it is known.
#[derive(Debug)]
pub(super) enum Asked<T> {
    Known(T),
    /// Ask again when this changes or its sender is gone.
    Waiting(watch::Receiver<()>),
    /// Too many questions are open.
    Full,
}

#[derive(Debug)]
pub(super) struct Index {
    pub(super) names: Names,
    pub(super) own: Option<watch::Sender<Arc<SelfConfig>>>,
    pub(super) addresses: HashMap<IpAddr, Address>,
    pub(super) services: HashMap<ServiceKey, ServiceEntry>,
    subscriptions: Subscriptions,
    /// Each once: hundreds of endpoints are of one workload.
    known_names: HashSet<Arc<WorkloadNames>>,
    pub(super) connected: bool,
    /// Something changed since the state was last written to disk.
    pub(super) unsaved: bool,
}

/// What this proxy's questions are made of.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) cluster: String,
    pub(super) network: String,
    pub(super) pod_uid: String,
    pub(super) identity: Identity,
}

#[derive(Debug)]
pub(super) struct Address {
    used: Instant,
    pub(super) state: AddressState,
}

#[derive(Debug)]
pub(super) enum AddressState {
    /// Dropping the sender wakes those who wait.
    Asked(watch::Sender<()>),
    Found(Lookup),
    Missing,
}

#[derive(Debug)]
pub(super) struct ServiceEntry {
    used: Instant,
    /// Set while the first answer is awaited.
    waiting: Option<watch::Sender<()>>,
    /// As last received; takes effect when all its shards are there.
    definition: Option<Service>,
    /// `None`: asked for and not there yet.
    shards: BTreeMap<Arc<str>, Option<EndpointShard>>,
    pub(super) current: Option<watch::Sender<Arc<ServiceView>>>,
}

impl Index {
    pub(super) fn new(names: Names) -> Self {
        let mut index = Self {
            own: None,
            addresses: HashMap::new(),
            services: HashMap::new(),
            subscriptions: Subscriptions::default(),
            known_names: HashSet::new(),
            connected: false,
            unsaved: false,
            names,
        };
        let own = index.names.pod_uid.clone();
        index.subscriptions.add(SelfConfig::TYPE_URL, own);
        index
    }

    /// What stands at an address. Outside the mesh's prefixes: nothing of the mesh, unasked.
    pub(super) fn address(&mut self, ip: IpAddr, now: Instant) -> Asked<Lookup> {
        let Some(own) = &self.own else {
            return Asked::Full;
        };
        if !own
            .borrow()
            .mesh_prefixes
            .iter()
            .any(|prefix| prefix.contains(&ip))
        {
            return Asked::Known(Lookup::Unknown);
        }
        if let Some(entry) = self.addresses.get_mut(&ip) {
            entry.used = now;
            return match &entry.state {
                AddressState::Asked(waiting) => Asked::Waiting(waiting.subscribe()),
                AddressState::Found(lookup) => Asked::Known(lookup.clone()),
                AddressState::Missing => Asked::Known(Lookup::Unknown),
            };
        }
        if !self.make_room_for_address() {
            return Asked::Full;
        }
        let (waiting, receiver) = watch::channel(());
        self.addresses.insert(
            ip,
            Address {
                used: now,
                state: AddressState::Asked(waiting),
            },
        );
        let name = self.address_name(ip);
        self.subscriptions.add(Destination::TYPE_URL, name);
        Asked::Waiting(receiver)
    }

    /// A Service as it changes; `None`: there is none.
    pub(super) fn service(
        &mut self,
        key: &ServiceKey,
        now: Instant,
    ) -> Asked<Option<ServiceWatch>> {
        if let Some(entry) = self.services.get_mut(key) {
            entry.used = now;
            return match (&entry.current, &entry.waiting) {
                (Some(current), _) => Asked::Known(Some(current.subscribe())),
                (None, Some(waiting)) => Asked::Waiting(waiting.subscribe()),
                (None, None) => Asked::Known(None),
            };
        }
        if !self.make_room_for_service() {
            return Asked::Full;
        }
        let (waiting, receiver) = watch::channel(());
        self.services
            .insert(key.clone(), ServiceEntry::asked(now, Some(waiting)));
        let name = self.service_name(key);
        self.subscriptions.add(Service::TYPE_URL, name);
        Asked::Waiting(receiver)
    }

    /// Takes a decoded update, which cannot fail any more.
    pub(super) fn apply(&mut self, changes: Vec<Change>) {
        self.unsaved |= !changes.is_empty();
        for change in changes {
            match change {
                Change::Own(Some(own)) => self.set_own(*own),
                Change::Own(None) => {
                    tracing::warn!("the controller no longer knows this pod; keeping what it said");
                }
                Change::Address(ip, mut lookup) => {
                    if let Some(Lookup::Workload(workload)) = &mut lookup {
                        self.intern(&mut Arc::make_mut(workload).names);
                    }
                    self.set_address(ip, lookup);
                }
                Change::Service(key, definition) => self.set_service(&key, definition),
                Change::Shard(key, name, mut shard) => {
                    for endpoint in shard.iter_mut().flat_map(|shard| &mut shard.endpoints) {
                        self.intern(&mut endpoint.names);
                    }
                    self.set_shard(&key, &name, shard);
                }
            }
        }
    }

    fn intern(&mut self, names: &mut Option<Arc<WorkloadNames>>) {
        let Some(own) = names else { return };
        match self.known_names.get(own) {
            Some(known) => *own = known.clone(),
            None => drop(self.known_names.insert(own.clone())),
        }
    }

    /// Takes what was on disk: known until the controller says otherwise. Services come before
    /// their shards.
    pub(super) fn restore(&mut self, changes: Vec<Change>, now: Instant) {
        for change in &changes {
            match change {
                Change::Address(ip, _) => {
                    let state = AddressState::Asked(watch::Sender::new(()));
                    self.addresses.insert(*ip, Address { used: now, state });
                    let name = self.address_name(*ip);
                    self.subscriptions.add(Destination::TYPE_URL, name);
                }
                Change::Service(key, _) => {
                    let entry = ServiceEntry::asked(now, Some(watch::Sender::new(())));
                    self.services.insert(key.clone(), entry);
                    let name = self.service_name(key);
                    self.subscriptions.add(Service::TYPE_URL, name);
                }
                Change::Own(_) | Change::Shard(..) => {}
            }
        }
        self.apply(changes);
        self.unsaved = false;
    }

    /// Forgets what is idle. Never while the controller is away: it could not be asked again.
    pub(super) fn evict(&mut self, now: Instant) {
        if !self.connected {
            return;
        }
        self.known_names
            .retain(|names| Arc::strong_count(names) > 1);
        let idle = |used: Instant| now.saturating_duration_since(used) >= IDLE;
        let gone: Vec<_> = self
            .addresses
            .iter()
            .filter(|(_, entry)| idle(entry.used))
            .map(|(ip, _)| *ip)
            .collect();
        for ip in gone {
            self.forget_address(ip);
        }
        for entry in self.services.values_mut() {
            if entry
                .current
                .as_ref()
                .is_some_and(|current| current.receiver_count() > 0)
            {
                entry.used = now;
            }
        }
        let idle = |entry: &ServiceEntry| idle(entry.used);
        let gone: Vec<_> = self
            .services
            .iter()
            .filter(|(_, e)| idle(e))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            self.forget_service(&key);
        }
    }

    /// The subscriptions that have changed since the last call.
    pub(super) fn take_subscriptions(&mut self) -> Vec<Subscription> {
        self.subscriptions.take()
    }

    pub(super) fn address_name(&self, ip: IpAddr) -> String {
        names::address(&self.names.network, ip)
    }

    pub(super) fn service_name(&self, key: &ServiceKey) -> String {
        names::service(key, Some(self.names.identity.namespace()))
    }

    fn set_own(&mut self, own: SelfConfig) {
        let own = Arc::new(own);
        match &self.own {
            Some(sender) => {
                sender.send_replace(own);
            }
            None => self.own = Some(watch::Sender::new(own)),
        }
    }

    fn set_address(&mut self, ip: IpAddr, lookup: Option<Lookup>) {
        // One that is not there was evicted while the answer was on its way.
        if let Some(entry) = self.addresses.get_mut(&ip) {
            entry.state = lookup.map_or(AddressState::Missing, AddressState::Found);
        }
    }

    fn set_service(&mut self, key: &ServiceKey, definition: Option<Box<Service>>) {
        let Some(entry) = self.services.get_mut(key) else {
            return;
        };
        let Some(definition) = definition else {
            let shards = std::mem::take(&mut entry.shards);
            *entry = ServiceEntry::asked(entry.used, None);
            for name in shards.into_keys() {
                self.subscriptions
                    .remove(EndpointShard::TYPE_URL, name.to_string());
            }
            return;
        };
        let missing = definition
            .shards
            .iter()
            .filter(|name| !entry.shards.contains_key(*name));
        let missing: Vec<_> = missing.cloned().collect();
        entry
            .shards
            .extend(missing.iter().map(|name| (name.clone(), None)));
        entry.definition = Some(*definition);
        if entry.current.is_none() {
            // It has come to be: who asks now waits for its shards.
            entry.waiting.get_or_insert_with(|| watch::Sender::new(()));
        }
        for name in missing {
            self.subscriptions
                .add(EndpointShard::TYPE_URL, name.to_string());
        }
        self.swap_in(key);
    }

    fn set_shard(&mut self, key: &ServiceKey, name: &Arc<str>, shard: Option<EndpointShard>) {
        let Some(entry) = self.services.get_mut(key) else {
            return;
        };
        let Some(held) = entry.shards.get_mut(name) else {
            return;
        };
        match (shard, &mut *held) {
            (Some(shard), _) => *held = Some(shard),
            // One that was there and is gone has no endpoints left.
            (None, Some(held)) => held.endpoints.clear(),
            // One that never was there is still awaited: the Service that names it is about to
            // change.
            (None, None) => return,
        }
        self.swap_in(key);
    }

    /// Puts a Service into effect if all its shards are there.
    fn swap_in(&mut self, key: &ServiceKey) {
        let Some(entry) = self.services.get_mut(key) else {
            return;
        };
        let Some(view) = entry.complete() else { return };
        match &entry.current {
            Some(current) => {
                current.send_if_modified(|old| {
                    let changed = **old != view;
                    if changed {
                        *old = Arc::new(view);
                    }
                    changed
                });
            }
            None => entry.current = Some(watch::Sender::new(Arc::new(view))),
        }
        entry.waiting = None;
        let named = entry
            .definition
            .as_ref()
            .map(|service| service.shards.as_slice());
        let named = named.unwrap_or_default();
        let stale: Vec<_> = entry
            .shards
            .keys()
            .filter(|name| !named.contains(name))
            .cloned()
            .collect();
        for name in stale {
            entry.shards.remove(&name);
            self.subscriptions
                .remove(EndpointShard::TYPE_URL, name.to_string());
        }
    }

    /// False where as many questions are open as may be.
    fn make_room_for_address(&mut self) -> bool {
        let open = |entry: &&Address| !matches!(entry.state, AddressState::Found(_));
        if self.addresses.values().filter(open).count() < UNANSWERED {
            return true;
        }
        let unwatched = |entry: &Address| match &entry.state {
            AddressState::Asked(waiting) => waiting.receiver_count() == 0,
            AddressState::Missing => true,
            AddressState::Found(_) => false,
        };
        let candidates = self.addresses.iter().filter(|(_, entry)| unwatched(entry));
        let Some(oldest) = candidates
            .min_by_key(|(_, entry)| entry.used)
            .map(|(ip, _)| *ip)
        else {
            return false;
        };
        self.forget_address(oldest);
        true
    }

    fn make_room_for_service(&mut self) -> bool {
        let open = |entry: &&ServiceEntry| entry.current.is_none();
        if self.services.values().filter(open).count() < UNANSWERED {
            return true;
        }
        let unwatched = |entry: &ServiceEntry| {
            entry.current.is_none()
                && entry
                    .waiting
                    .as_ref()
                    .is_none_or(|waiting| waiting.receiver_count() == 0)
        };
        let candidates = self.services.iter().filter(|(_, entry)| unwatched(entry));
        let oldest = candidates
            .min_by_key(|(_, entry)| entry.used)
            .map(|(key, _)| key.clone());
        let Some(oldest) = oldest else { return false };
        self.forget_service(&oldest);
        true
    }

    fn forget_address(&mut self, ip: IpAddr) {
        self.addresses.remove(&ip);
        let name = self.address_name(ip);
        self.subscriptions.remove(Destination::TYPE_URL, name);
        self.unsaved = true;
    }

    fn forget_service(&mut self, key: &ServiceKey) {
        let Some(entry) = self.services.remove(key) else {
            return;
        };
        let name = self.service_name(key);
        self.subscriptions.remove(Service::TYPE_URL, name);
        for name in entry.shards.into_keys() {
            self.subscriptions
                .remove(EndpointShard::TYPE_URL, name.to_string());
        }
        self.unsaved = true;
    }
}

impl ServiceEntry {
    fn asked(used: Instant, waiting: Option<watch::Sender<()>>) -> Self {
        Self {
            used,
            waiting,
            definition: None,
            shards: BTreeMap::new(),
            current: None,
        }
    }

    /// The whole Service, if all its shards are there.
    fn complete(&self) -> Option<ServiceView> {
        let service = self.definition.as_ref()?;
        let mut endpoints = Vec::new();
        for name in &service.shards {
            let shard = self.shards.get(name)?.as_ref()?;
            let ports: Arc<[_]> = shard.ports.as_slice().into();
            endpoints.extend(shard.endpoints.iter().map(|endpoint| EndpointView {
                endpoint: endpoint.clone(),
                ports: ports.clone(),
            }));
        }
        Some(ServiceView {
            service: service.clone(),
            endpoints,
        })
    }

    /// What of a Service in effect goes to disk.
    pub(super) fn saved(&self) -> Option<(&Service, impl Iterator<Item = &EndpointShard>)> {
        self.current.as_ref()?;
        self.complete()?;
        let service = self.definition.as_ref()?;
        Some((service, self.shards.values().flatten()))
    }
}
