//! A mesh's certificates, made the way a mesh makes them.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use turnpike_certs::{
    Authority, CredentialStore, Credentials, KeyRequest, LEAF_LIFETIME, ROOT_LIFETIME, TrustBundle,
    explain,
};
use turnpike_rules::Identity;

pub(crate) const ALPN: &str = "turnpike/h2";

pub(crate) fn identity(service_account: &str) -> Identity {
    Identity::new("cluster.local", "shop", service_account).unwrap()
}

pub(crate) fn authority() -> Authority {
    Authority::generate("cluster.local", ROOT_LIFETIME, SystemTime::now()).unwrap()
}

pub(crate) fn bundle(authorities: &[&Authority]) -> TrustBundle {
    TrustBundle::new(
        authorities
            .iter()
            .map(|a| a.certificate().clone())
            .collect(),
    )
    .unwrap()
}

pub(crate) fn credentials(
    authority: &Authority,
    name: &Identity,
    roots: &TrustBundle,
) -> Credentials {
    issued(authority, name, roots, LEAF_LIFETIME, SystemTime::now())
}

pub(crate) fn issued(
    authority: &Authority,
    name: &Identity,
    roots: &TrustBundle,
    lifetime: Duration,
    at: SystemTime,
) -> Credentials {
    let request = KeyRequest::new(name).unwrap();
    let issued = authority
        .sign(request.csr_pem(), name, lifetime, at)
        .unwrap();
    request
        .into_credentials(&issued.chain, roots.clone())
        .unwrap()
}

/// Credentials that ended a second ago.
pub(crate) fn expired(authority: &Authority, name: &Identity, roots: &TrustBundle) -> Credentials {
    let hour = Duration::from_secs(3600);
    let issued_at = SystemTime::now() - hour;
    // The root must have been valid then.
    issued(
        authority,
        name,
        roots,
        hour - Duration::from_secs(1),
        issued_at,
    )
}

pub(crate) fn store(authority: &Authority, name: &Identity) -> Arc<CredentialStore> {
    CredentialStore::new(credentials(authority, name, &bundle(&[authority])))
}

/// A leaf with any names, signed by the mesh's own root.
pub(crate) fn leaf_with(
    authority: &Authority,
    names: Vec<SanType>,
) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let issuer_key = KeyPair::from_pem(&authority.key_pem()).unwrap();
    let issuer = Issuer::from_ca_cert_der(authority.certificate(), issuer_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    params.not_before = SystemTime::now().into();
    params.not_after = (SystemTime::now() + Duration::from_secs(3600)).into();
    let leaf = params.signed_by(&key, &issuer).unwrap();
    (vec![leaf.der().clone()], key.into())
}

pub(crate) struct Met {
    pub(crate) server: server::TlsStream<tokio::io::DuplexStream>,
    pub(crate) client: client::TlsStream<tokio::io::DuplexStream>,
}

/// A handshake, and one byte each way: in TLS 1.3 a client learns only then that it was refused.
pub(crate) async fn meet(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
) -> Result<Met, String> {
    let (near, far) = duplex(64 * 1024);
    let name = ServerName::try_from("p80.web.shop.cluster.svc.turnpike").unwrap();
    let serve = async {
        let mut stream = TlsAcceptor::from(server)
            .accept(far)
            .await
            .map_err(|e| format!("server: {}", explain(&e)))?;
        stream
            .read_u8()
            .await
            .map_err(|e| format!("server read: {}", explain(&e)))?;
        stream
            .write_u8(2)
            .await
            .map_err(|e| format!("server write: {}", explain(&e)))?;
        stream
            .flush()
            .await
            .map_err(|e| format!("server flush: {}", explain(&e)))?;
        Ok(stream)
    };
    let dial = async {
        let mut stream = TlsConnector::from(client)
            .connect(name, near)
            .await
            .map_err(|e| format!("client: {}", explain(&e)))?;
        stream
            .write_u8(1)
            .await
            .map_err(|e| format!("client write: {}", explain(&e)))?;
        stream
            .flush()
            .await
            .map_err(|e| format!("client flush: {}", explain(&e)))?;
        stream
            .read_u8()
            .await
            .map_err(|e| format!("client read: {}", explain(&e)))?;
        Ok(stream)
    };
    // Both run to their end, so that each side's reason is known.
    match tokio::join!(serve, dial) {
        (Ok(server), Ok(client)) => Ok(Met { server, client }),
        (server, client) => {
            let reasons: Vec<String> = [server.err(), client.err()].into_iter().flatten().collect();
            Err(reasons.join("; "))
        }
    }
}
