//! What can be said of subscribers.

use std::{collections::BTreeMap, time::SystemTime};

use serde::Serialize;

/// How far a set of resources has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Adoption {
    /// Pairs of a resource and a subscriber that watches it.
    pub watched: usize,
    /// Of those: the subscriber accepted the latest version.
    pub accepted: usize,
    /// Of those: the subscriber refused the latest version.
    pub refused: usize,
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
    pub last_refusal: Option<Refusal>,
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

/// A NACK.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    pub kind: String,
    /// The first of them.
    pub resources: Vec<String>,
    pub message: String,
    pub at: SystemTime,
}

impl Refusal {
    pub(crate) const NAMES: usize = 16;
    pub(crate) const CHARACTERS: usize = 1024;
}
