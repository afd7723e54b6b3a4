//! What can be said of subscribers.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use serde::{Serialize, Serializer};
use turnpike_model::ResourceType;

/// How far a set of resources has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Adoption {
    /// Pairs of a resource and a subscriber that watches it.
    pub watched: usize,
    /// Of those: the subscriber accepted the latest version.
    pub accepted: usize,
    /// Of those: the subscriber refused the latest version.
    pub refused: usize,
    /// Subscribers that watch any of them.
    pub subscribers: usize,
    /// Of those: they accepted the latest version of all of them that they watch.
    pub current: usize,
    /// Who should watch some of them and is not there: `agent of node-a`, `gate of node-a`. What
    /// such a node does is not known.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub absent: BTreeSet<String>,
    /// Who refuses what, and why; the first [`Adoption::SHOWN`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refusals: Vec<RefusedBy>,
}

impl Adoption {
    pub const SHOWN: usize = 8;

    pub(crate) fn note(&mut self, refusal: impl FnOnce() -> RefusedBy) {
        if self.refusals.len() < Self::SHOWN {
            self.refusals.push(refusal());
        }
    }
}

/// One subscriber's refusal of one resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RefusedBy {
    /// For people.
    pub subscriber: String,
    #[serde(serialize_with = "kind")]
    pub kind: ResourceType,
    pub resource: String,
    /// In the subscriber's words; `None` where it refuses so many that they were not kept.
    pub message: Option<String>,
}

/// Since the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    pub responses: u64,
    pub resources: u64,
    pub accepted: u64,
    pub refused: u64,
    /// Subscriptions without the right to them.
    pub denied: u64,
    /// Resources encoded.
    pub encoded: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct SubscriberStatus {
    pub identity: String,
    pub pod: Option<String>,
    pub node: Option<String>,
    /// What it calls itself.
    pub node_id: String,
    pub since: SystemTime,
    /// Responses it has not answered.
    pub unanswered: usize,
    pub types: BTreeMap<String, TypeStatus>,
    /// What it refuses now, the newest few; `types` has how many there are.
    pub refusals: Vec<Refusal>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TypeStatus {
    pub wildcard: bool,
    pub subscribed: usize,
    pub accepted: usize,
    pub refused: usize,
    /// Changed since it was last told.
    pub waiting: usize,
}

/// A NACK of one resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    #[serde(serialize_with = "kind")]
    pub kind: ResourceType,
    pub resource: String,
    pub message: String,
    pub at: SystemTime,
}

impl Refusal {
    pub(crate) const CHARACTERS: usize = 1024;
}

fn kind<S: Serializer>(kind: &ResourceType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(kind)
}
