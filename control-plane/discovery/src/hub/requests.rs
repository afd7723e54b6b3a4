//! What clients ask: answers to responses, and changes of what they watch.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::SystemTime,
};

use turnpike_model::ResourceType;
use turnpike_wire::{discovery::DeltaDiscoveryRequest, names::WILDCARD};

use super::{Hub, Scope, placed};
use crate::{
    Caller, Denied,
    resource::by_type_url,
    subscriber::{Answer, Held, MAX_NAME_BYTES, MAX_NAMES, SubscriberId, TypeState},
};

/// Why a request ends its stream.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum RequestError {
    #[error("resource type `{0}` is not served")]
    UnknownType(String),
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("a name has {0} bytes; at most {MAX_NAME_BYTES} are taken")]
    NameTooLong(usize),
    #[error("more than {MAX_NAMES} names in one stream; unsubscribe what is not used")]
    TooManyNames,
}

impl Hub {
    /// Takes a request: the answer to a response, a change of what is subscribed, or both.
    pub(crate) fn request(
        &mut self,
        id: SubscriberId,
        request: DeltaDiscoveryRequest,
        now: SystemTime,
    ) -> Result<(), RequestError> {
        let kind = by_type_url(&request.type_url)
            .ok_or_else(|| RequestError::UnknownType(limited(&request.type_url)))?;
        let Some(subscriber) = self.subscribers.get_mut(&id) else {
            return Ok(());
        };
        if let Some(node) = request.node {
            subscriber.node_id = limited(&node.id);
        }
        if !request.response_nonce.is_empty() {
            let refusal = request.error_detail.map(|status| status.message);
            let refused = refusal.is_some();
            if subscriber.answered(&request.response_nonce, refusal, now) {
                let counter = if refused {
                    &mut self.counters.refused
                } else {
                    &mut self.counters.accepted
                };
                *counter += 1;
            }
        }
        let first = !subscriber.types.contains_key(&kind);
        let state = subscriber.types.entry(kind).or_default();
        if first {
            state.resume(request.initial_resource_versions)?;
        }
        for name in request.resource_names_unsubscribe {
            self.unsubscribe(id, kind, &name);
        }
        for name in request.resource_names_subscribe {
            self.subscribe(id, kind, &name, first)?;
        }
        Ok(())
    }

    fn subscribe(
        &mut self,
        id: SubscriberId,
        kind: ResourceType,
        name: &str,
        resuming: bool,
    ) -> Result<(), RequestError> {
        if name.len() > MAX_NAME_BYTES {
            return Err(RequestError::NameTooLong(name.len()));
        }
        let Some(subscriber) = self.subscribers.get_mut(&id) else {
            return Ok(());
        };
        if let Err(denied) = subscriber.caller.may_subscribe(kind, name) {
            self.counters.denied += 1;
            return Err(denied.into());
        }
        if subscriber.names() >= MAX_NAMES {
            return Err(RequestError::TooManyNames);
        }
        if name == WILDCARD {
            self.watch_all(id, kind);
            return Ok(());
        }
        let name: Arc<str> = name.into();
        let state = subscriber.types.entry(kind).or_default();
        state.exact.insert(name.clone());
        if !resuming {
            // Asked for anew, it is sent again, whatever the client was told before.
            state.held.remove(&name);
        }
        subscriber.mark(kind, &name);
        self.watch(id, kind, &name);
        Ok(())
    }

    fn unsubscribe(&mut self, id: SubscriberId, kind: ResourceType, name: &str) {
        let Some(subscriber) = self.subscribers.get_mut(&id) else {
            return;
        };
        let Some(state) = subscriber.types.get_mut(&kind) else {
            return;
        };
        if name == WILDCARD {
            if std::mem::take(&mut state.wildcard) {
                let exact = &state.exact;
                state.held.retain(|name, _| exact.contains(name));
                state.dirty.retain(|name| exact.contains(name));
                let left: HashSet<Arc<str>> = exact.clone();
                subscriber.forget_refusals(kind, |name| !left.contains(name));
                let caller = subscriber.caller.clone();
                self.unwatch_all(id, kind, &caller);
            }
        } else if state.exact.remove(name) {
            if !state.wildcard {
                state.held.remove(name);
                state.dirty.remove(name);
                subscriber.forget_refusals(kind, |other| other == name);
            }
            self.unwatch(id, kind, name);
        }
    }

    fn watch(&mut self, id: SubscriberId, kind: ResourceType, name: &Arc<str>) {
        self.load(kind, name).exact.insert(id);
        if kind == ResourceType::Service
            && let Some((base, _)) = name.split_once('@')
        {
            self.views
                .entry(base.into())
                .or_default()
                .insert(name.clone());
        }
    }

    pub(super) fn unwatch(&mut self, id: SubscriberId, kind: ResourceType, name: &str) {
        let name: Arc<str> = name.into();
        if let Some(entry) = self.entries.get_mut(&(kind, name.clone())) {
            entry.exact.remove(&id);
        }
        self.settle(kind, &name);
    }

    /// Everything the subscriber may see of a type; what it resumes with is looked at too, so that
    /// it is told what has gone.
    fn watch_all(&mut self, id: SubscriberId, kind: ResourceType) {
        let Some(subscriber) = self.subscribers.get_mut(&id) else {
            return;
        };
        let scope = scope(kind, &subscriber.caller);
        let state = subscriber.types.entry(kind).or_default();
        state.wildcard = true;
        let held: Vec<Arc<str>> = state.held.keys().cloned().collect();
        held.iter().for_each(|name| subscriber.mark(kind, name));
        // Wakes the stream also where there is nothing to send.
        subscriber.wake.notify_one();
        let names = self.in_scope(&scope);
        self.wildcards.entry(scope).or_default().insert(id);
        for name in names {
            self.load(kind, &name);
            if let Some(subscriber) = self.subscribers.get_mut(&id) {
                subscriber.mark(kind, &name);
            }
        }
    }

    pub(super) fn unwatch_all(&mut self, id: SubscriberId, kind: ResourceType, caller: &Caller) {
        let scope = scope(kind, caller);
        let Some(watchers) = self.wildcards.get_mut(&scope) else {
            return;
        };
        watchers.remove(&id);
        if watchers.is_empty() {
            self.wildcards.remove(&scope);
            for name in self.in_scope(&scope) {
                self.settle(kind, &name);
            }
        }
    }

    fn in_scope(&self, (kind, node): &Scope) -> Vec<Arc<str>> {
        match node {
            Some(node) => self.model.pods_of(node),
            None => self.model.names(*kind),
        }
    }
}

impl TypeState {
    /// Takes the versions that a client brings from an earlier stream.
    fn resume(&mut self, versions: HashMap<String, String>) -> Result<(), RequestError> {
        if versions.len() > MAX_NAMES {
            return Err(RequestError::TooManyNames);
        }
        for (name, version) in versions {
            let longest = name.len().max(version.len());
            if longest > MAX_NAME_BYTES {
                return Err(RequestError::NameTooLong(longest));
            }
            let held = Held {
                version: Some(version.into()),
                answer: Answer::Accepted,
            };
            self.held.insert(name.into(), held);
        }
        Ok(())
    }
}

fn scope(kind: ResourceType, caller: &Caller) -> Scope {
    (
        kind,
        if placed(kind) {
            caller.node.clone()
        } else {
            None
        },
    )
}

fn limited(text: &str) -> String {
    text.chars().take(256).collect()
}
