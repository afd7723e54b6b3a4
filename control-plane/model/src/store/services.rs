use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{Change, replace};
use crate::{
    facts::{pod::Pod, service::Service, slice::Slice},
    index::Index,
    key::Key,
    selector::Selectors,
    shards::Shards,
};

#[derive(Debug, Default)]
pub(crate) struct Services {
    by_key: BTreeMap<Key, Arc<Service>>,
    by_vip: Index<IpAddr>,
    selectors: Selectors<Key>,
    shards: HashMap<Key, Shards>,
}

impl Services {
    /// `None` where nothing changed.
    pub(crate) fn replace(&mut self, key: &Key, new: Option<Service>) -> Option<Change<Service>> {
        let change = replace(&mut self.by_key, key, new)?;
        if let Some(old) = &change.old {
            old.vips.iter().for_each(|vip| self.by_vip.remove(vip, key));
            self.selectors.remove(key);
        }
        if let Some(new) = &change.new {
            new.vips.iter().for_each(|vip| self.by_vip.add(*vip, key));
            if let Some(selector) = &new.selector {
                let namespace = Some(key.namespace.clone());
                self.selectors
                    .insert(key.clone(), namespace, selector.clone());
            }
        }
        Some(change)
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Service>> {
        self.by_key.get(key)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.by_key.values()
    }

    /// The Service at a cluster address; of two that claim it, the older.
    pub(crate) fn at(&self, vip: &IpAddr) -> Option<&Arc<Service>> {
        let claims = self.by_vip.get(vip).filter_map(|key| self.get(key));
        claims.min_by_key(|service| (service.birth, &service.key))
    }

    pub(crate) fn vips(&self) -> impl Iterator<Item = &IpAddr> {
        self.by_vip.keys()
    }

    /// The Services whose selectors match a pod.
    pub(crate) fn selecting(&self, pod: &Pod) -> BTreeSet<Key> {
        self.selectors.matching(&pod.key.namespace, &pod.labels)
    }

    pub(crate) fn shards(&self, key: &Key) -> Option<&Shards> {
        self.shards.get(key)
    }

    /// Its endpoints, to be changed; an empty set is forgotten by [`Self::settle`].
    pub(crate) fn shards_mut(&mut self, key: &Key) -> &mut Shards {
        self.shards.entry(key.clone()).or_default()
    }

    pub(crate) fn settle(&mut self, key: &Key) {
        if self
            .shards
            .get(key)
            .is_some_and(|shards| shards.sources().next().is_none())
        {
            self.shards.remove(key);
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Slices {
    by_key: BTreeMap<Key, Arc<Slice>>,
    by_service: Index<Key>,
    by_pod: Index<Key>,
    by_address: Index<IpAddr>,
}

impl Slices {
    /// `None` where nothing changed.
    pub(crate) fn replace(&mut self, key: &Key, new: Option<Slice>) -> Option<Change<Slice>> {
        let change = replace(&mut self.by_key, key, new)?;
        if let Some(old) = &change.old {
            self.by_service.remove(&old.service, key);
            for entry in &old.endpoints {
                entry
                    .pod
                    .iter()
                    .for_each(|pod| self.by_pod.remove(pod, key));
                entry
                    .addresses
                    .iter()
                    .for_each(|a| self.by_address.remove(a, key));
            }
        }
        if let Some(new) = &change.new {
            self.by_service.add(new.service.clone(), key);
            for entry in &new.endpoints {
                entry
                    .pod
                    .iter()
                    .for_each(|pod| self.by_pod.add(pod.clone(), key));
                entry
                    .addresses
                    .iter()
                    .for_each(|a| self.by_address.add(*a, key));
            }
        }
        Some(change)
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Slice>> {
        self.by_key.get(key)
    }

    pub(crate) fn of(&self, service: &Key) -> impl Iterator<Item = &Arc<Slice>> {
        self.by_service.get(service).filter_map(|key| self.get(key))
    }

    pub(crate) fn any_of(&self, service: &Key) -> bool {
        self.by_service.get(service).next().is_some()
    }

    /// The slices that name a pod or one of its addresses.
    pub(crate) fn naming(&self, pod: &Pod) -> BTreeSet<Key> {
        let by_address = pod
            .own_addresses()
            .iter()
            .flat_map(|address| self.by_address.get(address));
        self.by_pod
            .get(&pod.key)
            .chain(by_address)
            .cloned()
            .collect()
    }
}
