//! Where the control plane's objects come from, and what becomes of a pod on its way in.
//!
//! 1. A [`Source`] delivers events: an object applied or deleted, a document refused, everything
//!    known so far delivered. [`directory::DirectorySource`] reads a folder of YAML,
//!    [`cluster::ClusterSource`] the Kubernetes API. What is valid is the same for both.
//! 2. [`inject`] puts the sidecar into a pod: a pure function, asked by whoever creates pods from
//!    a folder, and by the admission webhook.

pub mod cluster;
pub mod directory;
mod impairments;
pub mod inject;
pub mod keep;
mod path;
mod reading;
mod source;
pub mod status;

pub use impairments::Impairments;
pub use source::{Event, Impairment, Place, Rejection, Source};
