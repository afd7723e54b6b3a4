//! Delta ADS over one shared model: who wants to know what, and telling exactly them.
//!
//! 1. [`Discovery::update`] lets an object change the model, and learns which resources that
//!    touched.
//! 2. Each touched resource that anybody watches is encoded once (`resource`); where its bytes
//!    changed, its key is marked for each of its watchers (`hub`).
//! 3. Each stream (`session`) sends what is marked for it as fast as its client reads. What waits is
//!    a set of keys, never a queue of messages: a slow client gets the latest state when it reads
//!    on, costs no more memory meanwhile, and holds nobody else up.
//! 4. Answers (ACK, NACK) are kept per subscriber, so that a status can say who has what
//!    ([`Discovery::adoption`], [`Discovery::status`]).
//!
//! A client takes or refuses a response whole. Where it refuses one of several resources, each half
//! is sent again by itself, and so on: all that it can read arrives, and what it cannot is known by
//! name, with its reason.
//!
//! A resource is sent when it is subscribed ([`Caller`] says what one may subscribe), again when it
//! changes, and as removed when it does not or no longer exist. A client that reconnects says which
//! versions it holds, and is sent only what differs.

mod caller;
mod hub;
mod resource;
mod session;
mod status;
mod subscriber;

pub use caller::{Caller, Denied, PodRef};
pub use session::Discovery;
pub use status::{Adoption, Counters, Refusal, RefusedBy, SubscriberStatus, TypeStatus};
