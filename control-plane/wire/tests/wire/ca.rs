//! The CA client: fetching, renewing, holding on.

use std::time::{Duration, SystemTime};

use tokio::time::timeout;
use tonic::Status;
use turnpike_certs::{CredentialStore, TrustBundle};
use turnpike_rules::Identity;
use turnpike_wire::ca_client::{FetchError, fetch, keep_fresh};

use crate::controller::{PATIENCE, TestController, root};

fn web() -> Identity {
    Identity::new("cluster.local", "shop", "web").unwrap()
}

#[tokio::test]
async fn a_certificate_is_fetched() {
    let server = TestController::start().await;
    let credentials = fetch(&server.client(), &web()).await.unwrap();
    assert_eq!(credentials.identity(), &web());
    assert_eq!(
        credentials.roots().certificates(),
        [server.authority.certificate().clone()]
    );
    assert!(credentials.not_after() > SystemTime::now() + Duration::from_secs(23 * 3600));
}

#[tokio::test]
async fn refusals_are_told_with_their_reason() {
    let server = TestController::start().await;
    let other = Identity::new("cluster.local", "shop", "admin").unwrap();
    let error = fetch(&server.client(), &other)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("sa/admin") && error.contains("sa/web"),
        "{error}"
    );

    std::fs::write(server.client().token_file, "stolen").unwrap();
    let error = fetch(&server.client(), &web()).await.unwrap_err();
    assert!(
        matches!(&error, FetchError::Refused(text) if text.contains("token")),
        "{error}"
    );
}

#[tokio::test]
async fn a_certificate_that_our_roots_do_not_cover_is_not_taken() {
    let mut server = TestController::start().await;
    // The server still serves under its old chain's root, but signs under one we do not know.
    let old = server.authority.certificate_pem().to_owned();
    server.kill().await;
    server.revive(root()).await;
    let both = format!("{old}{}", server.authority.certificate_pem());
    std::fs::write(server.client().root_file, both).unwrap();
    let credentials = fetch(&server.client(), &web()).await.unwrap();
    assert_eq!(
        credentials.roots().certificates().len(),
        2,
        "the bundle, not the chain's root"
    );
    std::fs::write(server.client().root_file, old).unwrap();
    fetch(&server.client(), &web()).await.unwrap_err();
}

#[tokio::test]
async fn the_store_is_filled_renewed_and_never_emptied() {
    let server = TestController::start().await;
    server.ca_refuses(Some(Status::unavailable("not yet")));
    server.ca_lifetime(Duration::from_secs(4));
    let store = CredentialStore::empty();
    let keeper = tokio::spawn(keep_fresh(server.client(), web(), store.clone()));
    let mut generations = store.subscribe();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(store.load().is_none());

    server.ca_refuses(None);
    timeout(PATIENCE, generations.wait_for(|g| *g >= 1))
        .await
        .expect("filled")
        .unwrap();
    let first = store.load().unwrap();
    timeout(PATIENCE, generations.wait_for(|g| *g >= 2))
        .await
        .expect("renewed")
        .unwrap();
    let second = store.load().unwrap();
    assert_ne!(first.serial(), second.serial());
    assert!(
        SystemTime::now() < first.not_after(),
        "renewed before the first had ended"
    );

    // The CA is away until after the end: what there is stays, and is replaced when it is back.
    server.ca_refuses(Some(Status::unavailable("away")));
    let last = store.load().unwrap();
    while !last.expired(SystemTime::now()) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let kept = store.load().unwrap();
    assert!(kept.not_after() >= last.not_after());
    let before = server.ca_issued();
    server.ca_lifetime(Duration::from_secs(3600));
    server.ca_refuses(None);
    let renewed = generations.wait_for(|_| {
        store
            .load()
            .is_some_and(|current| !current.expired(SystemTime::now()))
    });
    timeout(PATIENCE, renewed)
        .await
        .expect("renewed after the outage")
        .unwrap();
    assert!(server.ca_issued() > before);
    keeper.abort();
}

#[tokio::test]
async fn new_roots_are_followed_between_renewals() {
    let server = TestController::start().await;
    let store = CredentialStore::empty();
    let keeper = tokio::spawn(keep_fresh(server.client(), web(), store.clone()));
    timeout(PATIENCE, store.ready()).await.expect("filled");
    let other = root();
    let both = format!(
        "{}{}",
        server.authority.certificate_pem(),
        other.certificate_pem()
    );
    std::fs::write(server.client().root_file, &both).unwrap();
    let wanted = TrustBundle::from_pem(both.as_bytes()).unwrap();
    let mut generations = store.subscribe();
    let followed = generations.wait_for(|_| store.load().unwrap().roots() == &wanted);
    timeout(PATIENCE, followed)
        .await
        .expect("roots followed")
        .unwrap();
    assert_eq!(server.ca_issued(), 1, "without a new certificate");
    keeper.abort();
}
