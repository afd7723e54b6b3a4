use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Change, replace};
use crate::{facts::route::Route, index::Index, key::Key};

#[derive(Debug, Default)]
pub(crate) struct Routes {
    by_key: BTreeMap<Key, Arc<Route>>,
    by_parent: Index<Key>,
}

impl Routes {
    /// `None` where nothing changed.
    pub(crate) fn replace(&mut self, key: &Key, new: Option<Route>) -> Option<Change<Route>> {
        let change = replace(&mut self.by_key, key, new)?;
        for parent in change.old.iter().flat_map(|old| &old.parents) {
            self.by_parent.remove(&parent.service, key);
        }
        for parent in change.new.iter().flat_map(|new| &new.parents) {
            self.by_parent.add(parent.service.clone(), key);
        }
        Some(change)
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Route>> {
        self.by_key.get(key)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.by_key.values()
    }

    /// The routes that `namespace` attached to a Service, the oldest first.
    pub(crate) fn attached(&self, service: &Key, namespace: &str) -> Vec<&Arc<Route>> {
        let keys = self
            .by_parent
            .get(service)
            .filter(|key| &*key.namespace == namespace);
        let mut found: Vec<_> = keys.filter_map(|key| self.by_key.get(key)).collect();
        found.sort_by_key(|route| (route.birth, &route.key));
        found
    }

    /// Namespaces other than its own that attached routes to a Service.
    pub(crate) fn consumers(&self, service: &Key) -> BTreeSet<Arc<str>> {
        let keys = self
            .by_parent
            .get(service)
            .filter(|key| key.namespace != service.namespace);
        keys.map(|key| key.namespace.clone()).collect()
    }
}
