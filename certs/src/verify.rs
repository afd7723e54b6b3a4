//! Whether a peer is who it must be.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use turnpike_rules::Identity;
use webpki::{EndEntityCert, KeyUsage};

use crate::{CredentialStore, InvalidSan, TrustBundle, crypto_provider, peer_identity};

/// Why a peer's certificate was refused.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PeerRefused {
    #[error("this process has no credentials yet, so it trusts nobody")]
    NotReady,
    #[error("the certificate has expired")]
    Expired,
    #[error("the certificate is not valid yet; do the clocks agree?")]
    NotYetValid,
    #[error("the certificate was not issued by a trusted root")]
    UnknownIssuer,
    #[error("the certificate chain is not acceptable: {0}")]
    Chain(webpki::Error),
    #[error("{0}")]
    Name(Arc<InvalidSan>),
    #[error("the peer is {found}, expected {expected}")]
    WrongIdentity {
        expected: Box<Identity>,
        found: Box<Identity>,
    },
    #[error("the peer is {found}, outside the trust domain {expected}")]
    WrongTrustDomain {
        expected: String,
        found: Box<Identity>,
    },
}

impl From<PeerRefused> for rustls::Error {
    fn from(refused: PeerRefused) -> Self {
        // The alert that the peer sees follows from the variant.
        let error = match refused {
            PeerRefused::Expired => CertificateError::Expired,
            PeerRefused::NotYetValid => CertificateError::NotValidYet,
            PeerRefused::UnknownIssuer => CertificateError::UnknownIssuer,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        };
        error.into()
    }
}

/// Why a handshake failed, in words: rustls shows what is not its own only in debug form.
///
/// `error` may be a [`rustls::Error`] or the I/O error that carries one.
pub fn explain(error: &(dyn std::error::Error + 'static)) -> String {
    let inner = error
        .downcast_ref::<std::io::Error>()
        .and_then(|error| error.get_ref());
    let tls = match inner {
        Some(inner) => inner.downcast_ref::<rustls::Error>(),
        None => error.downcast_ref::<rustls::Error>(),
    };
    match tls {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => {
            other.0.to_string()
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::Expired)) => {
            PeerRefused::Expired.to_string()
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::NotValidYet)) => {
            PeerRefused::NotYetValid.to_string()
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            PeerRefused::UnknownIssuer.to_string()
        }
        _ => error.to_string(),
    }
}

/// Checks that `certificate`'s key signed `message` (ECDSA P-256, SHA-256, ASN.1 form). Says
/// nothing about whether the certificate is to be believed.
pub fn verify_signature(certificate: &[u8], message: &[u8], signature: &[u8]) -> bool {
    let der = CertificateDer::from(certificate);
    EndEntityCert::try_from(&der).is_ok_and(|leaf| {
        leaf.verify_signature(webpki::aws_lc_rs::ECDSA_P256_SHA256, message, signature)
            .is_ok()
    })
}

/// Verifies a chain up to one of the roots.
pub(crate) fn chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &TrustBundle,
    usage: KeyUsage,
    now: UnixTime,
) -> Result<(), PeerRefused> {
    let algorithms = signature_algorithms().all;
    EndEntityCert::try_from(leaf)
        .and_then(|leaf| {
            leaf.verify_for_usage(
                algorithms,
                roots.anchors(),
                intermediates,
                now,
                usage,
                None,
                None,
            )
            .map(|_| ())
        })
        .map_err(|error| match error {
            webpki::Error::CertExpired { .. } => PeerRefused::Expired,
            webpki::Error::CertNotValidYet { .. } => PeerRefused::NotYetValid,
            webpki::Error::UnknownIssuer => PeerRefused::UnknownIssuer,
            other => PeerRefused::Chain(other),
        })
}

/// Verifies a peer against the store's roots as they are at that moment.
#[derive(Debug)]
pub(crate) struct PeerVerifier {
    store: Arc<CredentialStore>,
    expected: Expected,
    mandatory: bool,
}

#[derive(Debug)]
enum Expected {
    /// The peer that was dialled.
    Identity(Identity),
    /// Anybody of our own trust domain; authorization decides on the rest.
    Ours,
}

impl PeerVerifier {
    pub(crate) fn server(store: Arc<CredentialStore>, expected: Identity) -> Self {
        Self {
            store,
            expected: Expected::Identity(expected),
            mandatory: true,
        }
    }

    pub(crate) fn clients(store: Arc<CredentialStore>, mandatory: bool) -> Self {
        Self {
            store,
            expected: Expected::Ours,
            mandatory,
        }
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: KeyUsage,
        now: UnixTime,
    ) -> Result<(), PeerRefused> {
        let own = self.store.load().ok_or(PeerRefused::NotReady)?;
        chain(leaf, intermediates, own.roots(), usage, now)?;
        let found = peer_identity(leaf).map_err(|error| PeerRefused::Name(Arc::new(error)))?;
        match &self.expected {
            Expected::Identity(expected) if *expected != found => {
                let expected = Box::new(expected.clone());
                Err(PeerRefused::WrongIdentity {
                    expected,
                    found: Box::new(found),
                })
            }
            Expected::Ours if own.identity().trust_domain() != found.trust_domain() => {
                let expected = own.identity().trust_domain().to_owned();
                Err(PeerRefused::WrongTrustDomain {
                    expected,
                    found: Box::new(found),
                })
            }
            _ => Ok(()),
        }
    }
}

/// What both of rustls's traits ask for: TLS 1.3's signatures, by our provider's algorithms.
macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General(
                "the mesh speaks TLS 1.3 only".into(),
            ))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &signature_algorithms())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            signature_algorithms().supported_schemes()
        }
    };
}

impl ServerCertVerifier for PeerVerifier {
    /// `server_name` is the mesh's SNI, a hint for routing; the identity is what counts.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, KeyUsage::server_auth(), now)?;
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

impl ClientCertVerifier for PeerVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    /// None: roots change while the configuration lives, and a client has one certificate anyway.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, KeyUsage::client_auth(), now)?;
        Ok(ClientCertVerified::assertion())
    }

    tls13_signatures!();
}

fn signature_algorithms() -> WebPkiSupportedAlgorithms {
    crypto_provider().signature_verification_algorithms
}
