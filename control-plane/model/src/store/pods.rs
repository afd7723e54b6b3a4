use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{Change, replace};
use crate::{
    facts::pod::Pod,
    index::Index,
    key::Key,
    selector::{Labelled, Selector},
};

#[derive(Debug, Default)]
pub(crate) struct Pods {
    by_key: BTreeMap<Key, Arc<Pod>>,
    by_uid: Index<Arc<str>>,
    by_address: Index<IpAddr>,
    by_node: Index<Arc<str>>,
    labelled: Labelled<Key>,
    zones: Zones,
}

impl Pods {
    /// `None` where nothing changed.
    pub(crate) fn replace(&mut self, key: &Key, new: Option<Pod>) -> Option<Change<Pod>> {
        let change = replace(&mut self.by_key, key, new)?;
        if let Some(old) = &change.old {
            self.by_uid.remove(&old.uid, key);
            old.own_addresses()
                .iter()
                .for_each(|a| self.by_address.remove(a, key));
            if let Some(node) = &old.node {
                self.by_node.remove(node, key);
                self.zones.withdraw(node, old.zone.as_ref());
            }
            self.labelled.remove(key, &key.namespace);
        }
        if let Some(new) = &change.new {
            self.by_uid.add(new.uid.clone(), key);
            new.own_addresses()
                .iter()
                .for_each(|a| self.by_address.add(*a, key));
            if let Some(node) = &new.node {
                self.by_node.add(node.clone(), key);
                self.zones.claim(node, new.zone.as_ref());
            }
            self.labelled
                .insert(key.clone(), &key.namespace, &new.labels);
        }
        Some(change)
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Pod>> {
        self.by_key.get(key)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.by_key.values()
    }

    pub(crate) fn by_uid(&self, uid: &str) -> Option<&Arc<Pod>> {
        self.by_uid.get(uid).next().and_then(|key| self.get(key))
    }

    /// The pod at an address. While an old owner goes and a new one comes it is the new one.
    pub(crate) fn at(&self, address: &IpAddr) -> Option<&Arc<Pod>> {
        self.claiming(address)
            .min_by_key(|pod| (pod.terminating, Reverse(pod.birth), &pod.key))
    }

    pub(crate) fn claiming(&self, address: &IpAddr) -> impl Iterator<Item = &Arc<Pod>> {
        self.by_address.get(address).filter_map(|key| self.get(key))
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = &IpAddr> {
        self.by_address.keys()
    }

    pub(crate) fn on_node(&self, node: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.by_node.get(node).filter_map(|key| self.get(key))
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = &Arc<str>> {
        self.by_node.keys()
    }

    pub(crate) fn select(&self, namespace: Option<&str>, selector: &Selector) -> Vec<Arc<Pod>> {
        let keys = self.labelled.select(namespace, selector);
        keys.iter()
            .filter_map(|key| self.get(key).cloned())
            .collect()
    }

    /// The zone a pod is in: its own word, else its node's.
    pub(crate) fn zone(&self, pod: &Pod) -> Arc<str> {
        let node = || self.zones.of(pod.node.as_ref()?);
        pod.zone.clone().or_else(node).unwrap_or_default()
    }

    pub(crate) fn node_zone(&self, node: &str) -> Option<Arc<str>> {
        self.zones.of(node)
    }

    /// For zones that others than pods claim.
    pub(crate) fn zones_mut(&mut self) -> &mut Zones {
        &mut self.zones
    }
}

/// Zones of nodes, learned from what pods and slices on them claim. Where claims differ the first
/// in alphabetical order holds, so that it does not matter which came first.
#[derive(Debug, Default)]
pub(crate) struct Zones(HashMap<Arc<str>, BTreeMap<Arc<str>, usize>>);

impl Zones {
    fn of(&self, node: &str) -> Option<Arc<str>> {
        self.0
            .get(node)?
            .first_key_value()
            .map(|(zone, _)| zone.clone())
    }

    pub(crate) fn claim(&mut self, node: &Arc<str>, zone: Option<&Arc<str>>) {
        let Some(zone) = zone else { return };
        *self
            .0
            .entry(node.clone())
            .or_default()
            .entry(zone.clone())
            .or_default() += 1;
    }

    pub(crate) fn withdraw(&mut self, node: &Arc<str>, zone: Option<&Arc<str>>) {
        let (Some(zone), Some(zones)) = (zone, self.0.get_mut(node)) else {
            return;
        };
        if let Some(count) = zones.get_mut(zone) {
            *count -= 1;
            if *count == 0 {
                zones.remove(zone);
            }
        }
        if zones.is_empty() {
            self.0.remove(node);
        }
    }
}
