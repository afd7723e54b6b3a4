//! The node daemon: the one place where addresses, the cloud, the datapath and policy meet.
//!
//! Start, in [`run()`], in this order: who this machine is; the journal; the node's own rules, before
//! anything else may happen; the pods that outlived the last run; the tombstones that the CNI
//! executable left; then the sockets open. What runs and is not told of by the journal is left as it
//! is, and taken over when the control plane names it ([`stranger`]).
//!
//! 1. [`node`] holds what all share, and is where a pod's network is described;
//! 2. [`cni`] serves the runtime's ADD, DEL, CHECK, STATUS and GC, [`attach`] does them;
//! 3. [`warm`] keeps addresses ready, ahead of the pods, and holds the pool against EC2;
//! 4. [`policy`] keeps what the control plane says of this node's pods, on disk too, and [`apply`]
//!    carries it to pods that run;
//! 5. [`feed`] tells the gate who has which address here, and what the kernel denied ([`denials`]);
//! 6. [`install`] puts the CNI executable and its configuration where the runtime looks for them;
//! 7. [`pages`] shows metrics and the pool.
//!
//! No call to EC2 or to Kubernetes is on the way of an ADD.

pub mod apply;
pub mod attach;
pub mod clock;
pub mod cni;
pub mod config;
pub mod denials;
pub mod feed;
pub mod flight;
pub mod guard;
pub mod identity;
pub mod install;
pub mod metrics;
pub mod node;
pub mod note;
pub mod pages;
pub mod policy;
pub mod restore;
mod run;
pub mod sockets;
pub mod stranger;
pub mod tombstones;
pub mod warm;

pub use run::{RunError, run};
