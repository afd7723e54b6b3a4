//! The facts, each kind with the indexes that answer "who depends on this?" without a walk.

mod pods;
mod policies;
mod routes;
mod services;

use std::{collections::BTreeMap, iter, option, sync::Arc};

use crate::key::Key;

pub(crate) use pods::Pods;
pub(crate) use policies::{Policies, Selected, TrafficPolicies};
pub(crate) use routes::Routes;
pub(crate) use services::{Services, Slices};

/// A fact that came, went, or says something else now.
#[derive(Debug)]
pub(crate) struct Change<T> {
    pub(crate) old: Option<Arc<T>>,
    pub(crate) new: Option<Arc<T>>,
}

/// What it was, then what it is.
impl<T> IntoIterator for Change<T> {
    type Item = Arc<T>;
    type IntoIter = iter::Chain<option::IntoIter<Arc<T>>, option::IntoIter<Arc<T>>>;

    fn into_iter(self) -> Self::IntoIter {
        self.old.into_iter().chain(self.new)
    }
}

/// Puts a fact in the place of the one before; `None` where both say the same.
fn replace<T: PartialEq>(
    facts: &mut BTreeMap<Key, Arc<T>>,
    key: &Key,
    new: Option<T>,
) -> Option<Change<T>> {
    if facts.get(key).map(Arc::as_ref) == new.as_ref() {
        return None;
    }
    let new = new.map(Arc::new);
    let old = match &new {
        Some(new) => facts.insert(key.clone(), new.clone()),
        None => facts.remove(key),
    };
    Some(Change { old, new })
}
