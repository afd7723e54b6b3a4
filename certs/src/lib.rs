//! Workload identities as certificates: issuing, holding, verifying and rotating them. No I/O.
//!
//! The life of a credential, in order:
//!
//! 1. [`KeyRequest`] makes a P-256 key that never leaves the process, and the request for it;
//! 2. [`Authority`] signs the request for the identity that its caller has authenticated;
//! 3. [`Credentials`] joins key, chain and the roots to trust, and refuses what does not fit;
//! 4. [`CredentialStore`] holds the current ones and swaps them while connections are made;
//! 5. [`server_config`] and [`client_config`] read that store at each handshake, verify the peer's
//!    chain against every root and its SPIFFE name ([`peer_identity`]) against what is expected;
//! 6. [`renew_at`] says when to begin again.
//!
//! Several roots may be trusted at once ([`TrustBundle`]), which is how a root is replaced without
//! an interruption: distribute both, switch the signer, withdraw the old one.

mod authority;
mod credentials;
mod renewal;
mod request;
mod san;
mod store;
mod tls;
mod verify;

pub use authority::{Authority, AuthorityError, Issued, MAX_CSR_BYTES, SignError};
pub use credentials::{Credentials, InvalidBundle, InvalidCredentials, TrustBundle};
pub use renewal::renew_at;
pub use request::{KeyRequest, RequestError};
pub use san::{InvalidSan, peer_identity};
pub use store::CredentialStore;
pub use tls::{
    ClientAuth, Connector, client_config, controller_client_config, crypto_provider, server_config,
    server_config_with,
};
pub use verify::{PeerRefused, explain, verify_signature};

use std::time::Duration;

/// How long a workload's certificate lives.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// How long a root lives.
pub const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How far clocks may be apart: a certificate is valid this long before it was issued.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);
