//! The node's egress gate: the one door out of the pods that an egress policy selects.
//!
//! The node's rules deny such a pod everything outside the cluster and turn its TCP connections and
//! DNS questions to the gate. It reads hostile bytes, so it has no cloud credentials, no root, and
//! of capabilities only CAP_NET_RAW.
//!
//! 1. [`listen`] binds, [`privileges`] gives up what binding needed, [`app`] puts the rest together.
//! 2. [`control`] (the controller) and [`feed`] (the node's agent) tell [`state`] who has which
//!    address and what it may reach. Unknown is refused; at the start it is waited for, within bounds.
//! 3. [`dns`] answers pods within their rules, and remembers for each pod which name led where.
//! 4. [`door`] takes their connections, reads the name they claim, holds it to rules and DNS
//!    ledger, dials with the pod's own address, and cuts what is no longer allowed.
//! 5. [`spool`] has every connection on disk before its first byte leaves; [`upload`] carries the
//!    record to the central one.
//! 6. [`pages`] shows metrics and health; [`parts`] knows when one of all these has ended, and then
//!    the gate ends, to be started anew.

pub mod app;
pub mod bucket;
pub mod control;
mod describe;
pub mod dns;
pub mod door;
pub mod feed;
pub mod listen;
pub mod metrics;
pub mod pages;
pub mod parts;
pub mod privileges;
pub mod spool;
pub mod state;
pub mod upload;
