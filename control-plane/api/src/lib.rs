//! The resources that people write: what was typed, and what of it is valid.
//!
//! 1. A source delivers an [`Object`]: one of Kubernetes' own types, a Gateway API route, or one
//!    of the [`kinds`] of `turnpike.dev/v1alpha1`.
//! 2. [`valid`] turns what was typed into the types of `turnpike-rules`, or says which field holds
//!    what that is not allowed, and what is. [`valid::check`] asks the same of any object.
//! 3. The model joins the valid parts; what it finds goes back into [`status`].
//!
//! The CRDs under `charts/turnpike/crds` are generated from the same types: [`crds`].

mod crds;
mod duration;
pub mod kinds;
mod object;
pub mod status;
pub mod valid;

pub use crds::crds;
pub use duration::Duration;
pub use gateway_api::experimental::httproutes::HttpRoute;
pub use kinds::{
    AuthorizationPolicy, ClusterEgressPolicy, EgressPolicy, MeshConfig, PeerAuthentication,
    Telemetry, TrafficPolicy,
};
pub use object::{Kind, Object, ObjectKey, Part};
