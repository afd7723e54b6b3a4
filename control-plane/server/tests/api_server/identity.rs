//! Who is who: tokens that the API server vouches for, the root in its Secret and in every
//! namespace.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::{Engine, engine::general_purpose::STANDARD};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tonic::Code;
use turnpike_certs::{KeyRequest, TrustBundle, peer_identity};
use turnpike_rules::Identity;
use turnpike_server::ca::RootSecret;
use turnpike_wire::{
    ca::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
    ca_client,
};

use super::{
    apiserver::ApiServer,
    controller::{self, Controller},
};
use crate::common::eventually;

const POD: &str = "apiVersion: v1
kind: Node
metadata: {name: node-a}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop}
spec:
  nodeName: node-a
  serviceAccountName: web
  containers: [{name: app, image: app}]
";

fn web() -> Identity {
    Identity::new("cluster.local", "shop", "web").unwrap()
}

fn token(api: &ApiServer, audience: &str) -> String {
    api.token("shop/web-1", "web", audience)
}

/// The same token as the API server would have made it at another time.
fn token_that_ended(api: &ApiServer, ago: u64) -> String {
    let good = token(api, "istio-ca");
    let mut claims: Value = jsonwebtoken::dangerous::insecure_decode_claims(&good).unwrap();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    claims["exp"] = json!(now - ago);
    let key = EncodingKey::from_ec_der(&api.pki.account_key.serialize_der());
    encode(&Header::new(Algorithm::ES256), &claims, &key).unwrap()
}

/// Why it gets no certificate.
async fn refused(controller: &Controller, name: &str, token: &str) -> (Code, String) {
    let client = controller.client(name, token);
    let mut service = IstioCertificateServiceClient::new(client.connect().await.unwrap());
    let request = IstioCertificateRequest {
        csr: KeyRequest::new(&web()).unwrap().csr_pem().to_owned(),
        validity_duration: 0,
        metadata: None,
    };
    let request = client.request(request).await.unwrap();
    let status = service.create_certificate(request).await.unwrap_err();
    (status.code(), status.message().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a real kube-apiserver: cargo verify kubernetes"]
async fn callers_are_whom_the_api_server_says() {
    let mut api = ApiServer::start();
    controller::install(&api);
    api.install_crds();
    api.namespace("shop", "");
    api.apply(POD);
    a_race_for_the_root_has_one_winner(&api).await;
    let controller = Controller::start(&api);

    let client = controller.client("good", &token(&api, "istio-ca"));
    let credentials = ca_client::fetch(&client, &web()).await.unwrap();
    assert_eq!(peer_identity(&credentials.chain()[0]).unwrap(), web());
    let issued = std::fs::read_to_string(controller.path("state/issued.jsonl")).unwrap();
    let issued: Value = serde_json::from_str(issued.lines().next().unwrap()).unwrap();
    let uid = api.get("shop", "pod/web-1").unwrap()["metadata"]["uid"].clone();
    assert_eq!(
        (&issued["pod"], &issued["node"]),
        (&json!("web-1"), &json!("node-a"))
    );
    assert_eq!(issued["pod_uid"], uid);

    let fresh = "the token has expired; a fresh one is in the projected volume";
    for (name, token, expected) in [
        ("long-ended", token_that_ended(&api, 3600), fresh),
        (
            "foreign",
            token(&api, "vault"),
            "the token is not meant for `istio-ca`; set that audience on the projected volume",
        ),
    ] {
        let (code, message) = refused(&controller, name, &token).await;
        assert_eq!(
            (code, &*message),
            (Code::Unauthenticated, expected),
            "{name}"
        );
        eventually("it is logged", || {
            controller.log().contains(expected).then_some(())
        });
    }
    let forged = {
        let good = token(&api, "istio-ca");
        let claims: Value = jsonwebtoken::dangerous::insecure_decode_claims(&good).unwrap();
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let key = EncodingKey::from_ec_der(&key.serialize_der());
        encode(&Header::new(Algorithm::ES256), &claims, &key).unwrap()
    };
    let (code, message) = refused(&controller, "forged", &forged).await;
    assert_eq!(code, Code::Unauthenticated);
    assert!(
        message.starts_with("the API server does not accept the token"),
        "{message}"
    );

    // The pod is gone, and with it what its token was worth; what was remembered lasts 30 s.
    let before = token(&api, "istio-ca");
    api.kubectl(&[
        "delete",
        "pod",
        "--namespace=shop",
        "web-1",
        "--force",
        "--grace-period=0",
    ]);
    let (code, message) = refused(&controller, "gone", &before).await;
    assert_eq!(code, Code::Unauthenticated, "{message}");

    // Nobody to ask: refused in a way that says to come again, never accepted.
    api.apply(POD);
    let unseen = token(&api, "istio-ca");
    api.stop_server();
    let (code, message) = refused(&controller, "unseen", &unseen).await;
    assert_eq!(code, Code::Unavailable, "{message}");
    assert!(
        message.starts_with("tokens cannot be verified now"),
        "{message}"
    );
}

/// All ask before any has made it, and all leave with the same.
async fn a_race_for_the_root_has_one_winner(api: &ApiServer) {
    let config = Kubeconfig::read_from(api.path("admin.conf")).unwrap();
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await;
    let client = Client::try_from(config.unwrap()).unwrap();
    let racers = (0..8).map(|_| {
        let secret = RootSecret::new(client.clone(), "turnpike-system", "race");
        async move {
            let root = secret
                .root("cluster.local", SystemTime::now())
                .await
                .unwrap();
            root.certificate_pem().to_owned()
        }
    });
    let roots = futures_util::future::join_all(racers).await;
    assert!(roots.iter().all(|root| *root == roots[0]), "{roots:?}");
    let kept = api.get("turnpike-system", "secret/race").unwrap();
    let kept = STANDARD
        .decode(kept["data"]["root.pem"].as_str().unwrap())
        .unwrap();
    assert_eq!(kept, roots[0].as_bytes());
}

#[test]
#[ignore = "needs a real kube-apiserver: cargo verify kubernetes"]
fn the_root_is_one_and_everywhere() {
    let mut api = ApiServer::start();
    controller::install(&api);
    api.install_crds();
    // They start at once; one makes the root, all have it.
    let mut all = [
        Controller::launch(&api),
        Controller::launch(&api),
        Controller::launch(&api),
    ];
    all.iter_mut().for_each(|controller| controller.ready());
    let roots = all
        .each_ref()
        .map(|one| std::fs::read_to_string(one.path("root.pem")).unwrap());
    assert!(roots.iter().all(|root| *root == roots[0]), "{roots:?}");
    TrustBundle::from_pem(roots[0].as_bytes()).unwrap();
    let [mut first, ..] = all;
    let root = &roots[0];

    let secret = || api.get("turnpike-system", "secret/turnpike-ca");
    let made = secret().unwrap();
    assert_eq!(made["immutable"], true);
    let held = |namespace: &str| {
        let map = api.get(namespace, "configmap/turnpike-root")?;
        (map["data"]["root.pem"] == *root.as_str()).then_some(())
    };
    for namespace in ["default", "kube-system", "turnpike-system"] {
        eventually("the root in what was there", || held(namespace));
    }
    api.namespace("later", "");
    eventually("the root in a new namespace", || held("later"));
    api.kubectl(&["delete", "configmap", "--namespace=later", "turnpike-root"]);
    eventually("the root made anew", || held("later"));
    let patch = r#"{"data": {"root.pem": "another"}}"#;
    api.kubectl(&[
        "patch",
        "configmap",
        "--namespace=later",
        "turnpike-root",
        "--patch",
        patch,
    ]);
    eventually("the root corrected", || held("later"));

    // A restart finds the same root, and leaves the Secret alone.
    first.kill();
    first.spawn();
    first.ready();
    assert_eq!(
        std::fs::read_to_string(first.path("root.pem")).unwrap(),
        *root
    );
    assert_eq!(
        secret().unwrap()["metadata"]["resourceVersion"],
        made["metadata"]["resourceVersion"]
    );

    a_damaged_root_stops_the_start(&mut api, &made);
}

fn a_damaged_root_stops_the_start(api: &mut ApiServer, made: &Value) {
    for (field, value, expected) in [
        ("root-key.pem", Some("bm9uc2Vuc2U="), "is not a root"),
        ("root.pem", None, "has no `root.pem`"),
    ] {
        let mut damaged = made.clone();
        let data = damaged["data"].as_object_mut().unwrap();
        match value {
            Some(value) => data.insert(field.to_owned(), json!(value)),
            None => data.remove(field),
        };
        damaged["metadata"] = json!({"name": "turnpike-ca", "namespace": "turnpike-system"});
        api.kubectl(&[
            "delete",
            "secret",
            "--namespace=turnpike-system",
            "turnpike-ca",
        ]);
        api.apply(&damaged.to_string());
        let before = api.get("turnpike-system", "secret/turnpike-ca").unwrap();
        let mut controller = Controller::launch(api);
        assert_eq!(controller.ended(), Some(1));
        let log = controller.log();
        assert!(
            log.contains(expected) && log.contains("restore it from a backup"),
            "{log}"
        );
        let after = api.get("turnpike-system", "secret/turnpike-ca").unwrap();
        assert_eq!(before, after, "it is never overwritten");
    }
}
