//! The identity in a certificate, read strictly.

use turnpike_rules::{Identity, identity::InvalidIdentity};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Why a certificate names no workload.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidSan {
    #[error("the certificate is not well-formed X.509")]
    Malformed,
    #[error("the certificate has no subject alternative name; a workload's has one SPIFFE URI")]
    Missing,
    #[error("the certificate has {0} URI names; a workload's has exactly one")]
    Uris(usize),
    #[error("the certificate has a name of kind {0}; only one URI and DNS names are accepted")]
    Kind(&'static str),
    #[error("the certificate's URI name is no workload identity: {0}")]
    Identity(#[from] InvalidIdentity),
}

/// The workload that a certificate names. The chain must have been verified before.
///
/// Accepted is exactly one URI, in the one canonical form of an [`Identity`], beside any DNS
/// names. Everything else is refused rather than ignored: a second name of another kind is how
/// one certificate comes to mean two things to two readers.
pub fn peer_identity(der: &[u8]) -> Result<Identity, InvalidSan> {
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| InvalidSan::Malformed)?;
    if !rest.is_empty() {
        return Err(InvalidSan::Malformed);
    }
    // Fails where the extension occurs twice.
    let san = certificate
        .subject_alternative_name()
        .map_err(|_| InvalidSan::Malformed)?;
    let names = &san.ok_or(InvalidSan::Missing)?.value.general_names;
    let mut uris = Vec::new();
    for name in names {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            GeneralName::DNSName(_) => {}
            other => return Err(InvalidSan::Kind(kind(other))),
        }
    }
    match uris[..] {
        [uri] => Ok(uri.parse()?),
        _ => Err(InvalidSan::Uris(uris.len())),
    }
}

fn kind(name: &GeneralName<'_>) -> &'static str {
    match name {
        GeneralName::OtherName(..) => "otherName",
        GeneralName::RFC822Name(_) => "rfc822Name",
        GeneralName::DNSName(_) => "dNSName",
        GeneralName::X400Address(_) => "x400Address",
        GeneralName::DirectoryName(_) => "directoryName",
        GeneralName::EDIPartyName(_) => "ediPartyName",
        GeneralName::URI(_) => "uniformResourceIdentifier",
        GeneralName::IPAddress(_) => "iPAddress",
        GeneralName::RegisteredID(_) => "registeredID",
        _ => "unknown",
    }
}
