//! Where the control plane's objects come from, and what becomes of a pod on its way in.
//!
//! 1. A [`Source`] delivers events: an object applied or deleted, a document refused, everything
//!    known so far delivered. [`directory::DirectorySource`] reads a folder of YAML,
//!    [`cluster::ClusterSource`] the Kubernetes API. What is valid is the same for both.
//! 2. [`inject`] puts the sidecar into a pod: a pure function, asked by whoever creates pods from
//!    a folder, and by the admission webhook.
//! 3. [`status`] says on each object what became of it, [`keep`] keeps in the API what pods and the
//!    API server need to trust the controller, [`notices`] tells pods that run outside of the mesh.
//! 4. What does not work, and what to grant or mend, is in [`Impairments`].

pub mod cluster;
pub mod directory;
mod impairments;
pub mod inject;
pub mod keep;
pub mod notices;
mod path;
mod reading;
mod source;
pub mod status;

pub use impairments::Impairments;
pub use source::{Event, Impairment, Place, Rejection, Source};
