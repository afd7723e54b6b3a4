//! From one thing to the many that point at it.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
};

use crate::key::Key;

#[derive(Debug)]
pub(crate) struct Index<T>(HashMap<T, BTreeSet<Key>>);

impl<T> Default for Index<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Eq + Hash> Index<T> {
    pub(crate) fn add(&mut self, at: T, key: &Key) {
        self.0.entry(at).or_default().insert(key.clone());
    }

    pub(crate) fn remove(&mut self, at: &T, key: &Key) {
        if let Some(keys) = self.0.get_mut(at) {
            keys.remove(key);
            if keys.is_empty() {
                self.0.remove(at);
            }
        }
    }

    pub(crate) fn get<Q>(&self, at: &Q) -> impl DoubleEndedIterator<Item = &Key>
    where
        T: std::borrow::Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.0.get(at).into_iter().flatten()
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &T> {
        self.0.keys()
    }
}
