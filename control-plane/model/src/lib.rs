//! One model of mesh and policy: pure and incremental.
//!
//! 1. [`Model::apply`] and [`Model::delete`] take one object of Kubernetes, Gateway API or
//!    Turnpike. What matters of it becomes a fact (`facts`); an object whose facts are as before
//!    changes nothing.
//! 2. Facts are kept with indexes in both directions (`store`), so that a change finds what depends
//!    on it without walking the mesh (`update`), and answers with [`Changes`]: the names of the
//!    resources it touched.
//! 3. A resource is put together from the facts when it is asked for by name (`view`). Only
//!    endpoints are kept ready, in shards that depend on nothing but the set of endpoints
//!    (`shards`).
//!
//! The state depends on the objects present alone, never on the order in which they came.
//! [`Model::statuses`] says of each policy whether it took effect, and why not.

mod changes;
mod facts;
mod index;
mod key;
mod model;
mod names;
mod protocol;
mod selector;
mod shards;
mod status;
mod store;
mod update;
mod view;

pub use changes::{Changes, ResourceType};
pub use model::{Model, Settings};
pub use status::{Condition, ConditionKind, ObjectStatus};
