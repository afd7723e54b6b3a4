//! Where the control plane's objects come from, and what becomes of a pod on its way in.
//!
//! 1. A [`Source`] delivers events: an object applied or deleted, a document refused, everything
//!    known so far delivered. [`directory::DirectorySource`] reads a folder of YAML; the
//!    Kubernetes API will be another source of the same events.
//! 2. [`inject`] puts the sidecar into a pod: a pure function, asked by whoever creates pods from
//!    a folder now, and by the admission webhook.

pub mod directory;
pub mod inject;
mod source;

pub use source::{Event, Rejection, Source};
