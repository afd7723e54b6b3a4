//! The agent as a runtime meets it: through the CNI executable, killed and restarted, in a box.
//!
//! Needs root, and `turnpike-cni` built beside `turnpike-node`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ec2;
mod host;
mod interfaces;
mod journal;
mod lives;
mod policy;
mod rig;
mod talk;

use rig::{Pod, Rig};
use turnpike_rules::{Identity, pod::PodNetwork};

const CALM: &str = "";

/// A pod of a namespace that needs no word from the control plane.
fn system_pod(rig: &Rig, id: &str, name: &str) -> Pod {
    rig.pod(id, "kube-system", name)
}

/// What the control plane says of `shop/cart`.
fn network(selected: bool) -> PodNetwork {
    PodNetwork {
        uid: "uid-cart".into(),
        namespace: "shop".into(),
        name: "cart".into(),
        identity: Identity::new("cluster.local", "shop", "cart-account").unwrap(),
        capture: None,
        selected,
        inbound: Vec::new(),
    }
}
