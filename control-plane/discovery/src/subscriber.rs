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
/// Refusals whose reasons are kept; how many there are is counted beside.
pub(crate) const MAX_REFUSALS: usize = 16;
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
    /// Why it refuses what it refuses now; the newest, at most [`MAX_REFUSALS`].
    pub(crate) refusals: VecDeque<Refusal>,
    next_nonce: u64,
}

#[derive(Debug, Default)]
pub(crate) struct TypeState {
    pub(crate) exact: HashSet<Arc<str>>,
    pub(crate) wildcard: bool,
    /// Marked: to be looked at when the client can take more. Bounded by what it may see.
    pub(crate) dirty: BTreeSet<Arc<str>>,
    /// Parts of refused responses, each to be sent as a response of its own. Bounded by what was
    /// unanswered.
    pub(crate) apart: VecDeque<Vec<Arc<str>>>,
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
    /// In a response of its own: it is not sent again until it changes.
    Refused,
    /// With others, of which one may be to blame: it is sent again with fewer of them.
    RefusedWithOthers,
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
            refusals: VecDeque::new(),
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
        let answer = match &refusal {
            None => Answer::Accepted,
            Some(_) if sent.resources.len() > 1 => Answer::RefusedWithOthers,
            Some(_) => Answer::Refused,
        };
        let mut judged = Vec::new();
        let state = self.types.entry(sent.kind).or_default();
        for (name, version) in sent.resources {
            // A later response about the same name has an answer of its own to come.
            if let Some(held) = state.held.get_mut(&name)
                && held.version == version
            {
                held.answer = answer;
                judged.push(name);
            }
        }
        match refusal {
            None => self.forget_refusals(sent.kind, |name| judged.iter().any(|j| **j == *name)),
            Some(message) if answer == Answer::Refused => {
                for name in judged {
                    self.keep_refusal(sent.kind, &name, &message, at);
                }
            }
            Some(_) => state.split(judged),
        }
        true
    }

    pub(crate) fn forget_refusals(&mut self, kind: ResourceType, gone: impl Fn(&str) -> bool) {
        self.refusals
            .retain(|refusal| refusal.kind != kind || !gone(&refusal.resource));
    }

    fn keep_refusal(&mut self, kind: ResourceType, name: &str, message: &str, at: SystemTime) {
        self.forget_refusals(kind, |other| other == name);
        if self.refusals.len() == MAX_REFUSALS {
            self.refusals.pop_front();
        }
        self.refusals.push_back(Refusal {
            kind,
            resource: name.into(),
            message: message.chars().take(Refusal::CHARACTERS).collect(),
            at,
        });
    }
}

impl TypeState {
    /// Halves what was refused together, so that after a few rounds what is to blame stands alone
    /// and everything else has arrived.
    fn split(&mut self, mut names: Vec<Arc<str>>) {
        let second = names.split_off(names.len() / 2);
        let parts = [names, second].into_iter();
        self.apart.extend(parts.filter(|part| !part.is_empty()));
    }

    /// Whether the client needs to be told. Under a wildcard alone, what it never had and does not
    /// exist is no news.
    pub(crate) fn news(&self, name: &Arc<str>, version: Option<&Arc<str>>) -> bool {
        match self.held.get(name) {
            Some(held) if held.answer == Answer::RefusedWithOthers => true,
            Some(held) => held.version.as_ref() != version,
            None => version.is_some() || self.exact.contains(name),
        }
    }

    /// Whether a name of a part that waits is still to be sent.
    pub(crate) fn due(&self, name: &Arc<str>) -> bool {
        let held = self.held.get(name);
        self.dirty.contains(name)
            || held.is_some_and(|held| held.answer == Answer::RefusedWithOthers)
    }

    /// What was refused by itself travels by itself also when it has changed.
    pub(crate) fn suspect(&self, name: &Arc<str>) -> bool {
        let held = self.held.get(name);
        held.is_some_and(|held| held.answer == Answer::Refused)
    }
}
