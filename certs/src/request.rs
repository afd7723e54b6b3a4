//! A key and the request to certify it.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::PrivatePkcs8KeyDer;
use turnpike_rules::Identity;
use zeroize::Zeroize;

use crate::{Credentials, InvalidCredentials, TrustBundle};

/// The key pair or the request could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a key and its certificate request: {0}")]
pub struct RequestError(#[from] rcgen::Error);

/// A new P-256 key with the signing request for it. The key is wiped when this is dropped.
pub struct KeyRequest {
    key: KeyPair,
    csr: String,
}

impl KeyRequest {
    /// Makes a key, and asks for `identity`: the CA compares that with what it has authenticated.
    pub fn new(identity: &Identity) -> Result<Self, RequestError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        let csr = params.serialize_request(&key)?.pem()?;
        Ok(Self { key, csr })
    }

    /// The request as PEM, to be sent to the CA.
    pub fn csr_pem(&self) -> &str {
        &self.csr
    }

    /// Joins the key with the CA's answer (PEM, leaf first, root last).
    pub fn into_credentials<P: AsRef<str>>(
        self,
        chain: &[P],
        roots: TrustBundle,
    ) -> Result<Credentials, InvalidCredentials> {
        let key = PrivatePkcs8KeyDer::from(self.key.serialized_der().to_vec());
        Credentials::from_pem(chain, key.into(), roots)
    }
}

impl std::fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyRequest")
            .field("key", &"<redacted>")
            .field("csr", &self.csr)
            .finish()
    }
}

impl Drop for KeyRequest {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}
