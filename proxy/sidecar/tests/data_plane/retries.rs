//! What is sent again, to whom, and what never is.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, Response};
use http_body_util::BodyExt;
use turnpike_rules::traffic::{OutlierEjection, Retry, RetryBudget, RetryConditions};

use crate::{
    apps::{full, get, http1, http2, nowhere, raw, read, serve},
    world::{Pair, Setup, Sidecar, Trust, web},
};

/// Answers with `status` and its own letter, and counts the requests.
async fn app(status: u16, letter: &'static str) -> (SocketAddr, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let address = serve(move |request: Request<hyper::body::Incoming>| {
        counted.fetch_add(1, SeqCst);
        async move {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let body = format!("{letter}{}", String::from_utf8_lossy(&body));
            Response::builder().status(status).body(full(body)).unwrap()
        }
    })
    .await;
    (address, count)
}

/// A caller of `web` at plaintext endpoints.
fn caller(endpoints: &[SocketAddr], retry: Retry, outlier: Option<OutlierEjection>) -> Sidecar {
    let caller = Setup::caller().start(&Trust::new());
    let endpoints: Vec<_> = endpoints.iter().map(|address| (*address, None)).collect();
    let mut view = web(&endpoints);
    view.service.traffic.retry = retry;
    view.service.traffic.outlier = outlier;
    caller.known.set_service(view);
    caller
}

fn on(conditions: RetryConditions) -> Retry {
    Retry {
        conditions,
        ..Retry::default()
    }
}

fn status(status: u16) -> RetryConditions {
    RetryConditions {
        statuses: vec![status],
        ..RetryConditions::default()
    }
}

async fn post(address: SocketAddr, body: &str) -> (u16, String) {
    let request = Request::post("/")
        .header("host", "a")
        .body(full(body.to_owned()))
        .unwrap();
    read(http1(address).await.send(request).await.unwrap()).await
}

#[tokio::test]
async fn a_listed_status_is_tried_elsewhere() {
    let (bad, tried) = app(503, "bad").await;
    let (good, _) = app(200, "good").await;
    let caller = caller(&[bad, good], on(status(503)), None);
    for _ in 0..20 {
        assert_eq!(get(caller.outbound(), "/").await, (200, "good".into()));
    }
    assert!(tried.load(SeqCst) > 0, "the bad one was asked as well");
}

#[tokio::test]
async fn without_a_condition_the_status_stands() {
    let (bad, _) = app(503, "bad").await;
    let caller = caller(&[bad], Retry::default(), None);
    assert_eq!(get(caller.outbound(), "/").await, (503, "bad".into()));
    assert_eq!(caller.seen.line(0).await.attempts, 1);
}

#[tokio::test]
async fn bodies_are_replayed_up_to_their_limit() {
    let (bad, count) = app(503, "bad").await;
    let (good, _) = app(200, "good").await;
    let conditions = RetryConditions {
        non_idempotent: true,
        ..status(503)
    };
    let alone = caller(&[bad], on(conditions.clone()), None);
    assert_eq!(
        post(alone.outbound(), "body").await,
        (503, "badbody".into())
    );
    assert_eq!(count.load(SeqCst), 3, "sent, and twice more");
    assert_eq!(post(alone.outbound(), &"x".repeat(70_000)).await.0, 503);
    assert_eq!(count.load(SeqCst), 4, "too large to be kept");
    let both = caller(&[bad, good], on(conditions), None);
    for _ in 0..10 {
        assert_eq!(
            post(both.outbound(), "body").await,
            (200, "goodbody".into())
        );
    }
}

#[tokio::test]
async fn a_post_that_was_sent_is_not_sent_again() {
    let (closing, connections) = raw(b"").await;
    let conditions = RetryConditions {
        reset: true,
        ..RetryConditions::default()
    };
    let caller = caller(&[closing], on(conditions), None);
    assert_eq!(post(caller.outbound(), "pay").await.0, 503);
    assert_eq!(connections.load(SeqCst), 1);
    let line = caller.seen.line(0).await;
    assert_eq!((line.flags.as_str(), line.attempts), ("UC", 1));
    assert_eq!(get(caller.outbound(), "/").await.0, 503);
    assert_eq!(
        connections.load(SeqCst),
        1 + 3,
        "an idempotent one is, twice"
    );
}

#[tokio::test]
async fn what_was_never_sent_goes_elsewhere_whatever_it_is() {
    let (good, count) = app(200, "good").await;
    let caller = caller(&[nowhere(), good], Retry::default(), None);
    for number in 1..=20 {
        assert_eq!(
            post(caller.outbound(), "pay").await,
            (200, "goodpay".into())
        );
        assert_eq!(count.load(SeqCst), number, "exactly once");
    }
}

#[tokio::test]
async fn a_peers_application_that_is_not_up_is_passed_over() {
    let (good, count) = app(200, "good").await;
    let trust = Trust::new();
    let starting = Setup::callee("web", nowhere()).start(&trust);
    let running = Setup::callee("web", good).start(&trust);
    let caller = Setup::caller().start(&trust);
    let endpoints = [
        (starting.inbound(), Some("web")),
        (running.inbound(), Some("web")),
    ];
    caller.known.set_service(web(&endpoints));
    for number in 1..=20 {
        assert_eq!(
            post(caller.outbound(), "pay").await,
            (200, "goodpay".into())
        );
        assert_eq!(count.load(SeqCst), number, "exactly once");
    }
}

#[tokio::test]
async fn a_pooled_connection_closed_meanwhile_costs_nothing() {
    // Answers one request on each connection, and closes without saying so.
    let (app, connections) = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    let caller = caller(
        &[app],
        Retry {
            attempts: 0,
            ..Retry::default()
        },
        None,
    );
    for number in 1..=5 {
        assert_eq!(post(caller.outbound(), "").await, (200, "ok".into()));
        assert_eq!(connections.load(SeqCst), number);
        // Lets the proxy see the close.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_budget_bounds_retries() {
    let (bad, count) = app(503, "bad").await;
    let budget = RetryBudget {
        percent: 20.0,
        min_per_second: 0,
    };
    let retry = Retry {
        budget,
        attempts: 5,
        ..on(status(503))
    };
    let caller = caller(&[bad], retry, None);
    let mut client = http1(caller.outbound()).await;
    for _ in 0..50 {
        assert_eq!(client.get("/").await.0, 503);
    }
    let tries = count.load(SeqCst);
    assert!((51..=60).contains(&tries), "{tries} tries for 50 requests");
}

#[tokio::test]
async fn failing_endpoints_are_ejected_and_come_back() {
    let (bad, bad_count) = app(500, "bad").await;
    let (good, _) = app(200, "good").await;
    let outlier = OutlierEjection {
        consecutive_failures: 3,
        base_ejection: Duration::from_secs(3),
        ..OutlierEjection::default()
    };
    let caller = caller(&[bad, good], Retry::default(), Some(outlier));
    let mut client = http1(caller.outbound()).await;
    let mut streak = 0;
    for _ in 0..2000 {
        let (status, _) = client.get("/").await;
        streak = if status == 200 { streak + 1 } else { 0 };
        if bad_count.load(SeqCst) >= 3 && streak > 50 {
            break;
        }
    }
    let before = bad_count.load(SeqCst);
    assert!(before <= 5, "asked {before} times before it was out");
    caller.seen.note_of("web ejected").await;
    caller.seen.note_of("web out 1").await;
    let flagged = |recorded: &crate::world::Recorded| {
        recorded
            .lines
            .iter()
            .filter(|line| line.flags == "EJ")
            .count()
    };
    assert!(caller.seen.get(flagged) >= 1);
    caller.seen.note_of("web out 0").await;
    for _ in 0..200 {
        client.get("/").await;
    }
    let after = bad_count.load(SeqCst);
    assert!(after > before, "readmitted, it is asked again");
}

/// Takes requests, counts them, and never answers.
async fn silent() -> (SocketAddr, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let address = serve(move |_| {
        counted.fetch_add(1, SeqCst);
        std::future::pending()
    })
    .await;
    (address, count)
}

#[tokio::test]
async fn of_callers_that_give_up_the_balancer_learns_who_never_answers() {
    let ((silent, asked), (good, _)) = (silent().await, app(200, "good").await);
    let caller = caller(&[silent, good], Retry::default(), None);
    let mut given_up = 0;
    for _ in 0..40 {
        let patience = Duration::from_secs(1);
        let answer = tokio::time::timeout(patience, get(caller.outbound(), "/")).await;
        given_up += usize::from(answer.is_err());
    }
    let asked = asked.load(SeqCst);
    assert!(
        asked < 8,
        "asked {asked} times of 40, {given_up} given up: half is chance"
    );
}

#[tokio::test]
async fn who_lets_the_whole_requests_time_go_by_is_ejected() {
    let ((silent, asked), (good, _)) = (silent().await, app(200, "good").await);
    let caller = Setup::caller().start(&Trust::new());
    let mut view = web(&[(silent, None), (good, None)]);
    view.service.traffic.timeouts.request = Some(Duration::from_secs(1));
    view.service.traffic.outlier = Some(OutlierEjection {
        consecutive_failures: 1,
        ..OutlierEjection::default()
    });
    caller.known.set_service(view);
    for _ in 0..40 {
        get(caller.outbound(), "/").await;
    }
    assert_eq!(asked.load(SeqCst), 1, "it is out after the first");
    caller.seen.note_of("web ejected").await;
}

#[tokio::test]
async fn equal_endpoints_share_what_is_asked_in_turn() {
    let ((a, a_count), (b, b_count)) = (app(200, "a").await, app(200, "b").await);
    let caller = caller(&[a, b], Retry::default(), None);
    let mut client = http1(caller.outbound()).await;
    let counts = || (a_count.load(SeqCst), b_count.load(SeqCst));
    // One that a busy machine made slow once gets nothing for some time, and then its share.
    for _ in 0..20_000 {
        client.get("/").await;
        if counts().0 > 40 && counts().1 > 40 {
            break;
        }
    }
    assert!(counts().0 > 40 && counts().1 > 40, "{:?}", counts());
}

#[tokio::test]
async fn refused_streams_are_tried_elsewhere() {
    let (good, _) = app(200, "good").await;
    let refusing = refusing_h2().await;
    let caller = caller(&[refusing, good], Retry::default(), None);
    let client = http2(caller.outbound()).await;
    for _ in 0..10 {
        let request = Request::post("http://a/").body(full("pay")).unwrap();
        let answer = read(client.send(request).await.unwrap()).await;
        assert_eq!(answer, (200, "goodpay".into()));
    }
}

/// An HTTP/2 server that refuses every stream unprocessed.
async fn refusing_h2() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_service_without_endpoints_says_so() {
    let caller = caller(&[], Retry::default(), None);
    let (status, body) = get(caller.outbound(), "/").await;
    assert_eq!(status, 503);
    assert!(body.contains("no endpoint of cluster/shop/web"), "{body}");
    let line = caller.seen.line(0).await;
    assert_eq!(line.flags, "UH");
    assert!(line.details.contains("no endpoint"), "{}", line.details);
}

#[tokio::test]
async fn endpoints_are_swapped_whole_and_services_come_back() {
    let (first, _) = app(200, "first").await;
    let (second, _) = app(200, "second").await;
    let caller = caller(&[first], Retry::default(), None);
    let mut client = http1(caller.outbound()).await;
    assert_eq!(client.get("/").await.1, "first");
    caller.known.set_service(web(&[(second, None)]));
    assert_eq!(client.get("/").await.1, "second");
    caller.known.remove_service(&crate::world::key());
    let (status, body) = client.get("/").await;
    assert_eq!(status, 503, "{body}");
    caller.known.set_service(web(&[(first, None)]));
    assert_eq!(client.get("/").await.1, "first");
}

#[tokio::test]
async fn terminating_endpoints_serve_only_when_none_else_does() {
    use turnpike_rules::service::EndpointState;
    let (old, _) = app(200, "old").await;
    let (new, _) = app(200, "new").await;
    let pair = caller(&[old, new], Retry::default(), None);
    let mut view = web(&[(old, None), (new, None)]);
    view.endpoints[0].endpoint.state = EndpointState::Terminating;
    pair.known.set_service(view.clone());
    for _ in 0..10 {
        assert_eq!(get(pair.outbound(), "/").await.1, "new");
    }
    view.endpoints.pop();
    pair.known.set_service(view);
    assert_eq!(get(pair.outbound(), "/").await.1, "old");
}

#[tokio::test]
async fn a_pod_called_by_its_address_keeps_being_called() {
    let (app, _) = app(200, "pod").await;
    let pair = Pair::new(app);
    // The workload stands where the callee's inbound listener is.
    let inbound = pair.callee.inbound();
    let workload = turnpike_rules::workload::Workload {
        uid: "web-uid".into(),
        namespace: "shop".into(),
        name: "web-0".into(),
        address: inbound.ip(),
        identity: Some(crate::world::identity("web")),
        service: Some(crate::world::key()),
        ports: Vec::new(),
        names: None,
    };
    let direct = Setup {
        outbound_to: inbound,
        ..Setup::caller()
    };
    let caller = direct.start_with(pair.caller.store.clone());
    caller.known.set_workload(workload);
    caller.known.set_service(web(&[]));
    // The server name names the port that the caller asked for, which here is the listener's own.
    let (status, body) = get(caller.outbound(), "/").await;
    assert_eq!(status, 503, "{body}");
    let reason = turnpike_sidecar::observe::RefusalReason::ServerName;
    let details = pair.callee.seen.refusal(reason).await;
    assert!(details.contains(".web-uid.pod.turnpike"), "{details}");
}
