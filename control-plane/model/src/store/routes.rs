use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{facts::route::Route, index::Index, key::Key};

#[derive(Debug, Default)]
pub(crate) struct Routes {
    by_key: BTreeMap<Key, Arc<Route>>,
    by_parent: Index<Key>,
}

impl Routes {
    /// Returns what was there before.
    pub(crate) fn replace(&mut self, key: &Key, new: Option<Arc<Route>>) -> Option<Arc<Route>> {
        let old = self.by_key.remove(key);
        for parent in old.iter().flat_map(|old| &old.parents) {
            self.by_parent.remove(&parent.service, key);
        }
        if let Some(new) = new {
            new.parents
                .iter()
                .for_each(|p| self.by_parent.add(p.service.clone(), key));
            self.by_key.insert(key.clone(), new);
        }
        old
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
