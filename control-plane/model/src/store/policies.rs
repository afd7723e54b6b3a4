use std::{collections::BTreeMap, sync::Arc};

use super::{Change, replace};
use crate::{
    facts::{pod::Pod, policy::TrafficDefaults},
    index::Index,
    key::{Birth, Key},
    selector::{Selector, Selectors},
};

/// A policy that selects pods by their labels.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Selected<P> {
    pub(crate) key: Key,
    pub(crate) birth: Birth,
    /// Where it selects; `None` for the whole mesh.
    pub(crate) scope: Option<Arc<str>>,
    pub(crate) selector: Selector,
    pub(crate) content: P,
}

impl<P> Selected<P> {
    /// What is stated of the workload holds before what is stated of its namespace, and that before
    /// what is stated of the mesh.
    pub(crate) fn width(&self) -> Width {
        if !self.selector.is_empty() {
            Width::Workloads
        } else if self.scope.is_some() {
            Width::Namespace
        } else {
            Width::Mesh
        }
    }

    /// Among those of one width the first holds.
    pub(crate) fn rank(&self) -> (Birth, &Key) {
        (self.birth, &self.key)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Width {
    Workloads,
    Namespace,
    Mesh,
}

#[derive(Debug)]
pub(crate) struct Policies<P> {
    by_key: BTreeMap<Key, Arc<Selected<P>>>,
    selectors: Selectors<Key>,
}

impl<P> Default for Policies<P> {
    fn default() -> Self {
        Self {
            by_key: BTreeMap::new(),
            selectors: Selectors::default(),
        }
    }
}

impl<P> Policies<P> {
    /// `None` where nothing changed.
    pub(crate) fn replace(
        &mut self,
        key: &Key,
        new: Option<Selected<P>>,
    ) -> Option<Change<Selected<P>>>
    where
        P: PartialEq,
    {
        let change = replace(&mut self.by_key, key, new)?;
        self.selectors.remove(key);
        if let Some(new) = &change.new {
            self.selectors
                .insert(key.clone(), new.scope.clone(), new.selector.clone());
        }
        Some(change)
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Selected<P>>> {
        self.by_key.get(key)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Selected<P>>> {
        self.by_key.values()
    }

    /// Those that select a pod, the oldest first.
    pub(crate) fn selecting(&self, pod: &Pod) -> Vec<&Arc<Selected<P>>> {
        let keys = self.selectors.matching(&pod.key.namespace, &pod.labels);
        let mut found: Vec<_> = keys.iter().filter_map(|key| self.by_key.get(key)).collect();
        found.sort_by_key(|policy| policy.rank());
        found
    }
}

#[derive(Debug, Default)]
pub(crate) struct TrafficPolicies {
    by_key: BTreeMap<Key, Arc<TrafficDefaults>>,
    by_target: Index<Key>,
}

impl TrafficPolicies {
    /// `None` where nothing changed.
    pub(crate) fn replace(
        &mut self,
        key: &Key,
        new: Option<TrafficDefaults>,
    ) -> Option<Change<TrafficDefaults>> {
        let change = replace(&mut self.by_key, key, new)?;
        for target in change.old.iter().flat_map(|old| &old.targets) {
            self.by_target.remove(target, key);
        }
        for target in change.new.iter().flat_map(|new| &new.targets) {
            self.by_target.add(target.clone(), key);
        }
        Some(change)
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<TrafficDefaults>> {
        self.by_key.get(key)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<TrafficDefaults>> {
        self.by_key.values()
    }

    /// The one that holds for a Service: of several the oldest.
    pub(crate) fn holding(&self, service: &Key) -> Option<&Arc<TrafficDefaults>> {
        let policies = self
            .by_target
            .get(service)
            .filter_map(|key| self.by_key.get(key));
        policies.min_by_key(|policy| (policy.birth, &policy.key))
    }
}
