//! The proxy beside a pod: what leaves it and what comes in, authenticated, routed and on record.
//!
//! The flow of a connection:
//!
//! 1. [`capture`] accepts what the node turned to ports 15001 and 15006 and asks the kernel where
//!    it was going;
//! 2. [`outbound`] asks the [`mesh`] what stands there, finds the protocol, and hands over to
//!    [`http`] (request by request: route, policy, endpoint, try, retry) or [`tcp`] (bytes);
//! 3. [`inbound`] terminates mesh TLS, verifies who calls and whether they may, and forwards to
//!    the application;
//! 4. [`observe`] is told what happened.
//!
//! Workers ([`worker`]) are threads with a runtime, connections and pools of their own; what all
//! of them must agree on (budgets, circuit limits, ejected endpoints) is shared atomics
//! ([`shared`]). The control side ([`control`], [`telemetry`], [`admin`]) runs on a thread of its
//! own and reaches the workers only through [`mesh`] and [`observe`].

pub mod admin;
pub mod capture;
pub mod config;
pub mod control;
pub mod cores;
pub mod mesh;
pub mod observe;
pub mod telemetry;

mod balance;
mod circuit;
mod clock;
mod data_plane;
mod drain;
mod endpoint;
mod error;
mod http;
mod inbound;
mod io;
mod limits;
mod outbound;
mod outlier;
mod pool;
mod retry;
mod service;
mod shared;
mod tcp;
mod tls;
mod worker;

pub use data_plane::{DataPlane, StartError, WorkerEnded};
