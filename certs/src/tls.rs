//! The mesh's TLS: 1.3 only, both sides authenticated, credentials read at each handshake.
//!
//! Sessions are never resumed: a resumed handshake shows no certificate, so it would outlive a
//! certificate's end, a withdrawn root and the check of the peer's identity. Connections are
//! pooled, which saves more handshakes than resumption would.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use parking_lot::RwLock;
use rustls::{
    ClientConfig, ServerConfig, SignatureScheme,
    client::{ResolvesClientCert, Resumption},
    crypto::{CryptoProvider, aws_lc_rs as provider},
    server::{ClientHello, NoClientAuth, NoServerSessionStorage, ResolvesServerCert},
    sign::CertifiedKey,
    version::TLS13,
};
use turnpike_rules::Identity;

use crate::{CredentialStore, TrustBundle, verify::PeerVerifier};

/// Whether a server wants its clients' certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientAuth {
    /// The mesh's rule.
    Required,
    /// Verified when there is one.
    Optional,
    /// For services that authenticate their callers in another way, as the controller does.
    None,
}

/// aws-lc-rs with the post-quantum hybrid first and AES-128 before the costlier AES-256.
pub fn crypto_provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER
        .get_or_init(|| {
            Arc::new(CryptoProvider {
                cipher_suites: vec![
                    provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
                    provider::cipher_suite::TLS13_AES_256_GCM_SHA384,
                    provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
                ],
                kx_groups: vec![
                    provider::kx_group::X25519MLKEM768,
                    provider::kx_group::X25519,
                    provider::kx_group::SECP256R1,
                ],
                ..provider::default_provider()
            })
        })
        .clone()
}

/// For a server of the mesh: clients must show a certificate of our trust domain.
pub fn server_config(store: Arc<CredentialStore>, alpns: &[&str]) -> Arc<ServerConfig> {
    server_config_with(store, alpns, ClientAuth::Required)
}

/// A server's configuration. Made once: credentials and roots are read from `store` at each
/// handshake.
pub fn server_config_with(
    store: Arc<CredentialStore>,
    alpns: &[&str],
    client_auth: ClientAuth,
) -> Arc<ServerConfig> {
    let clients = |mandatory| Arc::new(PeerVerifier::clients(store.clone(), mandatory));
    let builder = ServerConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3 suites");
    let builder = match client_auth {
        ClientAuth::Required => builder.with_client_cert_verifier(clients(true)),
        ClientAuth::Optional => builder.with_client_cert_verifier(clients(false)),
        ClientAuth::None => builder.with_client_cert_verifier(Arc::new(NoClientAuth)),
    };
    let mut config = builder.with_cert_resolver(Arc::new(FromStore(store)));
    config.alpn_protocols = protocols(alpns);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// For a client of the mesh that dials the workload `expected`. Making one is cheap but not free;
/// [`Connector`] keeps them.
pub fn client_config(
    store: Arc<CredentialStore>,
    expected: Identity,
    alpn: &str,
) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3 suites")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PeerVerifier::server(store.clone(), expected)))
        .with_client_cert_resolver(Arc::new(FromStore(store)));
    config.alpn_protocols = protocols(&[alpn]);
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

/// For a client that has no certificate yet and knows its server by DNS name: the way to the
/// controller and its CA.
pub fn controller_client_config(roots: &TrustBundle, alpn: &str) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3 suites")
        .with_root_certificates(roots.root_store())
        .with_no_client_auth();
    config.alpn_protocols = protocols(&[alpn]);
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

/// Client configurations by expected identity, made on first use.
///
/// They need no renewal: each reads the store at each handshake. At most [`Connector::LIMIT`] are
/// kept; past that all are dropped and made again as they are asked for.
#[derive(Debug)]
pub struct Connector {
    store: Arc<CredentialStore>,
    alpn: &'static str,
    configs: RwLock<HashMap<Identity, Arc<ClientConfig>>>,
}

impl Connector {
    /// The most configurations kept.
    pub const LIMIT: usize = 4096;

    pub fn new(store: Arc<CredentialStore>, alpn: &'static str) -> Self {
        Self {
            store,
            alpn,
            configs: RwLock::default(),
        }
    }

    /// The configuration to dial `expected` with.
    pub fn config(&self, expected: &Identity) -> Arc<ClientConfig> {
        if let Some(config) = self.configs.read().get(expected) {
            return config.clone();
        }
        let config = client_config(self.store.clone(), expected.clone(), self.alpn);
        let mut configs = self.configs.write();
        if configs.len() >= Self::LIMIT {
            configs.clear();
        }
        configs.entry(expected.clone()).or_insert(config).clone()
    }
}

#[derive(Debug)]
struct FromStore(Arc<CredentialStore>);

impl ResolvesServerCert for FromStore {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load().map(|credentials| credentials.certified())
    }
}

impl ResolvesClientCert for FromStore {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.load().map(|credentials| credentials.certified())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn protocols(alpns: &[&str]) -> Vec<Vec<u8>> {
    alpns.iter().map(|alpn| alpn.as_bytes().to_vec()).collect()
}
