//! The kinds of `turnpike.dev/v1alpha1`, as they are typed.
//!
//! Every struct refuses unknown fields, so that a misspelt restriction is never taken for none.
//! What CEL can say of a valid object stands here as a rule of its CRD; [`crate::valid`] says all
//! of it, and says more.

#![expect(
    unreachable_pub,
    reason = "KubeSchema repeats each struct inside a function"
)]

mod authorization_policy;
mod egress_policy;
mod mesh_config;
mod peer_authentication;
mod telemetry;
mod traffic_policy;

pub use authorization_policy::*;
pub use egress_policy::*;
pub use mesh_config::*;
pub use peer_authentication::*;
pub use telemetry::*;
pub use traffic_policy::*;
