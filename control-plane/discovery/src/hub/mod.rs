//! The shared state: the model, what of it is watched, and by whom.

mod report;
mod requests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map},
    sync::Arc,
    time::SystemTime,
};

use turnpike_model::{Changes, Model, ResourceType};
use turnpike_rules::Identity;
use turnpike_wire::discovery::{DeltaDiscoveryResponse, Resource};

use crate::{
    Caller, Counters,
    resource::{Encoded, ResourceKey, encode, type_url},
    subscriber::{MAX_UNANSWERED, Subscriber, SubscriberId, TypeState},
};
pub(crate) use requests::RequestError;

/// Streams at once; a further one is told to come again.
const MAX_STREAMS: usize = 20_000;
/// Streams of one pod at once. It needs one; while connections break, those that the server does
/// not yet know to be dead count too.
const MAX_STREAMS_OF_ONE: usize = 16;

/// A response is closed when it holds this much; gRPC refuses messages far above it.
const RESPONSE_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) model: Model,
    /// What somebody watches, and nothing else.
    entries: HashMap<ResourceKey, Entry>,
    /// From a Service to the watched names `…@consumer` that it may answer.
    views: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    wildcards: HashMap<Scope, BTreeSet<SubscriberId>>,
    subscribers: BTreeMap<SubscriberId, Subscriber>,
    /// How many streams each caller has; none without any.
    streams: HashMap<Whose, usize>,
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

/// Who a stream counts for: the pod, or where the token is bound to none the service account.
type Whose = (Identity, Option<Arc<str>>);

/// Why a stream is not opened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Full {
    #[error("this controller serves {MAX_STREAMS} streams already; come again later")]
    All,
    #[error("{0} has {MAX_STREAMS_OF_ONE} streams open already; close one of them first")]
    One(String),
}

impl Hub {
    pub(crate) fn new(model: Model) -> Self {
        Self {
            model,
            entries: HashMap::new(),
            views: HashMap::new(),
            wildcards: HashMap::new(),
            subscribers: BTreeMap::new(),
            streams: HashMap::new(),
            counters: Counters::default(),
            next_id: 0,
        }
    }

    pub(crate) fn join(
        &mut self,
        caller: Arc<Caller>,
        now: SystemTime,
    ) -> Result<SubscriberId, Full> {
        if self.subscribers.len() >= MAX_STREAMS {
            return Err(Full::All);
        }
        let whose = whose(&caller);
        let open = self.streams.get(&whose).copied().unwrap_or_default();
        if open >= MAX_STREAMS_OF_ONE {
            let (identity, pod) = whose;
            return Err(Full::One(match pod {
                Some(pod) => format!("pod {pod} of {identity}"),
                None => identity.to_string(),
            }));
        }
        self.streams.insert(whose, open + 1);
        self.next_id += 1;
        self.subscribers
            .insert(self.next_id, Subscriber::new(caller, now));
        Ok(self.next_id)
    }

    pub(crate) fn leave(&mut self, id: SubscriberId) {
        let Some(subscriber) = self.subscribers.remove(&id) else {
            return;
        };
        if let hash_map::Entry::Occupied(mut open) = self.streams.entry(whose(&subscriber.caller)) {
            *open.get_mut() -= 1;
            if *open.get() == 0 {
                open.remove();
            }
        }
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

    /// The next response for a subscriber that can take one.
    pub(crate) fn next_response(&mut self, id: SubscriberId) -> Option<DeltaDiscoveryResponse> {
        let subscriber = self.subscribers.get_mut(&id)?;
        if subscriber.unanswered.len() >= MAX_UNANSWERED {
            return None;
        }
        let node = subscriber.caller.node.clone();
        for (kind, state) in &mut subscriber.types {
            let kind = *kind;
            let mut batch = Batch::new(kind, &self.entries, node.as_ref());
            batch.fill(state);
            let Batch {
                resources,
                removed,
                sent,
                ..
            } = batch;
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

/// What goes into one response.
struct Batch<'a> {
    kind: ResourceType,
    entries: &'a HashMap<ResourceKey, Entry>,
    node: Option<&'a Arc<str>>,
    resources: Vec<Resource>,
    removed: Vec<String>,
    sent: Vec<(Arc<str>, Option<Arc<str>>)>,
    bytes: usize,
}

impl<'a> Batch<'a> {
    fn new(
        kind: ResourceType,
        entries: &'a HashMap<ResourceKey, Entry>,
        node: Option<&'a Arc<str>>,
    ) -> Self {
        Self {
            kind,
            entries,
            node,
            resources: Vec::new(),
            removed: Vec::new(),
            sent: Vec::new(),
            bytes: 0,
        }
    }

    /// Takes a part of what was refused together, or else all that is marked and has room.
    ///
    /// A client takes or refuses a response whole, so one resource that it cannot read must not
    /// keep the others from it: not those it was sent with, and not those it is sent with when it
    /// has changed. What a client refused is not remembered beyond its stream, since the next one
    /// may be a newer program's; it then costs some rounds again.
    fn fill(&mut self, state: &mut TypeState) {
        while let Some(part) = state.apart.pop_front() {
            for name in part {
                if state.due(&name) {
                    state.dirty.remove(&name);
                    self.add(state, name);
                }
            }
            if !self.sent.is_empty() {
                return;
            }
        }
        while self.bytes < RESPONSE_BYTES
            && let Some(name) = state.dirty.first().cloned()
        {
            let alone = state.suspect(&name);
            if alone && !self.sent.is_empty() {
                return;
            }
            state.dirty.remove(&name);
            self.add(state, name);
            if alone && !self.sent.is_empty() {
                return;
            }
        }
    }

    /// As it is now, if that is news to the client.
    fn add(&mut self, state: &TypeState, name: Arc<str>) {
        let entry = self.entries.get(&(self.kind, name.clone()));
        let entry = entry.filter(|entry| visible(self.kind, entry, self.node));
        let content = entry.and_then(|entry| entry.content.as_ref());
        let version = content.map(|content| content.version.clone());
        if !state.news(&name, version.as_ref()) {
            return;
        }
        self.bytes += name.len() + content.map_or(0, |content| content.bytes.len());
        match content {
            Some(content) => self.resources.push(resource(self.kind, &name, content)),
            None => self.removed.push(name.to_string()),
        }
        self.sent.push((name, version));
    }
}

fn whose(caller: &Caller) -> Whose {
    let pod = caller.pod.as_ref().map(|pod| pod.uid.clone());
    (caller.identity.clone(), pod)
}

/// Types whose resources belong to the node of a pod.
fn placed(kind: ResourceType) -> bool {
    matches!(kind, ResourceType::PodNetwork | ResourceType::PodEgress)
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
