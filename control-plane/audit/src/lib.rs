//! The central egress record: takes every node's chain, and answers who reached what.
//!
//! 1. [`receive`] takes uploads over mTLS from gates alone;
//! 2. each batch is verified against the chain so far before [`store`] commits it, and only then
//!    acknowledged;
//! 3. [`query`] reads the record for people and for the CLI; [`pages`] serves it.
//!
//! A store of SQLite is local: one process writes, any may read.

pub mod app;
pub mod pages;
pub mod query;
pub mod receive;
pub mod store;

pub use query::{Found, Query};
pub use store::{Store, StoreError};
