//! What metrics call the two ends of a hop: both ends say the same.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hyper::Response;
use turnpike_rules::workload::{Names, Workload};
use turnpike_sidecar::observe::{HttpOutcome, Labels};

use crate::{
    apps::{full, get, serve},
    world::{Pair, Recorded, Recorder, identity, key},
};

fn names(workload: &str) -> Arc<Names> {
    Arc::new(Names {
        version: "v2".into(),
        app: "app".into(),
        ..Names::unlabelled(workload, "shop")
    })
}

/// The caller's pod, whose address all of this machine's connections come from.
fn caller_pod(account: &str) -> Workload {
    Workload {
        uid: "caller-uid".into(),
        namespace: "shop".into(),
        name: "caller-0".into(),
        address: [127, 0, 0, 1].into(),
        identity: Some(identity(account)),
        service: None,
        ports: Vec::new(),
        names: Some(names("front-v2")),
    }
}

async fn app() -> SocketAddr {
    serve(|_| async { Response::new(full("hello")) }).await
}

async fn outcomes(of: &Recorder, count: usize) -> Vec<(Labels, HttpOutcome)> {
    let enough = |seen: &Recorded| (seen.outcomes.len() >= count).then(|| seen.outcomes.clone());
    of.wait(enough).await
}

#[tokio::test]
async fn each_end_knows_the_workload_of_the_other() {
    let pair = Pair::with(app().await, |view| {
        view.endpoints[0].endpoint.names = Some(names("web-canary"));
    });
    pair.callee.known.set_workload(caller_pod("caller"));
    assert_eq!(get(pair.caller.outbound(), "/").await.0, 200);
    let (source, outcome) = outcomes(&pair.caller.seen, 1).await.remove(0);
    let (destination, _) = outcomes(&pair.callee.seen, 1).await.remove(0);
    assert_eq!(source.names, Some(names("web-canary")));
    assert_eq!(destination.names, Some(names("front-v2")));
    assert_eq!(source.service, Some(key()));
    assert_eq!(destination.service, Some(key()));
    assert_eq!(outcome.response_bytes, 5);
}

#[tokio::test]
async fn no_request_waits_for_the_callers_name_and_none_is_counted_without_it() {
    let pair = Pair::new(app().await);
    pair.callee.known.set_workload(caller_pod("caller"));
    let delay = Duration::from_secs(5);
    *pair.callee.known.delay.lock().unwrap() = delay;
    let began = std::time::Instant::now();
    for _ in 0..3 {
        assert_eq!(get(pair.caller.outbound(), "/").await.0, 200);
    }
    let took = began.elapsed();
    assert!(took < delay, "{took:?}: requests waited");
    assert!(pair.callee.seen.get(|seen| seen.outcomes.is_empty()));
    let counted = outcomes(&pair.callee.seen, 3).await;
    assert!(
        counted
            .iter()
            .all(|(labels, _)| labels.names == Some(names("front-v2")))
    );
    // What comes on the same connection is counted at once now.
    *pair.callee.known.delay.lock().unwrap() = Duration::ZERO;
    assert_eq!(get(pair.caller.outbound(), "/").await.0, 200);
    assert_eq!(outcomes(&pair.callee.seen, 4).await.len(), 4);
}

#[tokio::test]
async fn an_address_that_is_anothers_by_now_names_nobody() {
    let pair = Pair::new(app().await);
    pair.callee.known.set_workload(caller_pod("somebody-else"));
    assert_eq!(get(pair.caller.outbound(), "/").await.0, 200);
    let (labels, _) = outcomes(&pair.callee.seen, 1).await.remove(0);
    assert_eq!(labels.names, None);
    assert_eq!(labels.peer, Some(identity("caller")));
}
