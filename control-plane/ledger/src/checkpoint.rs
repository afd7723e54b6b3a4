//! Signed heads of the chain.
//!
//! What is signed (ECDSA P-256, SHA-256, DER): `"turnpike checkpoint v1\0"`, the node's name and
//! its length as four bytes before it, the sequence as eight, the head's hash, the time as eight.

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use rustls_pki_types::{CertificateDer, UnixTime};
use serde::{Deserialize, Serialize};
use turnpike_certs::{Credentials, TrustBundle, peer_identity, verify_signature};
use turnpike_rules::Identity;
use webpki::{EndEntityCert, KeyUsage};

use crate::chain::Head;

/// How far ahead of the verifier's a signer's clock may be.
const SKEW_MS: i64 = 5 * 60 * 1000;

/// The head of a node's chain at a time, with the node's signature and all that is needed to check
/// it against the mesh's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    pub node: String,
    pub sequence: u64,
    /// The hash at that sequence, in hexadecimal.
    pub head: String,
    pub time_ms: i64,
    /// The signer's certificates in base64 DER, its own first.
    pub certificates: Vec<String>,
    /// In base64.
    pub signature: String,
}

/// Who may sign checkpoints.
#[derive(Clone, Debug)]
pub struct Trust {
    pub roots: TrustBundle,
    pub signer: Identity,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CheckpointError {
    #[error("signing failed: {0}")]
    Signing(String),
    #[error("malformed: {0}")]
    Malformed(&'static str),
    #[error("its time is {0} ms ahead of the verifier's clock")]
    FromTheFuture(i64),
    #[error("its certificate does not lead to a root of the mesh: {0}")]
    Untrusted(String),
    #[error("signed by {0}: it may not sign checkpoints")]
    WrongSigner(String),
    #[error("the signature does not fit its content")]
    Signature,
}

impl Checkpoint {
    /// Vouches for `head` with the node's credentials as they are now.
    pub fn sign(
        credentials: &Credentials,
        node: &str,
        head: &Head,
        time_ms: i64,
    ) -> Result<Self, CheckpointError> {
        let signature = credentials
            .sign(&message(node, head, time_ms))
            .map_err(|error| CheckpointError::Signing(error.to_string()))?;
        Ok(Self {
            node: node.to_owned(),
            sequence: head.sequence,
            head: hex::encode(head.hash),
            time_ms,
            certificates: credentials
                .chain()
                .iter()
                .map(|der| BASE64_STANDARD.encode(der))
                .collect(),
            signature: BASE64_STANDARD.encode(signature),
        })
    }

    /// The head it vouches for.
    pub fn head(&self) -> Result<Head, CheckpointError> {
        let mut hash = [0; 32];
        hex::decode_to_slice(&self.head, &mut hash)
            .map_err(|_| CheckpointError::Malformed("head is not a SHA-256 in hexadecimal"))?;
        Ok(Head {
            sequence: self.sequence,
            hash,
        })
    }

    /// Whether it was signed by whom `trust` allows, with a certificate valid at its own time:
    /// certificates live for a day, records for years.
    pub fn verify(&self, trust: &Trust, now_ms: i64) -> Result<(), CheckpointError> {
        if self.time_ms > now_ms.saturating_add(SKEW_MS) {
            return Err(CheckpointError::FromTheFuture(self.time_ms - now_ms));
        }
        let decode = |text: &String| {
            BASE64_STANDARD
                .decode(text)
                .map(CertificateDer::from)
                .map_err(|_| CheckpointError::Malformed("a certificate is not base64"))
        };
        let certificates = self
            .certificates
            .iter()
            .map(decode)
            .collect::<Result<Vec<_>, _>>()?;
        let (leaf, intermediates) = certificates
            .split_first()
            .ok_or(CheckpointError::Malformed("no certificate"))?;
        let time = u64::try_from(self.time_ms)
            .map_err(|_| CheckpointError::Malformed("its time is before 1970"))?;
        verify_path(
            leaf,
            intermediates,
            &trust.roots,
            Duration::from_millis(time),
        )
        .map_err(|error| CheckpointError::Untrusted(error.to_string()))?;
        let signer =
            peer_identity(leaf).map_err(|error| CheckpointError::WrongSigner(error.to_string()))?;
        if signer != trust.signer {
            return Err(CheckpointError::WrongSigner(signer.to_string()));
        }
        let signature = BASE64_STANDARD
            .decode(&self.signature)
            .map_err(|_| CheckpointError::Malformed("the signature is not base64"))?;
        let message = message(&self.node, &self.head()?, self.time_ms);
        if verify_signature(leaf, &message, &signature) {
            Ok(())
        } else {
            Err(CheckpointError::Signature)
        }
    }
}

fn verify_path(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &TrustBundle,
    time: Duration,
) -> Result<(), webpki::Error> {
    EndEntityCert::try_from(leaf)?
        .verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            roots.anchors(),
            intermediates,
            UnixTime::since_unix_epoch(time),
            KeyUsage::client_auth(),
            None,
            None,
        )
        .map(drop)
}

fn message(node: &str, head: &Head, time_ms: i64) -> Vec<u8> {
    let length = u32::try_from(node.len()).unwrap_or(u32::MAX);
    let mut message = b"turnpike checkpoint v1\0".to_vec();
    message.extend_from_slice(&length.to_be_bytes());
    message.extend_from_slice(node.as_bytes());
    message.extend_from_slice(&head.sequence.to_be_bytes());
    message.extend_from_slice(&head.hash);
    message.extend_from_slice(&time_ms.to_be_bytes());
    message
}
