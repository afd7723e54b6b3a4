//! Requests through a pair of sidecars arrive as they were sent, and so do responses.

use std::sync::{Arc, Mutex};

use http::{HeaderMap, Request, Response, Version};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use turnpike_sidecar::observe::Direction;

use crate::{
    apps::{Body, empty, exchange, full, http1, http2, raw, read, serve, streamed},
    world::{Pair, Setup, Trust, identity, key, web},
};

/// Tells the client what reached the application.
async fn echo(request: Request<hyper::body::Incoming>) -> Response<Body> {
    let mut seen = format!(
        "{:?} {} {}\n",
        request.version(),
        request.method(),
        request.uri()
    );
    for (name, value) in request.headers() {
        seen += &format!("{name}: {}\n", value.to_str().unwrap());
    }
    let body = request.into_body().collect().await.unwrap().to_bytes();
    seen += &String::from_utf8_lossy(&body);
    Response::new(full(seen))
}

#[tokio::test]
async fn http1_stays_http1_and_says_who_called() {
    let pair = Pair::new(serve(echo).await);
    let mut client = http1(pair.caller.outbound()).await;
    for number in 0..3 {
        let request = Request::post(format!("/a/../b?n={number}"))
            .header("host", "web.shop")
            .header(
                "x-forwarded-client-cert",
                "URI=spiffe://cluster.local/ns/shop/sa/admin",
            )
            .header("X_Forwarded_Client_Cert", "URI=admin")
            .header("x-envoy-peer-metadata", "admin")
            .header("connection", "x-secret")
            .header("x-secret", "1")
            .body(full("hello"));
        let (status, seen) = read(client.send(request.unwrap()).await.unwrap()).await;
        assert_eq!(status, 200);
        assert!(
            seen.starts_with(&format!("HTTP/1.1 POST /a/../b?n={number}\n")),
            "{seen}"
        );
        assert!(seen.ends_with("hello"), "{seen}");
        assert!(
            !seen.contains("admin") && !seen.contains("x-secret"),
            "{seen}"
        );
        let by = format!("By={};URI={}\n", identity("web"), identity("caller"));
        assert!(
            seen.contains(&format!("x-forwarded-client-cert: {by}")),
            "{seen}"
        );
    }
    let line = pair.caller.seen.line(2).await;
    assert_eq!(
        (line.status, line.flags.as_str(), line.received),
        (200, "-", 5)
    );
    assert_eq!(line.peer, Some(identity("web")));
    let inbound = pair.callee.seen.line(0).await;
    assert_eq!(inbound.peer, Some(identity("caller")));
    let (labels, outcome) = pair
        .callee
        .seen
        .wait(|recorded| recorded.outcomes.first().cloned())
        .await;
    assert_eq!(labels.direction, Direction::Inbound);
    assert_eq!((labels.service, labels.mutual_tls), (Some(key()), true));
    assert_eq!((outcome.status, outcome.request_bytes), (200, 5));
    assert!(outcome.response_bytes > 100);
}

#[tokio::test]
async fn header_case_survives() {
    let (app, _) = raw(b"HTTP/1.1 200 OK\r\nX-MixedCase: Yes\r\nContent-Length: 2\r\n\r\nok").await;
    let pair = Pair::new(app);
    let answer = exchange(
        pair.caller.outbound(),
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(answer.contains("X-MixedCase: Yes"), "{answer}");
}

#[tokio::test]
async fn http2_carries_trailers_both_ways() {
    let app = serve(|request: Request<hyper::body::Incoming>| async move {
        assert_eq!(request.version(), Version::HTTP_2);
        let collected = request.into_body().collect().await.unwrap();
        let asked = collected.trailers().unwrap();
        assert_eq!(asked.len(), 1, "{asked:?}");
        let asked = asked["x-asked"].clone();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        trailers.insert("x-asked", asked);
        let body = streamed(&["one", "two"], trailers);
        Response::builder()
            .header("content-type", "application/grpc")
            .body(body)
            .unwrap()
    })
    .await;
    let pair = Pair::new(app);
    let client = http2(pair.caller.outbound()).await;
    for _ in 0..2 {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-asked", "yes".parse().unwrap());
        trailers.insert("x-forwarded-client-cert", "URI=admin".parse().unwrap());
        let request = Request::post("http://web.shop/svc/Method")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(streamed(&["question"], trailers));
        let response = client.send(request.unwrap()).await.unwrap();
        let collected = response.into_body().collect().await.unwrap();
        assert_eq!(collected.trailers().unwrap()["x-asked"], "yes");
        assert_eq!(collected.to_bytes(), "onetwo");
    }
    let (labels, outcome) = pair
        .caller
        .seen
        .wait(|recorded| recorded.outcomes.get(1).cloned())
        .await;
    assert!(labels.grpc);
    assert_eq!(outcome.grpc_status, Some(0));
}

#[tokio::test]
async fn many_streams_at_once() {
    let pair = Pair::new(serve(echo).await);
    let client = Arc::new(http2(pair.caller.outbound()).await);
    let calls = (0..300).map(|number| {
        let client = client.clone();
        tokio::spawn(async move { client.get(&format!("/{number}")).await })
    });
    for (number, call) in calls.collect::<Vec<_>>().into_iter().enumerate() {
        let (status, seen) = call.await.unwrap();
        assert_eq!(status, 200);
        assert!(seen.contains(&format!("/{number}\n")), "{seen}");
    }
}

#[tokio::test]
async fn large_bodies_pass_in_both_directions() {
    let app = serve(|request: Request<hyper::body::Incoming>| async move {
        Response::new(full(
            request.into_body().collect().await.unwrap().to_bytes(),
        ))
    })
    .await;
    let pair = Pair::new(app);
    let data = vec![b'x'; 3_000_000];
    let mut client = http1(pair.caller.outbound()).await;
    let request = Request::post("/")
        .header("host", "a")
        .body(full(data.clone()))
        .unwrap();
    let (status, body) = read(client.send(request).await.unwrap()).await;
    assert_eq!((status, body.len()), (200, data.len()));
    let client = http2(pair.caller.outbound()).await;
    let request = Request::post("http://a/").body(full(data.clone())).unwrap();
    let (status, body) = read(client.send(request).await.unwrap()).await;
    assert_eq!((status, body.len()), (200, data.len()));
}

/// Grants `Upgrade: echo` and sends back what comes, in upper case.
pub(crate) async fn upgrading(mut request: Request<hyper::body::Incoming>) -> Response<Body> {
    if request
        .headers()
        .get("upgrade")
        .is_none_or(|protocol| protocol != "echo")
    {
        return Response::builder().status(400).body(empty()).unwrap();
    }
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgrade.await.unwrap());
        let mut buffer = [0; 100];
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            buffer[..count].make_ascii_uppercase();
            stream.write_all(&buffer[..count]).await.unwrap();
        }
    });
    let response = Response::builder().status(101).header("upgrade", "echo");
    response
        .header("connection", "upgrade")
        .body(empty())
        .unwrap()
}

pub(crate) type Tunnel = TokioIo<hyper::upgrade::Upgraded>;

/// A connection that has left HTTP for `echo`.
pub(crate) async fn upgraded(address: std::net::SocketAddr) -> Tunnel {
    let mut client = http1(address).await;
    let request = Request::get("/")
        .header("host", "a")
        .header("connection", "upgrade");
    let request = request.header("upgrade", "echo").body(empty()).unwrap();
    let mut response = client.send(request).await.unwrap();
    assert_eq!(response.status(), 101);
    assert_eq!(response.headers()["upgrade"], "echo");
    TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap())
}

pub(crate) async fn converse(stream: &mut Tunnel, word: &str) {
    stream.write_all(word.as_bytes()).await.unwrap();
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, word.to_ascii_uppercase().as_bytes());
}

#[tokio::test]
async fn upgrades_pass_and_carry_bytes_of_their_own() {
    let pair = Pair::new(serve(upgrading).await);
    let mut stream = upgraded(pair.caller.outbound()).await;
    for word in ["bare\nline", "\0binary"] {
        converse(&mut stream, word).await;
    }
    assert_eq!(pair.caller.plane.open_connections().1, 1);
    drop(stream);
    let line = pair.caller.seen.line(0).await;
    assert_eq!((line.status, line.received, line.sent), (101, 16, 16));
}

#[tokio::test]
async fn nothing_reaches_the_application_before_an_upgrade_is_granted() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = seen.clone();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 4096];
        // Waits a little for what should not come.
        let more = tokio::time::Duration::from_millis(300);
        while let Ok(Ok(count @ 1..)) = tokio::time::timeout(more, stream.read(&mut buffer)).await {
            record.lock().unwrap().extend_from_slice(&buffer[..count]);
        }
        let _ = stream
            .write_all(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
            .await;
        let _ = stream.read(&mut buffer).await;
    });
    let pair = Pair::new(app);
    let request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n\
        POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
    let answer = exchange(pair.caller.outbound(), request).await;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    assert!(
        answer.to_ascii_lowercase().contains("connection: close"),
        "{answer}"
    );
    let seen = String::from_utf8_lossy(&seen.lock().unwrap()).into_owned();
    assert!(
        seen.contains("GET / HTTP/1.1") && !seen.contains("smuggled"),
        "{seen}"
    );
}

#[tokio::test]
async fn connect_tunnels_after_2xx() {
    let app = serve(|mut request: Request<hyper::body::Incoming>| async move {
        assert_eq!(request.method(), "CONNECT");
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.unwrap());
            stream.write_all(b"inside").await.unwrap();
        });
        Response::new(empty())
    })
    .await;
    let pair = Pair::new(app);
    let request = b"CONNECT other.example:443 HTTP/1.1\r\nHost: other.example:443\r\n\r\n";
    let answer = exchange(pair.caller.outbound(), request).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\ninside"),
        "{answer}"
    );
}

#[tokio::test]
async fn an_endpoint_without_a_sidecar_is_spoken_to_in_plaintext() {
    // It claims to be a proxy's answer.
    let app = serve(|_: Request<hyper::body::Incoming>| async {
        let claims = Response::builder().header("x-turnpike-error", "connect");
        claims.body(empty()).unwrap()
    })
    .await;
    let caller = Setup::caller().start(&Trust::new());
    caller.known.set_service(web(&[(app, None)]));
    let request = Request::get("/").header("host", "a").body(empty()).unwrap();
    let response = http1(caller.outbound()).await.send(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(!response.headers().contains_key("x-turnpike-error"));
    assert!(
        !caller
            .seen
            .wait(|recorded| recorded.outcomes.first().cloned())
            .await
            .0
            .mutual_tls
    );
}

#[tokio::test]
async fn several_workers_share_the_connections() {
    let app = serve(echo).await;
    let trust = Trust::new();
    let callee = Setup {
        workers: 3,
        ..Setup::callee("web", app)
    }
    .start(&trust);
    let caller = Setup {
        workers: 3,
        ..Setup::caller()
    }
    .start(&trust);
    caller
        .known
        .set_service(web(&[(callee.inbound(), Some("web"))]));
    let mut clients = Vec::new();
    for _ in 0..9 {
        clients.push(http1(caller.outbound()).await);
    }
    for round in 0..3 {
        for client in &mut clients {
            assert_eq!(client.get(&format!("/{round}")).await.0, 200);
        }
    }
    assert_eq!(caller.plane.open_connections().1, 9);
}
