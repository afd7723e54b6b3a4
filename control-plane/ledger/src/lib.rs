//! The egress record: what is written down, how it is chained, and how it is verified. Pure.
//!
//! 1. [`record`]: what happened becomes one canonical line of JSON;
//! 2. [`chain`]: each line is hashed with its sequence and the hash before it, so that none can be
//!    changed, left out or moved without every later hash changing too;
//! 3. [`checkpoint`]: the gate signs the head of its chain with the node's mesh identity from time
//!    to time, so that the later hashes cannot be computed anew by whoever holds the store;
//! 4. [`verify`]: reads a chain from its beginning and reports every gap, change, reorder,
//!    truncation and bad signature.
//!
//! One chain per node, begun once and continued across restarts. Sequences start at 1.

pub mod chain;
pub mod checkpoint;
pub mod record;
pub mod verify;

pub use chain::{Chain, Entry, Hash, Head};
pub use checkpoint::{Checkpoint, Trust};
pub use record::{Event, Record};
pub use verify::{Problem, Report, Verifier, verify};
