//! A whole Turnpike on the VPC in a box: what the demo shows, the tests check and the bench loads.
//!
//! 1. [`World::up`] brings up the VPC, the control plane and two nodes, each program in the
//!    namespace of its instance, and proves that nothing has a way out to the machine's network;
//! 2. [`World::start_pod`] does a kubelet's and a runtime's part: injection, a namespace, the CNI
//!    executable, the sidecar, the workload, the status;
//! 3. [`story`] drives real traffic through it, step by step, and returns [`claims`] with what was
//!    seen; the demo prints them, the tests assert them;
//! 4. dropping the world takes it down; what a killed run left, the next one removes.

pub mod capture;
pub mod claims;
pub mod cluster;
pub mod daemon;
pub mod directory;
pub mod http;
pub mod otlp;
pub mod pods;
pub mod story;
pub mod tokens;
pub mod traces;
pub mod traffic;
pub mod vpc;
pub mod world;

use std::{
    thread,
    time::{Duration, Instant},
};

pub use claims::{Claim, Evidence};
pub use pods::{Pod, Said, Sandbox, Workload};
pub use traces::Traces;
pub use world::{Options, World};

/// Asks again and again until something is there, or `limit` has passed.
pub fn wait_for<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = ask() {
            return Some(found);
        }
        if Instant::now() > deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(25));
    }
}
