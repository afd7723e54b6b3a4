//! The shared state: the model, what of it is watched, and by whom.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::SystemTime,
};

use turnpike_model::{Changes, Model, ResourceType};
use turnpike_wire::{
    discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource},
    names::WILDCARD,
};

use crate::{
    Adoption, Caller, Counters, Denied, SubscriberStatus, TypeStatus,
    resource::{Encoded, ResourceKey, by_type_url, encode, type_url},
    subscriber::{
        Answer, Held, MAX_NAME_BYTES, MAX_NAMES, MAX_UNANSWERED, Subscriber, SubscriberId,
        TypeState,
    },
};

/// A response is closed when it holds this much; gRPC refuses messages far above it.
const RESPONSE_BYTES: usize = 1 << 20;

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

#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) model: Model,
    /// What somebody watches, and nothing else.
    entries: HashMap<ResourceKey, Entry>,
    /// From a Service to the watched names `…@consumer` that it may answer.
    views: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    wildcards: HashMap<Scope, BTreeSet<SubscriberId>>,
    subscribers: BTreeMap<SubscriberId, Subscriber>,
    counters: Counters,
    next_id: SubscriberId,
}

#[derive(Debug, Default)]
struct Entry {
    /// `None`: watched, but not there.
    content: Option<Encoded>,
    /// The node whose agent and gate it is for.
    node: Option<Arc<str>>,
    exact: BTreeSet<SubscriberId>,
}

/// What a wildcard covers: a type, and for pods the node they are on.
type Scope = (ResourceType, Option<Arc<str>>);

impl Hub {
    pub(crate) fn new(model: Model) -> Self {
        Self {
            model,
            entries: HashMap::new(),
            views: HashMap::new(),
            wildcards: HashMap::new(),
            subscribers: BTreeMap::new(),
            counters: Counters::default(),
            next_id: 0,
        }
    }

    pub(crate) fn join(&mut self, caller: Arc<Caller>, now: SystemTime) -> SubscriberId {
        self.next_id += 1;
        self.subscribers
            .insert(self.next_id, Subscriber::new(caller, now));
        self.next_id
    }

    pub(crate) fn leave(&mut self, id: SubscriberId) {
        let Some(subscriber) = self.subscribers.remove(&id) else {
            return;
        };
        for (kind, state) in subscriber.types {
            for name in state.exact {
                self.unwatch(id, kind, &name);
            }
            if state.wildcard {
                self.unwatch_all(id, kind, &subscriber.caller);
            }
        }
    }

    pub(crate) fn subscriber(&self, id: SubscriberId) -> Option<&Subscriber> {
        self.subscribers.get(&id)
    }

    pub(crate) fn subscribers(&self) -> usize {
        self.subscribers.len()
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// Encodes what changed and is watched, and marks it for those who watch it.
    pub(crate) fn publish(&mut self, changes: &Changes) {
        for (kind, name) in changes.iter() {
            self.publish_one(kind, name);
            if kind == ResourceType::Service
                && let Some(views) = self.views.get(name)
            {
                for view in views.clone() {
                    self.publish_one(kind, &view);
                }
            }
        }
    }

    fn publish_one(&mut self, kind: ResourceType, name: &Arc<str>) {
        let node = self.node_of(kind, name);
        let key = (kind, name.clone());
        let before = self.entries.get(&key).and_then(|entry| entry.node.clone());
        let mut watchers = self.covering(kind, node.as_ref());
        watchers.extend(self.covering(kind, before.as_ref()));
        if watchers.is_empty() && !self.entries.contains_key(&key) {
            return;
        }
        let content = self.encode(kind, name);
        let entry = self.entries.entry(key).or_default();
        if entry.content == content && entry.node == node {
            return;
        }
        (entry.content, entry.node) = (content, node);
        watchers.extend(&entry.exact);
        for id in watchers {
            if let Some(subscriber) = self.subscribers.get_mut(&id) {
                subscriber.mark(kind, name);
            }
        }
        self.settle(kind, name);
    }

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

    /// The next response for a subscriber that can take one.
    pub(crate) fn next_response(&mut self, id: SubscriberId) -> Option<DeltaDiscoveryResponse> {
        let subscriber = self.subscribers.get_mut(&id)?;
        if subscriber.unanswered.len() >= MAX_UNANSWERED {
            return None;
        }
        let node = subscriber.caller.node.clone();
        for (kind, state) in &mut subscriber.types {
            let kind = *kind;
            let (mut resources, mut removed, mut sent) = (Vec::new(), Vec::new(), Vec::new());
            let mut bytes = 0;
            while bytes < RESPONSE_BYTES
                && let Some(name) = state.dirty.pop_first()
            {
                let entry = self.entries.get(&(kind, name.clone()));
                let entry = entry.filter(|entry| visible(kind, entry, node.as_ref()));
                let content = entry.and_then(|entry| entry.content.as_ref());
                let version = content.map(|content| content.version.clone());
                if !state.news(&name, version.as_ref()) {
                    continue;
                }
                bytes += name.len() + content.map_or(0, |content| content.bytes.len());
                match content {
                    Some(content) => resources.push(resource(kind, &name, content)),
                    None => removed.push(name.to_string()),
                }
                sent.push((name, version));
            }
            if sent.is_empty() {
                continue;
            }
            self.counters.responses += 1;
            self.counters.resources += sent.len() as u64;
            let nonce = subscriber.sent(kind, sent);
            return Some(DeltaDiscoveryResponse {
                system_version_info: String::new(),
                resources,
                type_url: type_url(kind).to_owned(),
                nonce,
                removed_resources: removed,
            });
        }
        None
    }

    /// How far resources have come with those who watch them.
    pub(crate) fn adoption(&self, of: &Changes) -> Adoption {
        let mut adoption = Adoption::default();
        for (kind, name) in of.iter() {
            self.adopt(kind, name, &mut adoption);
            let views = self
                .views
                .get(name)
                .filter(|_| kind == ResourceType::Service);
            views
                .into_iter()
                .flatten()
                .for_each(|view| self.adopt(kind, view, &mut adoption));
        }
        adoption
    }

    fn adopt(&self, kind: ResourceType, name: &Arc<str>, adoption: &mut Adoption) {
        let Some(entry) = self.entries.get(&(kind, name.clone())) else {
            return;
        };
        let mut watchers = self.covering(kind, entry.node.as_ref());
        watchers.extend(&entry.exact);
        let latest = entry.content.as_ref().map(|content| &content.version);
        for subscriber in watchers.iter().filter_map(|id| self.subscribers.get(id)) {
            adoption.watched += 1;
            let held = subscriber
                .types
                .get(&kind)
                .and_then(|state| state.held.get(name));
            match held
                .filter(|held| held.version.as_ref() == latest)
                .map(|held| held.answer)
            {
                Some(Answer::Accepted) => adoption.accepted += 1,
                Some(Answer::Refused) => adoption.refused += 1,
                Some(Answer::Awaited) | None => {}
            }
        }
    }

    pub(crate) fn status(&self) -> Vec<SubscriberStatus> {
        self.subscribers.values().map(subscriber_status).collect()
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
                let caller = subscriber.caller.clone();
                self.unwatch_all(id, kind, &caller);
            }
        } else if state.exact.remove(name) {
            if !state.wildcard {
                state.held.remove(name);
                state.dirty.remove(name);
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

    fn unwatch(&mut self, id: SubscriberId, kind: ResourceType, name: &str) {
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

    fn unwatch_all(&mut self, id: SubscriberId, kind: ResourceType, caller: &Caller) {
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

    /// Subscribers whose wildcards cover a resource of this type and node.
    fn covering(&self, kind: ResourceType, node: Option<&Arc<str>>) -> BTreeSet<SubscriberId> {
        if placed(kind) && node.is_none() {
            return BTreeSet::new();
        }
        self.wildcards
            .get(&(kind, node.cloned()))
            .cloned()
            .unwrap_or_default()
    }

    fn load(&mut self, kind: ResourceType, name: &Arc<str>) -> &mut Entry {
        let key = (kind, name.clone());
        if !self.entries.contains_key(&key) {
            let content = self.encode(kind, name);
            let node = self.node_of(kind, name);
            self.entries.insert(
                key.clone(),
                Entry {
                    content,
                    node,
                    exact: BTreeSet::new(),
                },
            );
        }
        self.entries.entry(key).or_default()
    }

    /// Forgets a resource that nobody watches any more.
    fn settle(&mut self, kind: ResourceType, name: &Arc<str>) {
        let key = (kind, name.clone());
        let Some(entry) = self.entries.get(&key) else {
            return;
        };
        let covered =
            entry.content.is_some() && !self.covering(kind, entry.node.as_ref()).is_empty();
        if !entry.exact.is_empty() || covered {
            return;
        }
        self.entries.remove(&key);
        if let Some((base, _)) = name.split_once('@')
            && let Some(views) = self.views.get_mut(base)
        {
            views.remove(name);
            if views.is_empty() {
                self.views.remove(base);
            }
        }
    }

    fn encode(&mut self, kind: ResourceType, name: &str) -> Option<Encoded> {
        self.counters.encoded += 1;
        encode(&self.model, kind, name)
    }

    fn node_of(&self, kind: ResourceType, name: &str) -> Option<Arc<str>> {
        if placed(kind) {
            self.model.node_of(name).cloned()
        } else {
            None
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

    /// Whether the client needs to be told. Under a wildcard alone, what it never had and does not
    /// exist is no news.
    fn news(&self, name: &Arc<str>, version: Option<&Arc<str>>) -> bool {
        match self.held.get(name) {
            Some(held) => held.version.as_ref() != version,
            None => version.is_some() || self.exact.contains(name),
        }
    }
}

/// Types whose resources belong to the node of a pod.
fn placed(kind: ResourceType) -> bool {
    matches!(kind, ResourceType::PodNetwork | ResourceType::PodEgress)
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

/// A pod of another node does not exist for this one.
fn visible(kind: ResourceType, entry: &Entry, node: Option<&Arc<str>>) -> bool {
    !placed(kind) || (entry.node.is_some() && entry.node.as_ref() == node)
}

fn resource(kind: ResourceType, name: &str, content: &Encoded) -> Resource {
    Resource {
        version: content.version.to_string(),
        resource: Some(prost_types::Any {
            type_url: type_url(kind).to_owned(),
            value: content.bytes.to_vec(),
        }),
        name: name.to_owned(),
    }
}

fn limited(text: &str) -> String {
    text.chars().take(256).collect()
}

fn subscriber_status(subscriber: &Subscriber) -> SubscriberStatus {
    let types = subscriber.types.iter().map(|(kind, state)| {
        let answered = |answer| {
            state
                .held
                .values()
                .filter(|held| held.answer == answer)
                .count()
        };
        let status = TypeStatus {
            wildcard: state.wildcard,
            subscribed: state.exact.len(),
            accepted: answered(Answer::Accepted),
            refused: answered(Answer::Refused),
            waiting: state.dirty.len(),
        };
        (kind.to_string(), status)
    });
    SubscriberStatus {
        identity: subscriber.caller.identity.to_string(),
        pod: subscriber
            .caller
            .pod
            .as_ref()
            .map(|pod| pod.name.to_string()),
        node: subscriber.caller.node.as_ref().map(ToString::to_string),
        node_id: subscriber.node_id.clone(),
        since: subscriber.since,
        unanswered: subscriber.unanswered.len(),
        types: types.collect(),
        last_refusal: subscriber.last_refusal.clone(),
    }
}
