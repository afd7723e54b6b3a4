//! Which address goes to whom on one node: pure decisions, durable intents.
//!
//! An address's way through the crate:
//!
//! 1. [`Pool::plan`] compares what is allocatable with the [`Targets`] and says what to ask of EC2;
//!    the [`Intent`] is on disk before the call that it announces;
//! 2. [`Store::lease`] gives a free address to an [`Attachment`] and returns when that is durable;
//!    many that wait share one commit;
//! 3. [`Store::release`] puts it into cooldown, again durably, and the plan may give it back;
//! 4. [`Store::reconcile`] holds the pool against EC2 (authoritative for what is assigned) and the
//!    kernel (authoritative for what a pod uses), and repairs the pool.
//!
//! All state is a fold over [`Record`]s, so a restart is a replay of the [`journal`]. Nothing here
//! reads a clock or calls the cloud: timed functions take `now`, see [`Moment`].

mod fold;
pub mod journal;
mod model;
mod plan;
mod pool;
mod reconcile;
mod record;
mod store;

pub use model::{
    Attachment, Config, Counts, Eni, EniId, Holder, Lease, Limits, Moment, PodRef, Targets,
};
pub use plan::{Action, Intent, IntentId};
pub use pool::{Full, Pool};
pub use reconcile::{EniView, Finding, Live, Outcome, View};
pub use record::{Record, Tail, decode, encode};
pub use store::{NotRecorded, Recording, Released, Store};
