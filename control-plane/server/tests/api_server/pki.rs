//! Keys and certificates of one API server.

use std::{fs, net::Ipv4Addr, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};

/// Who signs, and the key of service-account tokens.
pub(crate) struct Pki {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) certificate: String,
    pub(crate) account_key: KeyPair,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let key = key();
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "kubernetes-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let certificate = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            certificate,
            account_key: self::key(),
        }
    }

    /// What kube-apiserver reads, and an administrator's certificate and key.
    pub(crate) fn write(&self, folder: &Path, host: Ipv4Addr) -> (String, String) {
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        write("ca.crt", &self.certificate);
        let mut server = CertificateParams::new(["kubernetes.default.svc".to_owned()]).unwrap();
        server
            .subject_alt_names
            .push(SanType::IpAddress(host.into()));
        server
            .distinguished_name
            .push(DnType::CommonName, "kube-apiserver");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let (certificate, key) = self.signed(server);
        write("apiserver.crt", &certificate);
        write("apiserver.key", &key);
        write("sa.key", &self.account_key.serialize_pem());
        write("sa.pub", &public_pem(&self.account_key));

        let mut admin = CertificateParams::default();
        admin.distinguished_name.push(DnType::CommonName, "admin");
        admin
            .distinguished_name
            .push(DnType::OrganizationName, "system:masters");
        admin.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.signed(admin)
    }

    fn signed(&self, params: CertificateParams) -> (String, String) {
        let key = key();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

fn public_pem(key: &KeyPair) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let body = STANDARD.encode(key.subject_public_key_info());
    format!("-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n")
}
