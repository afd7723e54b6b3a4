//! The control side against a real controller over TLS: what is asked, waited for, kept, forgotten.

#![expect(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

mod admin;
#[path = "../../../../control-plane/wire/tests/wire/controller.rs"]
mod controller;
mod export;
mod process;
mod rig;
mod store;
