//! The CA: Istio's certificate service in front of the mesh's root.
//!
//! 1. [`root`] loads the root from the state directory, [`secret`] from a Secret; either makes it
//!    at the first start.
//! 2. [`service`] answers requests: the identity comes from the caller's token, never from the
//!    request; [`limit`] holds each caller to a rate.
//! 3. [`journal`] records what is issued, on disk before the answer leaves.
//! 4. [`own`] keeps the controller's own server certificate fresh.

mod journal;
mod limit;
mod own;
mod root;
mod secret;
mod service;

pub use journal::{Journal, JournalError};
pub use own::{DNS_NAME, OwnCertificate, OwnError};
pub use root::{RootError, StateDir, publish};
pub use secret::{RootSecret, SecretError};
pub use service::CertificateService;
