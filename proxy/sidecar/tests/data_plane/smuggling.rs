//! What stands behind a request that seems to leave HTTP is followed, or is not read at all.

use http::{Request, Response};

use crate::{
    apps::{Body, exchange, full, raw, serve},
    world::{Pair, Setup, Trust, web},
};

/// Two parsers may read it in two ways: it must not get past the proxy.
const AMBIGUOUS: &str = "POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\
    Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n";

async fn plain(request: Request<hyper::body::Incoming>) -> Response<Body> {
    assert!(!request.headers().contains_key("upgrade"));
    Response::new(full("hello"))
}

#[tokio::test]
async fn behind_an_upgrade_for_nobody_requests_are_still_followed() {
    let pair = Pair::new(serve(plain).await);
    for headers in [
        "Upgrade: websocket",
        "Upgrade: websocket\r\nConnection: keep-alive",
        "Upgrade: websocket, h2c\r\nConnection: upgrade",
        "Upgrade: h2c\r\nUpgrade: websocket\r\nConnection: upgrade",
    ] {
        for address in [pair.caller.outbound(), pair.callee.inbound()] {
            let bytes = format!("GET / HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n{AMBIGUOUS}");
            let answer = exchange(address, bytes.as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{headers}: {answer}");
            assert!(answer.contains("HTTP/1.1 400"), "{headers}: {answer}");
            assert_eq!(answer.matches("HTTP/1.1 ").count(), 2, "{answer}");
        }
    }
    let served = pair.callee.seen.get(|recorded| {
        let served = |line: &&crate::world::Line| line.status == 200;
        recorded.lines.iter().filter(served).count()
    });
    assert_eq!(served, 8, "and nothing of what stood behind");
}

#[tokio::test]
async fn behind_an_upgrade_that_the_proxy_itself_refuses_nothing_is_read() {
    let caller = Setup::caller().start(&Trust::new());
    caller.known.set_service(web(&[]));
    for head in [
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
    ] {
        let bytes = format!("{head}{AMBIGUOUS}");
        let answer = exchange(caller.outbound(), bytes.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    }
}

#[tokio::test]
async fn a_server_cannot_leave_http_unasked() {
    let (app, _) =
        raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n").await;
    let pair = Pair::new(app);
    for request in ["GET / HTTP/1.1", "CONNECT a:1 HTTP/1.1"] {
        let host = if request.starts_with('C') { "a:1" } else { "a" };
        let bytes = format!("{request}\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let answer = exchange(pair.caller.outbound(), bytes.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 502"), "{request}: {answer}");
    }
}
