//! Links, routes, rules and nftables of a node: plans built whole, applied, undone in reverse.
//!
//! The process that uses this crate runs in the node's network namespace; pods' namespaces are
//! given by path. What is to be is plain data ([`plan`]); [`Datapath`] makes it so:
//!
//! 1. [`Datapath::open`] lays the node's own part: sysctls, policy rules, ENIs, and the static
//!    ruleset. It is the same call for a fresh node and for a restarted agent: rules are replaced in
//!    one transaction, set elements of living pods are kept.
//! 2. [`Datapath::adopt`] takes over each pod that outlived the agent, [`Datapath::set_members`]
//!    says which addresses are the cluster, [`Datapath::settle`] then drops what nobody claimed.
//! 3. [`Datapath::apply`] gives a pod its network: the veth pair, down; anti-spoof and denial on the
//!    host's side and capture on the pod's; then addresses, routes and neighbours; at last the pod's
//!    end comes up. The first packet meets all of it. A failure undoes it in reverse.
//! 4. [`Datapath::update`] changes a running pod's policy, [`Datapath::check`] compares what is with
//!    what should be, [`Datapath::remove`] takes it away by what was recorded.
//!
//! Beside it, [`Denials`] reads which packets the rules refused, [`Datapath::counts`] the counters,
//! and [`Watch`] sees when somebody else changes the rules.
//!
//! # Routes without a rule per pod
//!
//! Two `ip rule`s a pod would be walked by every packet of the node. Instead all pods' routes stand
//! in one table of their own, asked first (preference 512), and packets *from* a pod on a secondary
//! ENI get that ENI's mark from a map by source address, so that the rules at 1536 are as many as
//! ENIs.
//!
//! # What nft costs
//!
//! Rules are written by the `nft` executable, and its start costs far more than a few rules do. So the
//! node's are one transaction at a time, and what arrives while it runs shares the next one: many
//! ADDs at once start few processes. Capture cannot share, since it is written in the pod's namespace:
//! one process for each pod that has a sidecar, and most of what its ADD takes.

mod capture;
mod counts;
mod datapath;
mod denials;
mod error;
mod host;
mod links;
mod mac;
pub mod marks;
mod netlink;
mod netns;
mod nft;
mod node;
pub mod plan;
mod pod;
mod ruleset;
mod sysctl;
mod watch;
mod worker;

pub use counts::{Count, Counts, Refusals};
pub use datapath::Datapath;
pub use denials::{Cause, Denials, Denied};
pub use error::{ApplyError, Error, RemoveError};
pub use mac::{InvalidMac, Mac};
pub use plan::{
    Applied, Eni, Found, NodePlan, PodKey, PodPlan, PodPolicy, PrimaryEni, Removal, Snat,
};
pub use watch::{Meddling, Watch};
