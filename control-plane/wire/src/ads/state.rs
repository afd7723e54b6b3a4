//! What is subscribed and which versions are held: all that a new stream must begin with.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Added, Subscription, Update};
use crate::{
    core::Node,
    discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
    names::WILDCARD,
};

#[derive(Debug, Default)]
pub(super) struct State {
    types: BTreeMap<&'static str, TypeState>,
}

/// Bounded by what the process subscribes to; changes that wait are merged by name.
#[derive(Debug, Default)]
struct TypeState {
    names: BTreeSet<String>,
    /// Of what was accepted.
    versions: HashMap<String, String>,
    /// The next request is this stream's first of the type, and names all that is wanted and held.
    fresh: bool,
    subscribe: BTreeSet<String>,
    unsubscribe: BTreeSet<String>,
}

impl State {
    pub(super) fn change(&mut self, change: Subscription) {
        let state = self
            .types
            .entry(change.type_url)
            .or_insert_with(|| TypeState {
                fresh: true,
                ..TypeState::default()
            });
        for name in change.unsubscribe {
            state.subscribe.remove(&name);
            state.versions.remove(&name);
            if state.names.remove(&name) {
                state.unsubscribe.insert(name);
            }
        }
        for name in change.subscribe {
            state.unsubscribe.remove(&name);
            state.names.insert(name.clone());
            state.subscribe.insert(name);
        }
    }

    /// A new stream has no memory of the old one's requests.
    pub(super) fn reconnected(&mut self) {
        self.types.retain(|_, state| !state.names.is_empty());
        for state in self.types.values_mut() {
            state.fresh = true;
            state.unsubscribe.clear();
            state.subscribe = state.names.clone();
        }
    }

    /// At most `limit` requests to begin a stream with; the very first carries the node.
    pub(super) fn first_requests(
        &mut self,
        limit: usize,
        node: &mut Option<Node>,
    ) -> Vec<DeltaDiscoveryRequest> {
        let requests = std::iter::from_fn(|| self.next_request()).take(limit);
        requests
            .map(|request| DeltaDiscoveryRequest {
                node: node.take(),
                ..request
            })
            .collect()
    }

    pub(super) fn has_request(&self) -> bool {
        self.types.values().any(TypeState::changed)
    }

    pub(super) fn next_request(&mut self) -> Option<DeltaDiscoveryRequest> {
        let (type_url, state) = self.types.iter_mut().find(|(_, state)| state.changed())?;
        let initial_resource_versions = if std::mem::take(&mut state.fresh) {
            state.versions.clone()
        } else {
            HashMap::new()
        };
        Some(DeltaDiscoveryRequest {
            type_url: (*type_url).to_owned(),
            resource_names_subscribe: std::mem::take(&mut state.subscribe).into_iter().collect(),
            resource_names_unsubscribe: std::mem::take(&mut state.unsubscribe)
                .into_iter()
                .collect(),
            initial_resource_versions,
            ..Default::default()
        })
    }

    /// A response without what is no longer subscribed: it crossed an unsubscription on the way.
    pub(super) fn wanted(&self, response: DeltaDiscoveryResponse) -> Result<Update, String> {
        let type_url = response.type_url;
        let Some(state) = self.types.get(type_url.as_str()) else {
            return Err(format!("`{type_url}` was not subscribed"));
        };
        let mut added = Vec::with_capacity(response.resources.len());
        for resource in response.resources {
            if !state.wants(&resource.name) {
                continue;
            }
            let name = resource.name;
            let body = resource
                .resource
                .ok_or_else(|| format!("`{name}` has no content"))?;
            if body.type_url != type_url {
                return Err(format!(
                    "`{name}` is a `{}` among `{type_url}`",
                    body.type_url
                ));
            }
            added.push(Added {
                name,
                version: resource.version,
                bytes: body.value,
            });
        }
        let removed = response.removed_resources;
        let removed = removed
            .into_iter()
            .filter(|name| state.wants(name))
            .collect();
        Ok(Update {
            type_url,
            added,
            removed,
        })
    }

    pub(super) fn accept(&mut self, held: Held) {
        let Some(state) = self.types.get_mut(held.type_url.as_str()) else {
            return;
        };
        state.versions.extend(held.added);
        for name in held.removed {
            state.versions.remove(&name);
        }
    }
}

impl TypeState {
    fn changed(&self) -> bool {
        !self.subscribe.is_empty() || !self.unsubscribe.is_empty()
    }

    fn wants(&self, name: &str) -> bool {
        self.names.contains(name) || self.names.contains(WILDCARD)
    }
}

/// What is held once an update has been accepted.
pub(super) struct Held {
    type_url: String,
    added: Vec<(String, String)>,
    removed: Vec<String>,
}

impl Held {
    pub(super) fn of(update: &Update) -> Self {
        let version = |added: &Added| (added.name.clone(), added.version.clone());
        Self {
            type_url: update.type_url.clone(),
            added: update.added.iter().map(version).collect(),
            removed: update.removed.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::Resource;

    const TYPE: &str = "type.googleapis.com/turnpike.mesh.v1.Address";

    fn response(names: &[&str], removed: &[&str]) -> DeltaDiscoveryResponse {
        let resource = |name: &&str| Resource {
            name: (*name).to_owned(),
            version: "1".to_owned(),
            resource: Some(prost_types::Any {
                type_url: TYPE.to_owned(),
                value: vec![],
            }),
        };
        DeltaDiscoveryResponse {
            type_url: TYPE.to_owned(),
            resources: names.iter().map(resource).collect(),
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn an_answer_that_crosses_an_unsubscription_is_dropped() {
        let mut state = State::default();
        state.change(Subscription::subscribe(TYPE, ["a", "b", "c"]));
        assert!(state.next_request().is_some());
        state.change(Subscription::unsubscribe(TYPE, ["b", "c"]));
        let update = state.wanted(response(&["a", "b"], &["c"])).unwrap();
        assert_eq!(update.added.len(), 1);
        assert_eq!(update.added[0].name, "a");
        assert!(update.removed.is_empty());
    }

    #[test]
    fn a_type_that_nobody_subscribed_is_refused() {
        let error = State::default().wanted(response(&["a"], &[])).unwrap_err();
        assert!(error.contains("was not subscribed"), "{error}");
    }

    #[test]
    fn changes_that_wait_are_merged_by_name() {
        let mut state = State::default();
        for _ in 0..100 {
            state.change(Subscription::subscribe(TYPE, ["a", "b"]));
            state.change(Subscription::unsubscribe(TYPE, ["a"]));
        }
        let request = state.next_request().unwrap();
        assert_eq!(request.resource_names_subscribe, ["b"]);
        assert_eq!(request.resource_names_unsubscribe, ["a"]);
        assert!(!state.has_request());
    }
}
