//! Requests for certificates, and the tokens they come with.

use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};
use tonic::{Code, Status};
use turnpike_certs::{KeyRequest, peer_identity};
use turnpike_rig::{
    World,
    tokens::{Issuer, Subject, claims},
    world::{CONTROL, CONTROLLER_NAME},
};
use turnpike_rules::Identity;
use turnpike_wire::{
    ca::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
    channel::Controller,
};

use super::{served, world};

/// An hour, as a kubelet asks for.
const LIFETIME: std::time::Duration = std::time::Duration::from_secs(3600);

fn identity(namespace: &str, account: &str) -> Identity {
    Identity::new("cluster.local", namespace, account).unwrap()
}

/// The claims of the client's own token.
fn good(world: &World) -> Value {
    let uid = world.pod("shop", "client").unwrap().uid();
    let subject = Subject {
        namespace: "shop",
        service_account: "client",
        pod: Some(("client", uid)),
        node: Some("node-b"),
    };
    claims(&subject, LIFETIME)
}

/// Asks the CA as the client's pod would.
fn ask(world: &World, token: &str, csr: &str) -> Result<Vec<String>, Status> {
    let token_file = world.folder.join("bad.token");
    std::fs::write(&token_file, token).unwrap();
    let controller = Controller {
        address: format!("{CONTROL}:15012"),
        server_name: CONTROLLER_NAME.into(),
        root_file: world.folder.join("root.pem"),
        token_file,
    };
    let request = IstioCertificateRequest {
        csr: csr.into(),
        validity_duration: 0,
        metadata: None,
    };
    let asked = async {
        let request = controller.request(request).await.unwrap();
        let channel = controller.connect().await.unwrap();
        let mut client = IstioCertificateServiceClient::new(channel);
        let answer = client.create_certificate(request).await;
        answer.map(|answer| answer.into_inner().cert_chain)
    };
    let node = &world.node("node-b").unwrap().namespace;
    let in_namespace = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap().block_on(asked)
    };
    node.run(in_namespace).unwrap()
}

fn csr(identity: &Identity) -> String {
    KeyRequest::new(identity).unwrap().csr_pem().to_owned()
}

#[test]
fn certificates_are_for_the_bearer_alone_and_refusals_are_logged() {
    let world = world("bad-certs");
    let client = identity("shop", "client");
    let token = world.issuer.sign(&good(&world)).unwrap();
    let chain = ask(&world, &token, &csr(&client)).expect("its own is issued");
    let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
    assert_eq!(peer_identity(&leaf).unwrap(), client);

    let (issued, logged) = (issued(&world), world.controller.log().len());
    let web = csr(&identity("shop", "web"));
    let status = ask(&world, &token, &web).expect_err("it is another's");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let log = world.controller.log().split_off(logged);
    let line = log.lines().find(|line| line.contains("refused"));
    let line = line.unwrap_or_else(|| panic!("the refusal is not logged: {log}"));
    assert!(
        line.contains("shop/sa/client") && line.contains("shop/sa/web"),
        "{line}"
    );

    let with = |claim: &str, value: Value| {
        let mut claims = good(&world);
        claims[claim] = value;
        world.issuer.sign(&claims).unwrap()
    };
    let tokens = [
        ("expired", with("exp", json!(1_700_000_000))),
        ("audience", with("aud", json!(["another"]))),
        ("issuer", with("iss", json!("https://another.example"))),
        (
            "signature",
            Issuer::new().unwrap().sign(&good(&world)).unwrap(),
        ),
        ("malformed", "nonsense".to_owned()),
    ];
    for (reason, token) in tokens {
        let logged = world.controller.log().len();
        let status = ask(&world, &token, &csr(&client)).expect_err(reason);
        assert_eq!(status.code(), Code::Unauthenticated, "{reason}: {status}");
        let log = world.controller.log().split_off(logged);
        assert!(log.contains(reason), "{reason} is not logged: {log}");
        assert!(!log.contains(&token), "{reason}: the token is in the log");
    }
    assert_eq!(self::issued(&world), issued, "something was issued");
    assert!(served(&world), "the neighbours are not served");
}

/// How many certificates the CA has issued, by its own account.
fn issued(world: &World) -> usize {
    let account = world.folder.join("control/state/issued.jsonl");
    std::fs::read_to_string(account).unwrap().lines().count()
}
