//! The data plane with real sockets, real TLS and real HTTP on loopback.
//!
//! A caller's sidecar and a callee's stand for two pods. Nothing redirects here, so each listener
//! is told the one destination it stands for; an endpoint of the mesh is the callee's inbound
//! listener.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends with what it did not expect"
)]

mod apps;
mod bounds;
mod early;
mod faults;
mod http;
mod identity;
mod limits;
mod names;
mod policy;
mod retries;
mod reuse;
mod smuggling;
mod tcp;
mod world;
