//! Who is spoken to and who calls is verified, and plaintext is never a way out.

use std::{
    sync::atomic::Ordering::SeqCst,
    time::{Duration, SystemTime},
};

use http::{Request, Response};
use turnpike_certs::LEAF_LIFETIME;
use turnpike_rules::workload::MtlsMode;
use turnpike_sidecar::observe::RefusalReason;

use crate::{
    apps::{Body, exchange, full, get, raw, serve},
    world::{Pair, Setup, Trust, web},
};

async fn hello(_: Request<hyper::body::Incoming>) -> Response<Body> {
    Response::new(full("hello"))
}

#[tokio::test]
async fn an_endpoint_with_another_identity_gets_nothing() {
    let app = serve(hello).await;
    let trust = Trust::new();
    let callee = Setup::callee("web", app).start(&trust);
    let caller = Setup::caller().start(&trust);
    caller
        .known
        .set_service(web(&[(callee.inbound(), Some("someone-else"))]));
    let (status, body) = get(caller.outbound(), "/").await;
    assert_eq!(status, 503, "{body}");
    assert_eq!(caller.seen.line(0).await.flags, "UF,URX");
    assert_eq!(callee.seen.get(|recorded| recorded.outcomes.len()), 0);
}

#[tokio::test]
async fn a_peer_of_another_root_is_refused_by_both_sides() {
    let app = serve(hello).await;
    let callee = Setup::callee("web", app).start(&Trust::new());
    let caller = Setup::caller().start(&Trust::new());
    caller
        .known
        .set_service(web(&[(callee.inbound(), Some("web"))]));
    assert_eq!(get(caller.outbound(), "/").await.0, 503);
    callee.seen.refusal(RefusalReason::Handshake).await;
}

#[tokio::test]
async fn expired_certificates_are_refused() {
    let app = serve(hello).await;
    let trust = Trust::new();
    // Valid for three seconds more.
    let then = SystemTime::now() - LEAF_LIFETIME + Duration::from_secs(3);
    let ending = ["caller", "web"].map(|account| (account, trust.credentials(account, then)));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let ended = |account| {
        ending
            .iter()
            .find(|(name, _)| *name == account)
            .unwrap()
            .1
            .clone()
    };
    for (caller_expired, callee_expired) in [(true, false), (false, true)] {
        let callee = Setup::callee("web", app).start(&trust);
        let caller = Setup::caller().start(&trust);
        caller
            .known
            .set_service(web(&[(callee.inbound(), Some("web"))]));
        if caller_expired {
            caller.store.replace(ended("caller"));
        }
        if callee_expired {
            callee.store.replace(ended("web"));
        }
        assert_eq!(get(caller.outbound(), "/").await.0, 503);
        caller
            .store
            .replace(trust.credentials("caller", SystemTime::now()));
        callee
            .store
            .replace(trust.credentials("web", SystemTime::now()));
        assert_eq!(
            get(caller.outbound(), "/").await.0,
            200,
            "renewed, it works"
        );
    }
}

#[tokio::test]
async fn without_credentials_nothing_is_sent_in_plaintext() {
    let (eavesdropper, connections) = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    let caller = Setup::caller().start_with(turnpike_certs::CredentialStore::empty());
    caller
        .known
        .set_service(web(&[(eavesdropper, Some("web"))]));
    let (status, body) = get(caller.outbound(), "/").await;
    assert_eq!(status, 503, "{body}");
    assert!(
        connections.load(SeqCst) > 0,
        "it was the handshake that failed"
    );
}

#[tokio::test]
async fn a_server_name_that_is_not_ours_is_refused() {
    let app = serve(hello).await;
    let pair = Pair::new(app);
    pair.callee.set_own(|own| own.backs.clear());
    assert_eq!(get(pair.caller.outbound(), "/").await.0, 503);
    let details = pair.callee.seen.refusal(RefusalReason::ServerName).await;
    assert!(
        details.contains("p80.web.shop.cluster.svc.turnpike"),
        "{details}"
    );
}

#[tokio::test]
async fn strict_refuses_plaintext_and_counts_it() {
    let app = serve(hello).await;
    let pair = Pair::new(app);
    assert_eq!(
        get(pair.callee.inbound(), "/").await.0,
        200,
        "PERMISSIVE lets it in"
    );
    pair.callee.set_own(|own| own.mtls = MtlsMode::Strict);
    let request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(exchange(pair.callee.inbound(), request).await, "");
    let details = pair.callee.seen.refusal(RefusalReason::Strict).await;
    assert!(details.contains("STRICT"), "{details}");
    assert_eq!(
        get(pair.caller.outbound(), "/").await.0,
        200,
        "the mesh is let in"
    );
    pair.callee
        .set_own(|own| own.port_mtls = vec![(app.port(), MtlsMode::Permissive)]);
    assert_eq!(
        get(pair.callee.inbound(), "/").await.0,
        200,
        "a port's own mode goes first"
    );
}

#[tokio::test]
async fn a_connection_let_in_under_permissive_ends_under_strict() {
    let app = serve(hello).await;
    let pair = Pair::new(app);
    let mut client = crate::apps::http1(pair.callee.inbound()).await;
    assert_eq!(client.get("/").await.0, 200);
    pair.callee.set_own(|own| own.mtls = MtlsMode::Strict);
    assert_eq!(client.get("/").await.0, 403);
}
