//! The controller: discovery and the CA for one cluster, composed.
//!
//! 1. [`Controller::start`] takes up the state directory and its root ([`ca`]), makes a server
//!    certificate from it, and binds its ports.
//! 2. The source's objects flow through [`feed`] into the model behind discovery. Until the first
//!    round is complete nothing is served, so that nobody is told that what exists does not.
//! 3. gRPC over TLS serves discovery and the CA; [`auth`] stands in front of both.
//! 4. [`pages`] shows metrics, health and what was rejected.
//! 5. In a cluster it also answers the injection webhook ([`webhook`]) and keeps in the API what
//!    pods need to trust it (`cluster`), and says on each policy what became of it (`status`).
//! 6. [`Controller::run`] ends when it is told to: streams are closed with a reason, calls in
//!    flight are finished.
//!
//! Nothing but the root and the record of issued certificates outlives the process: the rest is
//! built anew from the source.

pub mod auth;
pub mod ca;
mod cluster;
mod config;
mod controller;
pub mod feed;
mod metrics;
pub mod pages;
mod status;
mod text;
pub mod webhook;

pub use config::{Args, InvalidArgs, SourceKind, TokensKind};
pub use controller::Controller;
pub use metrics::Metrics;
