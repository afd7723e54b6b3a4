//! Circuit limits, timeouts, and the end of the proxy.

use std::{net::SocketAddr, time::Duration};

use http::{Request, Response};
use http_body_util::BodyExt;
use tokio::{sync::watch, task::JoinSet, time::timeout};
use turnpike_rules::{service::Protocol, traffic::CircuitBreaker};

use crate::{
    apps::{Body, empty, full, get, http1, http2, serve},
    world::{Pair, Setup, Sidecar, Trust, web},
};

/// An application that answers when it is told to.
struct Gated {
    address: SocketAddr,
    open: watch::Sender<bool>,
    /// Requests that have come.
    asked: watch::Receiver<usize>,
}

impl Gated {
    async fn new() -> Self {
        let (open, gate) = watch::channel(false);
        let (ask, asked) = watch::channel(0);
        let address = serve(move |_: Request<hyper::body::Incoming>| {
            let mut gate = gate.clone();
            ask.send_modify(|asked| *asked += 1);
            async move {
                let _ = gate.wait_for(|open| *open).await;
                Response::new(full("done"))
            }
        })
        .await;
        Self {
            address,
            open,
            asked,
        }
    }

    async fn asked(&mut self) {
        let asked = self.asked.wait_for(|asked| *asked > 0);
        timeout(PATIENCE, asked).await.unwrap().unwrap();
    }

    fn open(&self) {
        self.open.send_replace(true);
    }
}

/// Far beyond what anything here takes: a request that is let in against the limit waits for good.
const PATIENCE: Duration = Duration::from_secs(30);

async fn answer(outbound: SocketAddr, path: &'static str) -> (u16, String) {
    timeout(PATIENCE, get(outbound, path)).await.unwrap()
}

fn caller(address: SocketAddr, circuit: CircuitBreaker, connect: Duration) -> Sidecar {
    let caller = Setup::caller().start(&Trust::new());
    let mut view = web(&[(address, None)]);
    view.service.traffic.circuit = circuit;
    view.service.traffic.timeouts.connect = connect;
    caller.known.set_service(view);
    caller
}

#[tokio::test]
async fn requests_over_the_limit_are_answered_at_once() {
    let mut app = Gated::new().await;
    let caller = caller(
        app.address,
        CircuitBreaker {
            max_requests: 1,
            ..CircuitBreaker::default()
        },
        PATIENCE,
    );
    let outbound = caller.outbound();
    let first = tokio::spawn(answer(outbound, "/"));
    app.asked().await;
    let (status, body) = answer(outbound, "/").await;
    assert_eq!(status, 503);
    assert!(body.contains("limit of 1 requests"), "{body}");
    assert_eq!(caller.seen.line(0).await.flags, "UO");
    app.open();
    assert_eq!(first.await.unwrap(), (200, "done".into()));
    assert_eq!(get(outbound, "/").await.0, 200, "its place is free again");
}

#[tokio::test]
async fn requests_wait_for_connections_up_to_the_limit() {
    let mut app = Gated::new().await;
    let limits = CircuitBreaker {
        max_connections: 1,
        max_pending: 1,
        max_requests: 100,
    };
    let caller = caller(app.address, limits, PATIENCE);
    let outbound = caller.outbound();
    let first = tokio::spawn(answer(outbound, "/1"));
    app.asked().await;
    // Of these one waits, whichever comes first, and for the other there is no room.
    let mut others = JoinSet::from_iter(["/2", "/3"].map(|path| answer(outbound, path)));
    let (status, body) = others.join_next().await.unwrap().unwrap();
    assert_eq!(status, 503);
    assert!(body.contains("limit of 1 waiting requests"), "{body}");
    app.open();
    assert_eq!(first.await.unwrap().0, 200);
    assert_eq!(others.join_next().await.unwrap().unwrap().0, 200);
}

#[tokio::test]
async fn nobody_waits_longer_for_a_connection_than_one_may_take_to_make() {
    let mut app = Gated::new().await;
    let limits = CircuitBreaker {
        max_connections: 1,
        ..CircuitBreaker::default()
    };
    let caller = caller(app.address, limits, Duration::from_secs(1));
    let outbound = caller.outbound();
    let first = tokio::spawn(answer(outbound, "/1"));
    app.asked().await;
    let (status, body) = answer(outbound, "/2").await;
    assert_eq!(status, 503);
    assert!(body.contains("limit of 1 connections"), "{body}");
    app.open();
    assert_eq!(first.await.unwrap().0, 200);
}

#[tokio::test]
async fn timeouts_answer_in_the_terms_of_the_request() {
    let app = Gated::new().await;
    let pair = Pair::with(app.address, |view| {
        view.service.traffic.timeouts.request = Some(Duration::from_millis(200));
    });
    let (status, body) = get(pair.caller.outbound(), "/").await;
    assert_eq!(status, 504, "{body}");
    assert_eq!(pair.caller.seen.line(0).await.flags, "UT");
    let request = Request::post("http://a/").header("content-type", "application/grpc+proto");
    let request = request.body(empty()).unwrap();
    let response = http2(pair.caller.outbound())
        .await
        .send(request)
        .await
        .unwrap();
    assert_eq!(
        (
            response.status().as_u16(),
            &response.headers()["grpc-status"]
        ),
        (200, &"4".parse().unwrap())
    );
}

#[tokio::test]
async fn a_try_that_takes_too_long_is_given_up_for_another() {
    let slow = Gated::new().await;
    let fast =
        serve(|_: Request<hyper::body::Incoming>| async { Response::new(full("fast")) }).await;
    let caller = Setup::caller().start(&Trust::new());
    let mut view = web(&[(slow.address, None), (fast, None)]);
    view.service.traffic.timeouts.per_try = Some(Duration::from_secs(1));
    view.service.traffic.retry.conditions.reset = true;
    caller.known.set_service(view);
    for _ in 0..10 {
        assert_eq!(get(caller.outbound(), "/").await, (200, "fast".into()));
    }
}

/// Begins each response and never ends it.
async fn endless() -> SocketAddr {
    serve(|_: Request<hyper::body::Incoming>| async {
        let first = futures_util::stream::iter([Ok(hyper::body::Frame::data("x".into()))]);
        let endless = futures_util::StreamExt::chain(first, futures_util::stream::pending());
        Response::new(http_body_util::StreamBody::new(endless).boxed_unsync_to_sync())
    })
    .await
}

#[tokio::test]
async fn what_does_not_move_ends_with_the_idle_timeout() {
    let idle = |view: &mut turnpike_sidecar::mesh::ServiceView| {
        view.service.traffic.timeouts.idle = Some(Duration::from_secs(1));
    };
    let pair = Pair::with(endless().await, idle);
    let request = Request::get("/").header("host", "a").body(empty()).unwrap();
    let response = http1(pair.caller.outbound()).await.send(request).await;
    let body = response.unwrap().into_body().collect().await;
    assert!(body.is_err(), "cut, not ended");
    assert_eq!(pair.caller.seen.line(0).await.flags, "SI");

    let silent = Gated::new().await;
    let pair = Pair::with(silent.address, idle);
    assert_eq!(get(pair.caller.outbound(), "/").await.0, 504);
    assert_eq!(pair.caller.seen.line(0).await.flags, "SI");

    let pair = Pair::with(serve(crate::http::upgrading).await, idle);
    let mut tunnel = crate::http::upgraded(pair.caller.outbound()).await;
    crate::http::converse(&mut tunnel, "hello").await;
    let ended = tokio::io::AsyncReadExt::read(&mut tunnel, &mut [0]).await;
    assert!(matches!(ended, Ok(0) | Err(_)));
    assert_eq!(pair.caller.seen.line(0).await.flags, "SI");
}

#[tokio::test]
async fn a_response_that_never_ends_ends_with_its_timeout() {
    let app = endless().await;
    let caller = Setup::caller().start(&Trust::new());
    let mut view = web(&[(app, None)]);
    view.service.traffic.timeouts.request = Some(Duration::from_secs(1));
    caller.known.set_service(view);
    let request = Request::get("/").header("host", "a").body(empty()).unwrap();
    let response = http1(caller.outbound()).await.send(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(
        response.into_body().collect().await.is_err(),
        "cut, not ended"
    );
    assert_eq!(caller.seen.line(0).await.flags, "UT");
}

#[tokio::test]
async fn a_drain_waits_for_connections_that_left_http() {
    let app = serve(crate::http::upgrading).await;
    let pair = Pair::new(app);
    let mut stream = crate::http::upgraded(pair.caller.outbound()).await;
    let mut drained = tokio::spawn(pair.callee.plane.drain(Duration::from_secs(60)));
    let pause = timeout(Duration::from_millis(500), &mut drained);
    assert!(pause.await.is_err(), "it is still carried");
    crate::http::converse(&mut stream, "hello").await;
    drop(stream);
    timeout(Duration::from_secs(10), drained)
        .await
        .unwrap()
        .unwrap();
}

trait Boxed {
    fn boxed_unsync_to_sync(self) -> Body;
}

impl<B> Boxed for B
where
    B: hyper::body::Body<Data = bytes::Bytes, Error = std::convert::Infallible>
        + Send
        + Sync
        + 'static,
{
    fn boxed_unsync_to_sync(self) -> Body {
        self.boxed()
    }
}

#[tokio::test]
async fn a_drain_lets_requests_finish_and_takes_no_more() {
    let mut app = Gated::new().await;
    let pair = Pair::with(app.address, |view| {
        view.service.ports[0].protocol = Protocol::Http1;
    });
    let outbound = pair.caller.outbound();
    let running = tokio::spawn(answer(outbound, "/"));
    app.asked().await;
    let inbound = pair.callee.inbound();
    let drained = tokio::spawn(pair.callee.plane.drain(Duration::from_secs(20)));
    let refused = async {
        while tokio::net::TcpStream::connect(inbound).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(10), refused).await.unwrap();
    assert!(!drained.is_finished());
    app.open();
    assert_eq!(running.await.unwrap(), (200, "done".into()));
    timeout(Duration::from_secs(10), drained)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_drain_closes_idle_connections_and_outlasts_none() {
    let app = serve(|_: Request<hyper::body::Incoming>| async { Response::new(full("x")) }).await;
    let pair = Pair::new(app);
    for address in [pair.caller.outbound(), pair.callee.inbound()] {
        assert_eq!(http1(address).await.get("/").await.0, 200);
    }
    let client = http2(pair.callee.inbound()).await;
    assert_eq!(client.get("/").await.0, 200);
    timeout(
        Duration::from_secs(10),
        pair.callee.plane.drain(Duration::from_secs(60)),
    )
    .await
    .expect("nothing was left to wait for");
}

#[tokio::test]
async fn outbound_stays_until_the_applications_last_connection_and_is_cut_at_the_deadline() {
    let app = serve(|_: Request<hyper::body::Incoming>| async { Response::new(full("x")) }).await;
    let pair = Pair::new(app);
    let mut client = http1(pair.caller.outbound()).await;
    assert_eq!(client.get("/").await.0, 200);
    let outbound = pair.caller.outbound();
    let drained = tokio::spawn(pair.caller.plane.drain(Duration::from_secs(2)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(client.get("/").await.0, 200, "still served");
    assert_eq!(get(outbound, "/").await.0, 200, "a last call of its own");
    timeout(Duration::from_secs(10), drained)
        .await
        .unwrap()
        .unwrap();
    let request = Request::get("/").header("host", "a").body(empty()).unwrap();
    assert!(client.send(request).await.is_err(), "cut");
}
