//! One subscriber's side: what it wants, what it has been told, what is marked for it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::SystemTime,
};

use tokio::sync::Notify;
use turnpike_model::ResourceType;

use crate::{Caller, status::Refusal};

pub(crate) type SubscriberId = u64;

/// Responses that may wait for their answer; past that no further one is sent.
pub(crate) const MAX_UNANSWERED: usize = 16;
/// Names that one subscriber may hold, of all types.
pub(crate) const MAX_NAMES: usize = 200_000;
/// The longest name or version that is looked at.
pub(crate) const MAX_NAME_BYTES: usize = 4096;

#[derive(Debug)]
pub(crate) struct Subscriber {
    pub(crate) caller: Arc<Caller>,
    /// What it calls itself; for people.
    pub(crate) node_id: String,
    pub(crate) since: SystemTime,
    pub(crate) types: BTreeMap<ResourceType, TypeState>,
    pub(crate) wake: Arc<Notify>,
    pub(crate) unanswered: VecDeque<Sent>,
    pub(crate) last_refusal: Option<Refusal>,
    next_nonce: u64,
}

#[derive(Debug, Default)]
pub(crate) struct TypeState {
    pub(crate) exact: HashSet<Arc<str>>,
    pub(crate) wildcard: bool,
    /// Marked: to be looked at when the client can take more. Bounded by what it may see.
    pub(crate) dirty: BTreeSet<Arc<str>>,
    pub(crate) held: HashMap<Arc<str>, Held>,
}

/// What the client was last told of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// `None`: that it does not exist.
    pub(crate) version: Option<Arc<str>>,
    pub(crate) answer: Answer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Awaited,
    Accepted,
    Refused,
}

/// A response on its way.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) nonce: String,
    pub(crate) kind: ResourceType,
    pub(crate) resources: Vec<(Arc<str>, Option<Arc<str>>)>,
}

impl Subscriber {
    pub(crate) fn new(caller: Arc<Caller>, since: SystemTime) -> Self {
        Self {
            caller,
            node_id: String::new(),
            since,
            types: BTreeMap::new(),
            wake: Arc::new(Notify::new()),
            unanswered: VecDeque::new(),
            last_refusal: None,
            next_nonce: 0,
        }
    }

    /// Marks a resource; what is marked already is not marked twice.
    pub(crate) fn mark(&mut self, kind: ResourceType, name: &Arc<str>) {
        if self
            .types
            .entry(kind)
            .or_default()
            .dirty
            .insert(name.clone())
        {
            self.wake.notify_one();
        }
    }

    pub(crate) fn names(&self) -> usize {
        self.types
            .values()
            .map(|state| state.exact.len() + state.held.len())
            .sum()
    }

    /// Notes a response as sent, and gives it its nonce.
    pub(crate) fn sent(
        &mut self,
        kind: ResourceType,
        resources: Vec<(Arc<str>, Option<Arc<str>>)>,
    ) -> String {
        let state = self.types.entry(kind).or_default();
        for (name, version) in &resources {
            let held = Held {
                version: version.clone(),
                answer: Answer::Awaited,
            };
            state.held.insert(name.clone(), held);
        }
        self.next_nonce += 1;
        let nonce = self.next_nonce.to_string();
        self.unanswered.push_back(Sent {
            nonce: nonce.clone(),
            kind,
            resources,
        });
        nonce
    }

    /// Takes the client's answer. False where the nonce is not one of ours: it is ignored, as xDS
    /// asks.
    pub(crate) fn answered(
        &mut self,
        nonce: &str,
        refusal: Option<String>,
        at: SystemTime,
    ) -> bool {
        let Some(index) = self.unanswered.iter().position(|sent| sent.nonce == nonce) else {
            return false;
        };
        let Some(sent) = self.unanswered.remove(index) else {
            return false;
        };
        let answer = if refusal.is_some() {
            Answer::Refused
        } else {
            Answer::Accepted
        };
        let state = self.types.entry(sent.kind).or_default();
        for (name, version) in &sent.resources {
            // A later response about the same name has an answer of its own to come.
            if let Some(held) = state.held.get_mut(name)
                && held.version == *version
            {
                held.answer = answer;
            }
        }
        if let Some(message) = refusal {
            let names = sent.resources.iter().take(Refusal::NAMES);
            self.last_refusal = Some(Refusal {
                kind: sent.kind.to_string(),
                resources: names.map(|(name, _)| name.to_string()).collect(),
                message: message.chars().take(Refusal::CHARACTERS).collect(),
                at,
            });
        }
        true
    }
}
