//! The test root and the servers' certificates. Keys are made at start and never written.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use time::{Duration, OffsetDateTime};

use super::Error;
use crate::spec::{Host, Role, Spec};

/// The root that clients in the box trust.
pub(crate) struct Root {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root").finish_non_exhaustive()
    }
}

impl Root {
    pub(crate) fn generate() -> Result<Self, Error> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "Turnpike box test root");
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = validity();
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            certificate,
            issuer: Issuer::new(params, key),
        })
    }

    pub(crate) fn pem(&self) -> String {
        self.certificate.pem()
    }
}

/// A TLS configuration for each host's addresses, and one for all others that nobody trusts.
#[derive(Debug)]
pub(super) struct Certificates {
    by_address: BTreeMap<IpAddr, Arc<ServerConfig>>,
    other: Arc<ServerConfig>,
}

impl Certificates {
    pub(super) fn new(root: &Root, spec: &Spec) -> Result<Self, Error> {
        let mut by_address = BTreeMap::new();
        for host in spec.hosts() {
            let config = Arc::new(config(&names(host), root)?);
            by_address.insert(IpAddr::V4(host.v4), Arc::clone(&config));
            by_address.extend(host.v6.map(|v6| (IpAddr::V6(v6), config)));
        }
        let stranger = Root::generate()?;
        let other = Arc::new(config(&["unknown.invalid".into()], &stranger)?);
        Ok(Self { by_address, other })
    }

    /// By the address that was reached, whatever name was asked for.
    pub(super) fn of(&self, address: IpAddr) -> Arc<ServerConfig> {
        Arc::clone(self.by_address.get(&address).unwrap_or(&self.other))
    }
}

fn names(host: &Host) -> Vec<String> {
    let own = std::iter::once(host.name.clone()).chain(host.aliases.keys().cloned());
    let below = (host.role == Role::Attacker).then(|| format!("*.{}", host.name));
    own.chain(below).collect()
}

fn config(names: &[String], root: &Root) -> Result<ServerConfig, Error> {
    let mut params = CertificateParams::new(names)?;
    if let Some(name) = names.first() {
        params
            .distinguished_name
            .push(DnType::CommonName, name.as_str());
    }
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    (params.not_before, params.not_after) = validity();
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &root.issuer)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn validity() -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now - Duration::DAY, now + Duration::days(30))
}
