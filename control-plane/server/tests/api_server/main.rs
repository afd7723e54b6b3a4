//! The real executable against a real kube-apiserver with its etcd, on loopback.
//!
//! Run by `cargo verify kubernetes`; by itself:
//! `cargo test -p turnpike-server --test api_server -- --ignored`. The executables (etcd,
//! kube-apiserver, kubectl, helm) are those of KUBERNETES_BIN, or of the cache folder that
//! `cargo verify kubernetes` builds them into. Needs root, for a hosts file of the API server's own.
#![allow(clippy::unwrap_used, reason = "what fails here ends the test")]

mod apiserver;
#[path = "../common/mod.rs"]
mod common;
mod controller;
mod identity;
mod injection;
mod pki;
mod source;
mod status;
