//! Real handshakes between configurations of this crate, and with peers that break its rules.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::common::*;
use rcgen::SanType;
use rustls::{HandshakeKind, NamedGroup, ProtocolVersion, ServerConfig};
use turnpike_certs::{
    ClientAuth, Connector, CredentialStore, client_config, crypto_provider, peer_identity,
    server_config, server_config_with,
};
use turnpike_rules::Identity;

/// Names a person would look for in the reason.
#[track_caller]
fn assert_refused(met: Result<Met, String>, reason: &str) {
    match met {
        Ok(_) => panic!("must be refused: {reason}"),
        Err(text) => assert!(text.contains(reason), "`{text}` does not say `{reason}`"),
    }
}

#[tokio::test]
async fn both_sides_know_each_other() {
    let root = authority();
    let (web, pay) = (identity("web"), identity("pay"));
    let server = server_config(store(&root, &pay), &[ALPN, "turnpike/tcp"]);
    let client = client_config(store(&root, &web), pay.clone(), ALPN);
    let met = meet(server, client).await.unwrap();

    let (_, server) = met.server.get_ref();
    assert_eq!(
        peer_identity(&server.peer_certificates().unwrap()[0]).unwrap(),
        web
    );
    assert_eq!(server.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(server.alpn_protocol(), Some(ALPN.as_bytes()));
    assert_eq!(
        server.server_name(),
        Some("p80.web.shop.cluster.svc.turnpike")
    );
    let group = server.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519MLKEM768);

    let (_, client) = met.client.get_ref();
    let chain = client.peer_certificates().unwrap();
    assert_eq!(peer_identity(&chain[0]).unwrap(), pay);
    assert_eq!(chain.len(), 1, "the root is not sent");
}

#[tokio::test]
async fn expired_certificates_are_refused() {
    let root = authority_since(Duration::from_secs(7200));
    let roots = bundle(&[&root]);
    let (web, pay) = (identity("web"), identity("pay"));
    let old = |name| CredentialStore::new(expired(&root, name, &roots));

    let server = server_config(store(&root, &pay), &[ALPN]);
    let client = client_config(old(&web), pay.clone(), ALPN);
    assert_refused(meet(server, client).await, "expired");

    let server = server_config(old(&pay), &[ALPN]);
    let client = client_config(store(&root, &web), pay.clone(), ALPN);
    assert_refused(meet(server, client).await, "expired");
}

#[tokio::test]
async fn certificates_of_tomorrow_are_refused_and_small_skew_is_not() {
    let root = authority();
    let roots = bundle(&[&root]);
    let (web, pay) = (identity("web"), identity("pay"));
    let ahead = |by| {
        let at = SystemTime::now() + Duration::from_secs(by);
        CredentialStore::new(issued(&root, &web, &roots, Duration::from_secs(3600), at))
    };
    let server = server_config(store(&root, &pay), &[ALPN]);
    let client = client_config(ahead(290), pay.clone(), ALPN);
    meet(server.clone(), client).await.map(drop).unwrap();
    let client = client_config(ahead(3600), pay, ALPN);
    assert_refused(meet(server, client).await, "not valid yet");
}

#[tokio::test]
async fn a_foreign_root_is_refused() {
    let (ours, theirs) = (authority(), authority());
    let (web, pay) = (identity("web"), identity("pay"));

    let server = server_config(store(&ours, &pay), &[ALPN]);
    let client = client_config(store(&theirs, &web), pay.clone(), ALPN);
    // Each would refuse the other; the client sees the server's certificate first.
    assert_refused(meet(server, client).await, "client: ");

    // A client that believes the server, so that the server alone has to refuse.
    let both = bundle(&[&ours, &theirs]);
    let server = server_config(store(&ours, &pay), &[ALPN]);
    let client = CredentialStore::new(credentials(&theirs, &web, &both));
    let client = client_config(client, pay, ALPN);
    assert_refused(meet(server, client).await, "server: ");
}

#[tokio::test]
async fn another_workload_than_the_one_dialled_is_refused() {
    let root = authority();
    let server = server_config(store(&root, &identity("attacker")), &[ALPN]);
    let client = client_config(store(&root, &identity("web")), identity("pay"), ALPN);
    let met = meet(server, client).await;
    assert_refused(
        met,
        "the peer is spiffe://cluster.local/ns/shop/sa/attacker, expected \
         spiffe://cluster.local/ns/shop/sa/pay",
    );
}

#[tokio::test]
async fn another_trust_domain_is_refused() {
    let root = authority();
    let foreign = Identity::new("other.example", "shop", "web").unwrap();
    let pay = identity("pay");
    let server = server_config(store(&root, &pay), &[ALPN]);
    let client = client_config(store(&root, &foreign), pay, ALPN);
    assert_refused(
        meet(server, client).await,
        "outside the trust domain cluster.local",
    );
}

#[tokio::test]
async fn clients_without_a_certificate_meet_the_mode() {
    let root = authority();
    let pay = identity("pay");
    let anonymous = || turnpike_certs::controller_client_config(&bundle(&[&root]), ALPN);
    // A server that the anonymous client can verify by name.
    let request = turnpike_certs::KeyRequest::new(&pay).unwrap();
    let name = "p80.web.shop.cluster.svc.turnpike";
    let day = turnpike_certs::LEAF_LIFETIME;
    let issued = root
        .sign_server(request.csr_pem(), &pay, &[name], day, SystemTime::now())
        .unwrap();
    let named = request
        .into_credentials(&issued.chain, bundle(&[&root]))
        .unwrap();
    let store = CredentialStore::new(named);

    for auth in [ClientAuth::Optional, ClientAuth::None] {
        let server = server_config_with(store.clone(), &[ALPN], auth);
        let met = meet(server, anonymous()).await.unwrap();
        assert!(
            met.server.get_ref().1.peer_certificates().is_none(),
            "{auth:?}"
        );
    }
    let server = server_config(store.clone(), &[ALPN]);
    assert_refused(meet(server, anonymous()).await, "server: ");

    // Optional does not mean unverified.
    let theirs = authority();
    let both = bundle(&[&root, &theirs]);
    let foreign = CredentialStore::new(credentials(&theirs, &identity("web"), &both));
    let server = server_config_with(store, &[ALPN], ClientAuth::Optional);
    assert_refused(
        meet(server, client_config(foreign, pay, ALPN)).await,
        "server: ",
    );
}

#[tokio::test]
async fn a_certificate_that_names_more_than_one_workload_is_refused() {
    let root = authority();
    let pay = identity("pay");
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let ours = || uri(&pay.to_string());
    let other = uri("spiffe://cluster.local/ns/shop/sa/other");
    let other_name = SanType::OtherName((vec![1, 2, 3, 4], "x".into()));
    let cases = [
        (vec![], "no subject alternative name"),
        (vec![ours(), other], "2 URI names"),
        (vec![ours(), other_name], "otherName"),
        (
            vec![ours(), SanType::Rfc822Name("a@b.c".try_into().unwrap())],
            "rfc822Name",
        ),
        (
            vec![ours(), SanType::IpAddress([10, 0, 0, 1].into())],
            "iPAddress",
        ),
        (
            vec![uri("spiffe://cluster.local/ns/shop/sa/pay\0")],
            "no workload identity",
        ),
        (
            vec![uri("https://cluster.local/ns/shop/sa/pay")],
            "no workload identity",
        ),
        (
            vec![SanType::DnsName("pay.shop".try_into().unwrap())],
            "0 URI names",
        ),
    ];
    for (names, reason) in cases {
        let (chain, key) = leaf_with(&root, names);
        let mut server = ServerConfig::builder_with_provider(crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        server.alpn_protocols = vec![ALPN.into()];
        let client = client_config(store(&root, &identity("web")), pay.clone(), ALPN);
        assert_refused(meet(Arc::new(server), client).await, reason);
    }
    // The rig itself is sound: the same with one good name is accepted.
    let (chain, key) = leaf_with(&root, vec![ours()]);
    let mut server = ServerConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    server.alpn_protocols = vec![ALPN.into()];
    let client = client_config(store(&root, &identity("web")), pay.clone(), ALPN);
    meet(Arc::new(server), client).await.map(drop).unwrap();
}

#[tokio::test]
async fn older_tls_is_refused() {
    let root = authority();
    let server = server_config(store(&root, &identity("pay")), &[ALPN]);
    let client = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS12])
        .with_root_certificates(bundle(&[&root]).root_store())
        .with_no_client_auth();
    assert_refused(meet(server, Arc::new(client)).await, "server: ");
}

#[tokio::test]
async fn sessions_are_never_resumed() {
    let root = authority();
    let pay = identity("pay");
    let server = server_config(store(&root, &pay), &[ALPN]);
    let connector = Connector::new(store(&root, &identity("web")), ALPN);
    for _ in 0..3 {
        let met = meet(server.clone(), connector.config(&pay)).await.unwrap();
        assert_eq!(
            met.client.get_ref().1.handshake_kind(),
            Some(HandshakeKind::Full)
        );
    }
}

#[tokio::test]
async fn an_empty_store_meets_nobody() {
    let root = authority();
    let (web, pay) = (identity("web"), identity("pay"));
    let server = server_config(CredentialStore::empty(), &[ALPN]);
    let client = client_config(store(&root, &web), pay.clone(), ALPN);
    assert_refused(meet(server, client).await, "server: ");
    let server = server_config(store(&root, &pay), &[ALPN]);
    let client = client_config(CredentialStore::empty(), pay, ALPN);
    assert_refused(meet(server, client).await, "no credentials yet");
}

/// A root is replaced under traffic: no handshake fails at any step, with configurations made
/// once at the start.
#[tokio::test]
async fn a_root_is_replaced_without_an_error() {
    let (old, new) = (authority(), authority());
    let (only_old, both, only_new) = (bundle(&[&old]), bundle(&[&old, &new]), bundle(&[&new]));
    let (web, pay) = (identity("web"), identity("pay"));
    let server_store = CredentialStore::new(credentials(&old, &pay, &only_old));
    let client_store = CredentialStore::new(credentials(&old, &web, &only_old));
    let server = server_config(server_store.clone(), &[ALPN]);
    let connector = Connector::new(client_store.clone(), ALPN);
    let stale = credentials(&old, &web, &both);

    let steps: Vec<Box<dyn Fn()>> = vec![
        Box::new(|| {}),
        // Both roots are distributed, to one side and then the other.
        Box::new(|| server_store.replace_roots(both.clone()).unwrap()),
        Box::new(|| client_store.replace_roots(both.clone()).unwrap()),
        // The signer switches.
        Box::new(|| server_store.replace(credentials(&new, &pay, &both))),
        Box::new(|| client_store.replace(credentials(&new, &web, &both))),
        // The old root is withdrawn.
        Box::new(|| server_store.replace_roots(only_new.clone()).unwrap()),
        Box::new(|| client_store.replace_roots(only_new.clone()).unwrap()),
    ];
    for (index, step) in steps.iter().enumerate() {
        step();
        for _ in 0..3 {
            let met = meet(server.clone(), connector.config(&pay)).await;
            met.map(drop)
                .unwrap_or_else(|error| panic!("step {index}: {error}"));
        }
    }
    // And then the old root is worth nothing.
    let client = client_config(CredentialStore::new(stale), pay.clone(), ALPN);
    assert_refused(meet(server, client).await, "not issued by a trusted root");
}

#[test]
fn roots_that_do_not_cover_the_own_chain_are_refused() {
    let (old, new) = (authority(), authority());
    let store = store(&old, &identity("web"));
    let error = store.replace_roots(bundle(&[&new])).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("does not lead to a trusted root"),
        "{error}"
    );
    assert_eq!(store.load().unwrap().roots(), &bundle(&[&old]));
}

/// A root that is older than it says.
fn authority_since(age: Duration) -> turnpike_certs::Authority {
    let then = SystemTime::now() - age;
    let lifetime = Duration::from_secs(24 * 3600);
    turnpike_certs::Authority::generate("cluster.local", lifetime, then).unwrap()
}
