//! The certificate authority: signs what its caller has authenticated.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, pem::PemObject};
use time::OffsetDateTime;
use turnpike_rules::Identity;
use x509_parser::{
    certification_request::X509CertificationRequest,
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY},
    prelude::{FromDer, X509Certificate},
};
use zeroize::Zeroizing;

use crate::{CLOCK_SKEW, InvalidBundle, TrustBundle};

/// A request longer than this is refused unread; a P-256 one has about 500 bytes.
pub const MAX_CSR_BYTES: usize = 16 * 1024;

/// A root of the mesh: its certificate and key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("cannot make a root: {0}")]
    Generate(rcgen::Error),
    #[error("the CA's private key is not usable: {0}")]
    Key(rcgen::Error),
    #[error("the CA's private key is not P-256")]
    NotP256,
    #[error("the CA's certificate: {0}")]
    Certificate(#[from] InvalidBundle),
    #[error("the CA's certificate and its private key do not belong together")]
    KeyMismatch,
}

/// Why a request was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    #[error("the request has {0} bytes; at most {MAX_CSR_BYTES} are read")]
    TooLong(usize),
    #[error("the request is not a PEM certificate signing request: {0}")]
    Malformed(String),
    #[error("the request's signature does not match its key")]
    Signature,
    #[error("the request's key is not ECDSA P-256, the only kind issued for")]
    KeyType,
    #[error("the request asks for `{asked}`, but its sender is {identity}")]
    WrongIdentity {
        asked: String,
        identity: Box<Identity>,
    },
    #[error("the root has expired; replace it before anything can be issued")]
    IssuerExpired,
    #[error("cannot sign: {0}")]
    Sign(rcgen::Error),
}

/// A certificate as it was issued.
#[derive(Clone, Debug)]
pub struct Issued {
    /// PEM, leaf first, root last.
    pub chain: Vec<String>,
    /// In hexadecimal.
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Authority {
    /// Makes a new root.
    pub fn generate(
        trust_domain: &str,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let key =
            KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(AuthorityError::Generate)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, trust_domain);
        // Roots of one mesh are told apart by their names while one replaces another.
        let serial = random_serial();
        let name = format!("Turnpike root {serial}");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial);
        params.not_before = whole_seconds(now - 2 * CLOCK_SKEW);
        params.not_after = whole_seconds(now + lifetime);
        let certificate = params.self_signed(&key).map_err(AuthorityError::Generate)?;
        let pem = Zeroizing::new(key.serialize_pem());
        Self::from_pem(&certificate.pem(), &pem)
    }

    /// Takes up a root that was made before. Of `certificate` the first certificate is kept, and
    /// nothing that stands before or after it: it is handed to everybody.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, AuthorityError> {
        let key = KeyPair::from_pem(key).map_err(AuthorityError::Key)?;
        if !key.is_compatible(&PKCS_ECDSA_P256_SHA256) {
            return Err(AuthorityError::NotP256);
        }
        let certificate = certificate_block(certificate)
            .ok_or_else(|| InvalidBundle::Pem("no CERTIFICATE block is in it".into()))?;
        let der = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|error| InvalidBundle::Pem(error.to_string()))?;
        TrustBundle::new(vec![der.clone()])?;
        let (_, parsed) =
            X509Certificate::from_der(&der).map_err(|_| InvalidBundle::Malformed(0))?;
        if *parsed.public_key().subject_public_key.data != *key.der_bytes() {
            return Err(AuthorityError::KeyMismatch);
        }
        let not_before = parsed.validity().not_before.to_datetime().into();
        let not_after = parsed.validity().not_after.to_datetime().into();
        Ok(Self {
            issuer: Issuer::from_ca_cert_der(&der, key).map_err(AuthorityError::Key)?,
            certificate_pem: certificate.to_owned() + "\n",
            certificate: der.clone(),
            not_before,
            not_after,
        })
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The private key, for storage that only the CA can read. Wiped when dropped.
    pub fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.issuer.key().serialize_pem())
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Signs a workload's request (PEM) for `identity`, which the caller has authenticated.
    ///
    /// The certificate names `identity` alone, whatever else the request holds; a request that
    /// asks for another name is refused. It ends with the root's own life at the latest.
    pub fn sign(
        &self,
        csr: &str,
        identity: &Identity,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, SignError> {
        self.sign_server(csr, identity, &[], lifetime, now)
    }

    /// Like [`Authority::sign`], with DNS names beside the identity: for the control plane's own
    /// servers, which are dialled by name.
    pub fn sign_server(
        &self,
        csr: &str,
        identity: &Identity,
        dns_names: &[&str],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, SignError> {
        let request = verified_request(csr)?;
        check_names(&request, identity, dns_names)?;
        if now >= self.not_after {
            return Err(SignError::IssuerExpired);
        }
        let not_before = whole_seconds((now - CLOCK_SKEW).max(self.not_before));
        let not_after = whole_seconds((now + lifetime).min(self.not_after));
        let serial = random_serial();

        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = subject_names(identity, dns_names)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial.clone());
        params.not_before = not_before;
        params.not_after = not_after;
        let leaf = params
            .signed_by(&request.public_key, &self.issuer)
            .map_err(SignError::Sign)?;
        Ok(Issued {
            chain: vec![leaf.pem(), self.certificate_pem.clone()],
            serial: serial.to_string(),
            not_before: not_before.into(),
            not_after: not_after.into(),
        })
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("certificate", &self.certificate_pem)
            .field("key", &"<redacted>")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The first certificate with its own two markers. What is between them decodes as that one
/// certificate or is refused, so that it can hide nothing.
fn certificate_block(pem: &str) -> Option<&str> {
    const END: &str = "-----END CERTIFICATE-----";
    let whole = &pem[..pem.find(END)? + END.len()];
    Some(&whole[whole.rfind("-----BEGIN CERTIFICATE-----")?..])
}

/// Parses a request and verifies that its sender holds the key.
fn verified_request(csr: &str) -> Result<CertificateSigningRequestParams, SignError> {
    if csr.len() > MAX_CSR_BYTES {
        return Err(SignError::TooLong(csr.len()));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes())
        .map_err(|error| SignError::Malformed(error.to_string()))?;
    let (rest, parsed) = X509CertificationRequest::from_der(&der)
        .map_err(|error| SignError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(SignError::Malformed("bytes after its end".into()));
    }
    let algorithm = &parsed.certification_request_info.subject_pki.algorithm;
    let curve = algorithm
        .parameters
        .as_ref()
        .and_then(|parameters| parameters.as_oid().ok());
    if algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
        return Err(SignError::KeyType);
    }
    CertificateSigningRequestParams::from_der(&der).map_err(|error| match error {
        rcgen::Error::InvalidCertificationRequestSignature => SignError::Signature,
        other => SignError::Malformed(other.to_string()),
    })
}

/// Every name that a request asks for must be among those its sender may have.
fn check_names(
    request: &CertificateSigningRequestParams,
    identity: &Identity,
    dns_names: &[&str],
) -> Result<(), SignError> {
    let uri = identity.to_string();
    for name in &request.params.subject_alt_names {
        let asked = match name {
            SanType::URI(asked) if asked.as_str() == uri => continue,
            SanType::DnsName(asked) if dns_names.contains(&asked.as_str()) => continue,
            SanType::URI(asked) | SanType::DnsName(asked) | SanType::Rfc822Name(asked) => {
                asked.to_string()
            }
            SanType::IpAddress(address) => address.to_string(),
            _ => "a name of another kind".to_owned(),
        };
        return Err(SignError::WrongIdentity {
            asked,
            identity: Box::new(identity.clone()),
        });
    }
    Ok(())
}

fn subject_names(identity: &Identity, dns_names: &[&str]) -> Result<Vec<SanType>, SignError> {
    let uri = identity.to_string().try_into().map_err(SignError::Sign)?;
    let mut names = vec![SanType::URI(uri)];
    for name in dns_names {
        names.push(SanType::DnsName(
            (*name).try_into().map_err(SignError::Sign)?,
        ));
    }
    Ok(names)
}

/// 127 random bits: unique without a record of what was issued, and positive.
fn random_serial() -> SerialNumber {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).expect("the kernel's random source does not fail");
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// X.509 knows no fractions.
fn whole_seconds(time: SystemTime) -> OffsetDateTime {
    let time = OffsetDateTime::from(time);
    time.replace_nanosecond(0).unwrap_or(time)
}
