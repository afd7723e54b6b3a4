//! What mesh and egress policy mean, as pure functions over plain data.
//!
//! The control plane compiles resources into the types of this crate; the sidecar, the gate,
//! `explain` and the ledger's replay all ask the same functions for the verdict, so that there is
//! one truth. Nothing here does I/O, reads a clock or allocates per decision without need.
//!
//! The flow of a request through the crate:
//!
//! 1. [`path`] and [`host`] bring what arrived into one normal form, or refuse it;
//! 2. [`route`] finds the rule and the weighted backends for that form;
//! 3. [`authz`] says whether this peer may make this request;
//! 4. [`traffic`] holds the limits, retries and timeouts under which it is forwarded.
//!
//! The flow of a connection that tries to leave: [`egress`] judges the name asked of DNS, then the
//! destination, the name claimed by the client and, for plaintext HTTP, each request.
//!
//! [`service`], [`workload`] and [`pod`] are the resources that carry all of it to the data plane.

pub mod address;
pub mod authz;
pub mod egress;
pub mod host;
pub mod identity;
pub mod path;
pub mod pod;
pub mod route;
pub mod service;
pub mod traffic;
pub mod workload;

pub use identity::Identity;
pub use service::ServiceKey;
