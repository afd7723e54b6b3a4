//! Who is calling: a bearer token becomes a [`Caller`], or the call goes no further.

mod jwt;
mod layer;
mod review;

use std::time::SystemTime;

use turnpike_discovery::Caller;

pub use jwt::{JwtAuthenticator, JwtConfig};
pub use layer::AuthenticateLayer;
pub use review::ReviewAuthenticator;

/// Turns a token into its bearer: by the issuer's keys from a file, or by asking the API server.
#[tonic::async_trait]
pub trait Authenticator: Send + Sync + 'static {
    async fn authenticate(&self, token: &str, now: SystemTime) -> Result<Caller, AuthError>;
}

/// Why a token is not accepted. The texts go to the caller and to the log; none holds the token.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AuthError {
    #[error("there is no bearer token; send `authorization: Bearer TOKEN`")]
    Missing,
    #[error("the token is not a well-formed JWT: {0}")]
    Malformed(String),
    #[error("the token is signed with key `{0}`, which is none of the issuer's")]
    UnknownKey(String),
    #[error("the token's signature is wrong")]
    Signature,
    #[error("the token has expired; a fresh one is in the projected volume")]
    Expired,
    #[error("the token is not valid yet; are the clocks right?")]
    NotYet,
    #[error("the token is not from `{0}`")]
    Issuer(String),
    #[error("the token is not meant for `{0}`; set that audience on the projected volume")]
    Audience(String),
    #[error("the token does not describe a service account: {0}")]
    Claims(String),
    /// With the API server's words.
    #[error(
        "the API server does not accept the token: {0}; it is of this cluster's pods that run, by \
         the projected volume"
    )]
    Refused(String),
    /// The caller may be right; we cannot tell.
    #[error("tokens cannot be verified now: {0}")]
    Unavailable(String),
}

impl AuthError {
    /// For the metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed(_) => "malformed",
            Self::UnknownKey(_) => "unknown_key",
            Self::Signature => "signature",
            Self::Expired => "expired",
            Self::NotYet => "not_yet_valid",
            Self::Issuer(_) => "issuer",
            Self::Audience(_) => "audience",
            Self::Claims(_) => "claims",
            Self::Refused(_) => "refused",
            Self::Unavailable(_) => "unavailable",
        }
    }

    pub(crate) fn status(&self) -> tonic::Status {
        match self {
            Self::Unavailable(_) => tonic::Status::unavailable(self.to_string()),
            _ => tonic::Status::unauthenticated(self.to_string()),
        }
    }
}
