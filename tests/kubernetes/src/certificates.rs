//! The cluster's certificates and kubeconfigs, made anew for each cluster.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Result;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

/// A certificate authority of the cluster, with its certificate on disk.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key in PEM.
#[derive(Debug)]
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

/// Whom a certificate names: the user and the group that Kubernetes reads of it.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub user: &'a str,
    pub group: Option<&'a str>,
}

impl Authority {
    pub fn new(name: &str) -> Result<Self> {
        let mut params = parameters(Subject {
            user: name,
            group: None,
        });
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            pem,
        })
    }

    pub fn pem(&self) -> &str {
        &self.pem
    }

    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    pub fn client(&self, subject: Subject<'_>) -> Result<Pair> {
        self.issue(subject, &[], &[], ExtendedKeyUsagePurpose::ClientAuth)
    }

    pub fn server(
        &self,
        subject: Subject<'_>,
        names: &[&str],
        addresses: &[IpAddr],
    ) -> Result<Pair> {
        self.issue(
            subject,
            names,
            addresses,
            ExtendedKeyUsagePurpose::ServerAuth,
        )
    }

    fn issue(
        &self,
        subject: Subject<'_>,
        names: &[&str],
        addresses: &[IpAddr],
        usage: ExtendedKeyUsagePurpose,
    ) -> Result<Pair> {
        let mut params = parameters(subject);
        for name in names {
            params
                .subject_alt_names
                .push(SanType::DnsName((*name).try_into()?));
        }
        params
            .subject_alt_names
            .extend(addresses.iter().copied().map(SanType::IpAddress));
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Pair {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }
}

fn parameters(subject: Subject<'_>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, subject.user);
    if let Some(group) = subject.group {
        params
            .distinguished_name
            .push(DnType::OrganizationName, group);
    }
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - Duration::DAY, now + Duration::days(30));
    params
}

/// A kubeconfig that holds everything it needs.
pub fn kubeconfig(server: &str, authority: &Authority, user: &Pair) -> String {
    let encoded = |text: &str| BASE64_STANDARD.encode(text);
    serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "box",
        "clusters": [{"name": "box", "cluster": {
            "server": server, "certificate-authority-data": encoded(authority.pem()),
        }}],
        "users": [{"name": "box", "user": {
            "client-certificate-data": encoded(&user.certificate), "client-key-data": encoded(&user.key),
        }}],
        "contexts": [{"name": "box", "context": {"cluster": "box", "user": "box"}}],
    })
    .to_string()
}

/// Writes a file that only root reads.
pub fn secret(path: &Path, text: &str) -> Result<()> {
    let _ = fs::remove_file(path);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    Ok(std::io::Write::write_all(&mut file, text.as_bytes())?)
}

/// Writes `NAME.crt` and `NAME.key` into a folder.
pub fn write_pair(folder: &Path, name: &str, pair: &Pair) -> Result<(PathBuf, PathBuf)> {
    let (certificate, key) = (
        folder.join(format!("{name}.crt")),
        folder.join(format!("{name}.key")),
    );
    fs::write(&certificate, &pair.certificate)?;
    secret(&key, &pair.key)?;
    Ok((certificate, key))
}
