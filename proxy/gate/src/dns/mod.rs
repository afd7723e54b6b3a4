//! The node's resolver: the one that selected pods can reach.
//!
//! 1. [`server`] takes questions over UDP and TCP, bounded;
//! 2. [`message`] reduces each to a name and a type;
//! 3. [`resolver`] judges it for the pod that asks, has it answered from [`cache`] or, in one of
//!    the [`flights`], from [`upstream`], filters the answer, and writes it into the pod's ledger,
//!    [`names`];
//! 4. and only then is the pod answered.

pub mod cache;
pub mod flights;
pub mod message;
pub mod names;
pub mod resolver;
pub mod server;
pub mod upstream;

pub use resolver::{DnsConfig, Resolver};
