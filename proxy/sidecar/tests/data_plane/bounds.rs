//! What hostile and broken clients get, and that their neighbours do not notice.

use std::{sync::Arc, time::Duration};

use http::{Request, Response};
use tokio::{io::AsyncWriteExt, net::TcpStream};
use turnpike_rules::service::Protocol;
use turnpike_sidecar::{config::Bounds, observe::RefusalReason};

use crate::{
    apps::{Body, exchange, full, get, http1, raw, serve, to_end},
    world::{Pair, Setup, Trust, web},
};

async fn hello(_: Request<hyper::body::Incoming>) -> Response<Body> {
    Response::new(full("hello"))
}

/// A ClientHello as rustls makes it.
pub(crate) fn client_hello(name: &'static str, alpn: &str) -> Vec<u8> {
    let provider = turnpike_certs::crypto_provider();
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    let name = name.try_into().unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

#[tokio::test]
async fn malformed_requests_are_answered_400_and_the_connection_closed() {
    let app = serve(hello).await;
    let pair = Pair::new(app);
    let cases: &[(&str, &str)] = &[
        (
            "both framings",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "two lengths",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
        ),
        (
            "not only chunked",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "chunked in HTTP/1.0",
            "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "folded header",
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
        ),
        ("bare line feed", "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n"),
        ("space before colon", "GET / HTTP/1.1\r\nHost : a\r\n\r\n"),
        ("no host", "GET / HTTP/1.1\r\n\r\n"),
        ("two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
        ("user part", "GET / HTTP/1.1\r\nHost: allowed@evil\r\n\r\n"),
        (
            "host with a zone",
            "GET / HTTP/1.1\r\nHost: [fe80::1%eth0]\r\n\r\n",
        ),
        ("octal host", "GET / HTTP/1.1\r\nHost: 0177.0.0.1\r\n\r\n"),
        (
            "two authorities",
            "GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n",
        ),
        (
            "CONNECT without authority",
            "CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "NUL in a header",
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
        ),
    ];
    for (what, request) in cases {
        for address in [pair.caller.outbound(), pair.callee.inbound()] {
            let answer = exchange(address, request.as_bytes()).await;
            assert!(
                answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.0 400"),
                "{what}: {answer:?}"
            );
            assert_eq!(
                answer.matches("HTTP/1.").count(),
                1,
                "{what}: closed after it: {answer:?}"
            );
        }
    }
    pair.caller.seen.refusal(RefusalReason::Malformed).await;
    pair.callee.seen.refusal(RefusalReason::Malformed).await;
    assert_eq!(get(pair.caller.outbound(), "/").await.0, 200);
}

#[tokio::test]
async fn a_smuggled_request_behind_a_good_one_is_not_served() {
    let pair = Pair::new(serve(hello).await);
    let requests = "GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\
        Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n";
    let answer = exchange(pair.caller.outbound(), requests.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("HTTP/1.1 400"), "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 2, "{answer}");
}

#[tokio::test]
async fn heads_have_a_most() {
    let bounds = Bounds {
        head_bytes: 16 * 1024,
        headers: 20,
        ..Bounds::default()
    };
    let caller = Setup {
        bounds,
        ..Setup::caller()
    }
    .start(&Trust::new());
    caller.known.set_service(web(&[(serve(hello).await, None)]));
    let many = (0..30).map(|n| format!("X-{n}: y\r\n")).collect::<String>();
    let large = format!("X: {}\r\n", "y".repeat(20_000));
    for headers in [many, large] {
        let request = format!("GET / HTTP/1.1\r\nHost: a\r\n{headers}\r\n");
        let answer = exchange(caller.outbound(), request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer:?}");
    }
    // HPACK makes much of little: what counts is what it decodes to.
    let stream = TcpStream::connect(caller.outbound()).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut request = Request::get("http://a/");
    let value = "y".repeat(1000);
    for _ in 0..17 {
        request = request.header("x-same", &value);
    }
    let (response, _) = client
        .send_request(request.body(()).unwrap(), true)
        .unwrap();
    match response.await {
        Ok(response) => assert_eq!(response.status(), 431),
        Err(error) => assert!(error.is_remote(), "{error}"),
    }
}

#[tokio::test]
async fn slow_heads_are_cut_while_neighbours_are_served() {
    let app = serve(hello).await;
    let bounds = Bounds {
        head: Duration::from_millis(600),
        ..Bounds::default()
    };
    let trust = Trust::new();
    let callee = Setup {
        bounds: bounds.clone(),
        ..Setup::callee("web", app)
    }
    .start(&trust);
    let caller = Setup {
        bounds,
        ..Setup::caller()
    }
    .start(&trust);
    let mut view = web(&[(callee.inbound(), Some("web"))]);
    view.service.ports[0].protocol = Protocol::Http1;
    caller.known.set_service(view);
    let beginnings: [&[u8]; 3] = [
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ",
        b"GET / HT",
        b"\x16\x03\x01\x02\x00\x01",
    ];
    let mut slow = Vec::new();
    for address in [caller.outbound(), callee.inbound()] {
        for bytes in beginnings {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            slow.push(stream);
        }
    }
    let outbound = caller.outbound();
    let neighbour = tokio::spawn(async move {
        let mut neighbour = http1(outbound).await;
        for _ in 0..100 {
            assert_eq!(neighbour.get("/").await.0, 200);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    for mut stream in slow {
        to_end(&mut stream).await;
    }
    neighbour.await.unwrap();
    caller.seen.refusal(RefusalReason::Slow).await;
    callee.seen.refusal(RefusalReason::Slow).await;
}

#[tokio::test]
async fn rapid_resets_end_the_connection_and_not_the_proxy() {
    let pair = Pair::new(serve(hello).await);
    let stream = TcpStream::connect(pair.caller.outbound()).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    let driven = tokio::spawn(connection);
    for _ in 0..20_000 {
        let Ok(ready) = client.clone().ready().await else {
            break;
        };
        client = ready;
        let request = Request::get("http://a/").body(()).unwrap();
        let Ok((_, mut stream)) = client.send_request(request, true) else {
            break;
        };
        stream.send_reset(h2::Reason::CANCEL);
    }
    let ended = tokio::time::timeout(Duration::from_secs(20), driven).await;
    assert!(ended.expect("the connection was closed").unwrap().is_err());
    assert_eq!(get(pair.caller.outbound(), "/").await.0, 200);
}

#[tokio::test]
async fn connections_over_the_cap_wait_until_one_ends() {
    let app = serve(hello).await;
    let bounds = Bounds {
        connections: 2,
        ..Bounds::default()
    };
    let caller = Setup {
        bounds,
        ..Setup::caller()
    }
    .start(&Trust::new());
    caller.known.set_service(web(&[(app, None)]));
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut client = http1(caller.outbound()).await;
        assert_eq!(client.get("/").await.0, 200);
        held.push(client);
    }
    let outbound = caller.outbound();
    let third = tokio::spawn(async move { get(outbound, "/").await });
    caller.seen.refusal(RefusalReason::Overload).await;
    assert!(!third.is_finished());
    held.pop();
    assert_eq!(third.await.unwrap().0, 200);
}

#[tokio::test]
async fn a_server_that_speaks_nonsense_is_a_502() {
    let (app, _) = raw(b"not http at all\r\n\r\n").await;
    let caller = Setup::caller().start(&Trust::new());
    caller.known.set_service(web(&[(app, None)]));
    let (status, body) = get(caller.outbound(), "/").await;
    assert_eq!(status, 502, "{body}");
    assert_eq!(caller.seen.line(0).await.flags, "UPE");
}
