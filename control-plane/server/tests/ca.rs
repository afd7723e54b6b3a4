//! The CA of the real executable: who gets a certificate, and who does not.
#![allow(clippy::unwrap_used, reason = "what fails here ends the test")]

mod common;
mod rig;

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rig::{Issuer, Rig, claims};
use serde_json::{Value, json};
use tonic::{Code, Status};
use turnpike_certs::{KeyRequest, peer_identity};
use turnpike_rules::Identity;
use turnpike_wire::{
    ca::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
    ca_client,
};

fn web() -> Identity {
    Identity::new("cluster.local", "shop", "web").unwrap()
}

fn good() -> Value {
    claims("shop", "web", "web-1", "node-a")
}

async fn ask(rig: &Rig, token: &str, csr: &str) -> Result<Vec<String>, Status> {
    let controller = rig.client("ask", token);
    let mut client = IstioCertificateServiceClient::new(controller.connect().await.unwrap());
    let request = IstioCertificateRequest {
        csr: csr.into(),
        validity_duration: 0,
        metadata: None,
    };
    let request = controller.request(request).await.unwrap();
    client
        .create_certificate(request)
        .await
        .map(|answer| answer.into_inner().cert_chain)
}

fn request() -> String {
    KeyRequest::new(&web()).unwrap().csr_pem().to_owned()
}

fn issued(rig: &Rig) -> Vec<Value> {
    let text = fs::read_to_string(rig.path("state/issued.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[tokio::test]
async fn a_good_token_gets_a_certificate_for_its_own_identity() {
    let rig = Rig::start("");
    let controller = rig.client("web", &rig.issuer.sign(&good()));
    let credentials = ca_client::fetch(&controller, &web()).await.unwrap();
    assert_eq!(peer_identity(&credentials.chain()[0]).unwrap(), web());
    let life = credentials
        .not_after()
        .duration_since(std::time::SystemTime::now())
        .unwrap();
    assert!(life <= Duration::from_secs(24 * 3600), "{life:?}");

    let issued = issued(&rig);
    assert_eq!(issued.len(), 1);
    assert_eq!(issued[0]["serial"].as_str().unwrap(), credentials.serial());
    assert_eq!(issued[0]["identity"], web().to_string());
    assert_eq!(issued[0]["pod_uid"], "uid-web-1");
    assert_eq!(rig.metric("turnpike_ca_issued_total"), Some(1.0));
    let log = rig.log();
    assert!(log.contains("issued a certificate") && log.contains(credentials.serial()));
}

#[tokio::test]
async fn tokens_that_do_not_hold_are_refused_and_logged() {
    let rig = Rig::start("");
    let with = |edit: &dyn Fn(&mut Value)| {
        let mut claims = good();
        edit(&mut claims);
        rig.issuer.sign(&claims)
    };
    let other = |claim: &'static str| move |claims: &mut Value| claims[claim] = json!("other");
    let forged = Issuer::new("k1").sign(&good());
    let foreign = Issuer::new("k2").sign(&good());
    let unsigned = {
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        format!(
            "{}.{}.",
            part(json!({"alg": "none", "kid": "k1"})),
            part(good())
        )
    };
    let symmetric = {
        // The public key as a shared secret: works where the token may choose the algorithm.
        let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256);
        header.kid = Some("k1".into());
        let secret = rig.issuer.jwk()["x"].as_str().unwrap().to_owned();
        let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
        jsonwebtoken::encode(&header, &good(), &key).unwrap()
    };
    for (what, token, reason) in [
        (
            "expired",
            with(&|c| c["exp"] = json!(1_700_000_000)),
            "expired",
        ),
        (
            "not yet valid",
            with(&|c| c["nbf"] = json!(4_000_000_000_u64)),
            "not_yet_valid",
        ),
        (
            "without an end",
            with(&|c| drop(c.as_object_mut().unwrap().remove("exp"))),
            "claims",
        ),
        (
            "ending after all time",
            with(&|c| c["exp"] = json!(i64::MAX)),
            "claims",
        ),
        ("of another audience", with(&other("aud")), "audience"),
        ("of another issuer", with(&other("iss")), "issuer"),
        ("of another account", with(&other("sub")), "claims"),
        (
            "without kubernetes.io",
            with(&|c| c["kubernetes.io"] = json!(null)),
            "claims",
        ),
        ("signed by another key", forged, "signature"),
        ("signed by an unknown key", foreign, "unknown_key"),
        ("not signed", unsigned, "malformed"),
        ("signed with the public key", symmetric, "signature"),
        ("no JWT", "nonsense".to_owned(), "malformed"),
    ] {
        let status = ask(&rig, &token, &request()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{what}: {status}");
        let log = rig.log();
        let audited = log
            .lines()
            .rfind(|line| line.contains("\"target\":\"audit\""));
        let line = audited.unwrap();
        assert!(
            line.contains(&format!("\"reason\":\"{reason}\"")),
            "{what}: {line}"
        );
        assert!(!log.contains(&token), "{what}: the token is in the log");
    }
    assert!(issued(&rig).is_empty());
    assert_eq!(rig.metric("turnpike_ca_issued_total"), Some(0.0));
    // The rig is right: a good token is taken.
    ask(&rig, &rig.issuer.sign(&good()), &request())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_request_for_another_identity_is_refused_and_logged_with_both() {
    let rig = Rig::start("");
    let token = rig.issuer.sign(&good());
    let bank = Identity::new("cluster.local", "bank", "vault").unwrap();
    let stolen = KeyRequest::new(&bank).unwrap().csr_pem().to_owned();
    let status = ask(&rig, &token, &stolen).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(
        status.message().contains("bank/sa/vault"),
        "{}",
        status.message()
    );
    let log = rig.log();
    let line = log
        .lines()
        .find(|line| line.contains("refused a certificate"))
        .unwrap();
    assert!(
        line.contains("shop/sa/web") && line.contains("bank/sa/vault"),
        "{line}"
    );
    for (csr, says) in [
        ("", "PEM"),
        ("-----BEGIN CERTIFICATE REQUEST-----\n", "PEM"),
    ] {
        let status = ask(&rig, &token, csr).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(says), "{}", status.message());
    }
    assert!(issued(&rig).is_empty());
}

#[tokio::test]
async fn one_pod_that_asks_without_end_is_held_back_alone() {
    let rig = Rig::start("");
    let token = rig.issuer.sign(&good());
    let mut refused = None;
    for _ in 0..40 {
        if let Err(status) = ask(&rig, &token, &request()).await {
            refused = Some(status);
            break;
        }
    }
    assert_eq!(refused.unwrap().code(), Code::ResourceExhausted);
    let other = rig.issuer.sign(&claims("shop", "web", "web-2", "node-a"));
    ask(&rig, &other, &request()).await.unwrap();
}

#[tokio::test]
async fn the_root_survives_a_kill_and_the_keys_may_rotate() {
    let mut rig = Rig::start("");
    let root = fs::read_to_string(rig.path("root.pem")).unwrap();
    ask(&rig, &rig.issuer.sign(&good()), &request())
        .await
        .unwrap();
    rig.kill();
    assert_eq!(issued(&rig).len(), 1, "recorded before the answer");
    rig.launch();
    assert_eq!(fs::read_to_string(rig.path("root.pem")).unwrap(), root);
    let old = rig.issuer.sign(&good());
    ask(&rig, &old, &request()).await.unwrap();
    let next = Issuer::new("k2");
    rig.set_keys(&[&next]);
    ask(&rig, &next.sign(&good()), &request()).await.unwrap();
    let status = ask(&rig, &old, &request()).await.unwrap_err();
    assert_eq!(
        status.code(),
        Code::Unauthenticated,
        "a key that was withdrawn"
    );
    fs::write(rig.path("jwks.json"), "{").unwrap();
    let status = ask(&rig, &next.sign(&good()), &request())
        .await
        .unwrap_err();
    assert_eq!(
        status.code(),
        Code::Unavailable,
        "nothing is accepted without keys"
    );
}

#[tokio::test]
async fn a_full_disk_stops_the_issuing_alone() {
    let mut rig = Rig::prepare("");
    fs::create_dir(rig.path("state")).unwrap();
    symlink("/dev/full", rig.path("state/issued.jsonl")).unwrap();
    rig.launch();
    let status = ask(&rig, &rig.issuer.sign(&good()), &request())
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("nothing was issued"),
        "{}",
        status.message()
    );
    assert_eq!(rig.get("/healthz/ready").0, 200);
}

#[test]
fn a_root_that_others_can_read_stops_the_start() {
    let mut rig = Rig::start("");
    rig.terminate();
    assert_eq!(rig.ended(), Some(0));
    let key = rig.path("state/root-key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let output = rig.command().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(
        message.contains("0644") && message.contains("chmod 600"),
        "{message}"
    );
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&key, "damaged").unwrap();
    let message = String::from_utf8(rig.command().output().unwrap().stderr).unwrap();
    assert!(
        message.contains("is not a root") && message.contains("backup"),
        "{message}"
    );
}
