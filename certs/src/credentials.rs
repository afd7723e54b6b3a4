//! A workload's chain and key with the roots it trusts.

use std::{fmt, sync::Arc, time::SystemTime};

use rustls::{SignatureScheme, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor, UnixTime, pem::PemObject};
use turnpike_rules::Identity;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroize;

use crate::{InvalidSan, PeerRefused, peer_identity, verify};

/// The roots whose certificates are accepted: one, or several while a root is replaced.
#[derive(Clone)]
pub struct TrustBundle {
    certificates: Arc<[CertificateDer<'static>]>,
    anchors: Arc<[TrustAnchor<'static>]>,
}

/// Why a PEM file is no bundle of roots.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidBundle {
    #[error("the root bundle is not PEM: {0}")]
    Pem(String),
    #[error("the root bundle has no certificate; at least one root is needed")]
    Empty,
    #[error("certificate {0} of the root bundle is not well-formed X.509")]
    Malformed(usize),
    #[error("certificate {0} of the root bundle is not a CA certificate")]
    NotCa(usize),
}

impl TrustBundle {
    /// Reads one or more PEM certificates. One that cannot be a root refuses the whole bundle.
    pub fn from_pem(pem: &[u8]) -> Result<Self, InvalidBundle> {
        let certificates = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| InvalidBundle::Pem(error.to_string()))?;
        Self::new(certificates)
    }

    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, InvalidBundle> {
        if certificates.is_empty() {
            return Err(InvalidBundle::Empty);
        }
        let anchors = certificates
            .iter()
            .enumerate()
            .map(anchor)
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            certificates: certificates.into(),
            anchors: anchors.into(),
        })
    }

    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    pub fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }

    /// For rustls's own verifier, which checks DNS names.
    pub fn root_store(&self) -> rustls::RootCertStore {
        rustls::RootCertStore {
            roots: self.anchors.to_vec(),
        }
    }
}

impl PartialEq for TrustBundle {
    fn eq(&self, other: &Self) -> bool {
        self.certificates == other.certificates
    }
}

impl Eq for TrustBundle {}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustBundle({} roots)", self.certificates.len())
    }
}

fn anchor(
    (index, der): (usize, &CertificateDer<'static>),
) -> Result<TrustAnchor<'static>, InvalidBundle> {
    let malformed = InvalidBundle::Malformed(index);
    let Ok((_, parsed)) = X509Certificate::from_der(der) else {
        return Err(malformed);
    };
    if !parsed.is_ca() {
        return Err(InvalidBundle::NotCa(index));
    }
    let anchor = webpki::anchor_from_trusted_cert(der).map_err(|_| malformed)?;
    Ok(anchor.to_owned())
}

/// What a workload proves its identity with, and whom it believes.
///
/// The key is held by the TLS library alone; nothing here can print or copy it.
#[derive(Clone)]
pub struct Credentials {
    certified: Arc<CertifiedKey>,
    roots: TrustBundle,
    identity: Identity,
    not_before: SystemTime,
    not_after: SystemTime,
    serial: String,
}

/// Why chain, key and roots do not make credentials.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCredentials {
    #[error("the certificate chain is empty")]
    EmptyChain,
    #[error("certificate {0} of the chain is not PEM: {1}")]
    Pem(usize, String),
    #[error("the certificate is not well-formed X.509")]
    Malformed,
    #[error(transparent)]
    San(#[from] InvalidSan),
    #[error("the private key cannot be used: {0}")]
    Key(rustls::Error),
    #[error("the certificate was not issued for this private key")]
    KeyMismatch,
    #[error("the certificate does not lead to a trusted root; are the roots up to date? {0}")]
    Untrusted(#[from] PeerRefused),
}

impl Credentials {
    /// From PEM certificates, each text holding one or more, leaf first.
    pub fn from_pem<P: AsRef<str>>(
        chain: &[P],
        key: PrivateKeyDer<'static>,
        roots: TrustBundle,
    ) -> Result<Self, InvalidCredentials> {
        let mut certificates = Vec::new();
        for (index, pem) in chain.iter().enumerate() {
            for certificate in CertificateDer::pem_slice_iter(pem.as_ref().as_bytes()) {
                let error =
                    |e: rustls_pki_types::pem::Error| InvalidCredentials::Pem(index, e.to_string());
                certificates.push(certificate.map_err(error)?);
            }
        }
        Self::new(certificates, key, roots)
    }

    /// Checks that the key is the leaf's, that the leaf names one workload, and that it leads to
    /// one of `roots`. Whether it is valid *now* is each peer's to decide at each handshake.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        mut key: PrivateKeyDer<'static>,
        roots: TrustBundle,
    ) -> Result<Self, InvalidCredentials> {
        let signing = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key);
        key.zeroize();
        let signing = signing.map_err(InvalidCredentials::Key)?;

        let leaf = chain.first().ok_or(InvalidCredentials::EmptyChain)?.clone();
        let identity = peer_identity(&leaf)?;
        let (_, parsed) =
            X509Certificate::from_der(&leaf).map_err(|_| InvalidCredentials::Malformed)?;
        let not_before = system_time(parsed.validity().not_before.timestamp());
        let not_after = system_time(parsed.validity().not_after.timestamp());
        let serial = parsed.raw_serial_as_string();

        // An issuer never outlives what it issues, so the last second is when all of it holds.
        let at = UnixTime::since_unix_epoch(unix(not_after));
        verify::chain(
            &leaf,
            &chain[1..],
            &roots,
            webpki::KeyUsage::client_auth(),
            at,
        )?;

        let certified = CertifiedKey::new(without_root(chain, &roots), signing);
        certified
            .keys_match()
            .map_err(|_| InvalidCredentials::KeyMismatch)?;
        let certified = Arc::new(certified);
        Ok(Self {
            certified,
            roots,
            identity,
            not_before,
            not_after,
            serial,
        })
    }

    /// The same key and chain under other roots, for a rotation between two renewals. Refused
    /// where the chain would no longer lead to a root.
    pub fn with_roots(&self, roots: TrustBundle) -> Result<Self, InvalidCredentials> {
        let (leaf, rest) = self
            .certified
            .cert
            .split_first()
            .ok_or(InvalidCredentials::EmptyChain)?;
        let at = UnixTime::since_unix_epoch(unix(self.not_after));
        verify::chain(leaf, rest, &roots, webpki::KeyUsage::client_auth(), at)?;
        Ok(Self {
            roots,
            ..self.clone()
        })
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What is sent to a peer: the leaf, then intermediates, without the root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    pub fn roots(&self) -> &TrustBundle {
        &self.roots
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The leaf's serial number, in hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    pub fn expired(&self, now: SystemTime) -> bool {
        now >= self.not_after
    }

    /// Signs with ECDSA P-256 over SHA-256 (ASN.1 form). [`crate::verify_signature`] checks it.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let scheme = [SignatureScheme::ECDSA_NISTP256_SHA256];
        let signer = self.certified.key.choose_scheme(&scheme);
        signer
            .ok_or_else(|| rustls::Error::General("the key is not P-256".into()))?
            .sign(message)
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            certified,
            roots,
            identity,
            not_before,
            not_after,
            serial,
        } = self;
        f.debug_struct("Credentials")
            .field("identity", &identity.to_string())
            .field("key", &"<redacted>")
            .field("chain", &certified.cert.len())
            .field("roots", roots)
            .field("serial", serial)
            .field("not_before", not_before)
            .field("not_after", not_after)
            .finish()
    }
}

/// A peer has the root or does not believe in it: sending it costs bytes in each handshake.
fn without_root(
    mut chain: Vec<CertificateDer<'static>>,
    roots: &TrustBundle,
) -> Vec<CertificateDer<'static>> {
    while chain.len() > 1
        && chain
            .last()
            .is_some_and(|last| roots.certificates().contains(last))
    {
        chain.pop();
    }
    chain
}

fn system_time(seconds: i64) -> SystemTime {
    let magnitude = std::time::Duration::from_secs(seconds.unsigned_abs());
    let epoch = SystemTime::UNIX_EPOCH;
    if seconds < 0 {
        epoch - magnitude
    } else {
        epoch + magnitude
    }
}

fn unix(time: SystemTime) -> std::time::Duration {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}
