//! The pages of a daemon: what people, kubelet and Prometheus ask of it over plain HTTP.
//!
//! The ports are open to pods, some of which may mean harm: whoever holds connections, sends heads
//! slowly or reads no answer keeps nobody else from being answered.

use std::{convert::Infallible, net::IpAddr, time::Duration};

use http::{
    HeaderValue,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

use crate::slots::ConnectionSlots;

pub use http::{Method, StatusCode, Uri};

/// Connections at once.
const CONNECTIONS: usize = 64;
/// For which a connection keeps its slot where others wait: half of what kubelet's probes wait.
const SLOT_TIME: Duration = Duration::from_millis(500);
/// For a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const HEAD_BYTES: usize = 16 * 1024;
/// After a failed accept (no descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a connection lives at most, whatever it does: one that does not read its answer would
/// keep its slot for good.
pub const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);

/// What is asked. Bodies are not read.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    pub uri: Uri,
    /// Over loopback, or from an address of this host to itself.
    pub from_this_host: bool,
}

impl Request {
    /// Whether nothing is to be changed by it (RFC 9110, 9.2.1): GET or HEAD.
    pub fn is_safe(&self) -> bool {
        self.method == Method::GET || self.method == Method::HEAD
    }
}

/// A whole answer.
pub type Response = http::Response<Full<Bytes>>;

/// Answers at `listener`, one request a connection, until dropped; its connections end with it. None
/// lives longer than `lifetime`, usually [`CONNECTION_LIFETIME`].
pub async fn serve<A, F>(listener: TcpListener, lifetime: Duration, answer: A)
where
    A: Fn(Request) -> F + Clone + Send + 'static,
    F: Future<Output = Response> + Send + 'static,
{
    let mut slots = ConnectionSlots::new(CONNECTIONS, SLOT_TIME);
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let near = is_from_this_host(&stream);
                let connection = connection(stream, near, lifetime, answer.clone());
                slots.take(peer.ip(), connection).await;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection<A, F>(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    from_this_host: bool,
    lifetime: Duration,
    answer: A,
) where
    A: Fn(Request) -> F,
    F: Future<Output = Response>,
{
    let service = service_fn(move |request: http::Request<Incoming>| {
        let (head, _) = request.into_parts();
        let response = answer(Request {
            method: head.method,
            uri: head.uri,
            from_this_host,
        });
        async move { Ok::<_, Infallible>(response.await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(lifetime, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an HTTP connection broke off"),
        Err(_) => tracing::debug!(?lifetime, "an HTTP connection took too long"),
    }
}

fn is_from_this_host(stream: &TcpStream) -> bool {
    match (stream.peer_addr(), stream.local_addr()) {
        (Ok(peer), Ok(local)) => same_host(peer.ip(), local.ip()),
        _ => false,
    }
}

fn same_host(peer: IpAddr, local: IpAddr) -> bool {
    let (peer, local) = (peer.to_canonical(), local.to_canonical());
    peer.is_loopback() || peer == local
}

/// The process is there.
pub fn live() -> Response {
    text(StatusCode::OK, "ok\n")
}

/// 503 with the reason where the process is `unready`.
pub fn ready(unready: Option<impl std::fmt::Display>) -> Response {
    match unready {
        None => text(StatusCode::OK, "ready\n"),
        Some(why) => text(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {why}\n"),
        ),
    }
}

/// For requests that would change something.
pub fn read_only() -> Response {
    let mut response = text(
        StatusCode::METHOD_NOT_ALLOWED,
        "this is only read: use GET or HEAD\n",
    );
    let allowed = HeaderValue::from_static("GET, HEAD");
    response.headers_mut().insert(ALLOW, allowed);
    response
}

/// Plain text; a line ends in a newline.
pub fn text(status: StatusCode, text: impl Into<Bytes>) -> Response {
    respond(status, "text/plain; charset=utf-8", text)
}

/// JSON as people read it.
pub fn json(content: &impl Serialize) -> Response {
    match serde_json::to_vec_pretty(content) {
        Ok(mut body) => {
            body.push(b'\n');
            respond(StatusCode::OK, "application/json", body)
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// Metrics as Prometheus reads them: text as its OpenMetrics format wants it.
pub fn metrics(exposition: impl Into<Bytes>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    respond(StatusCode::OK, kind, exposition)
}

pub fn respond(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const ASK: &[u8] = b"GET /page?a=b HTTP/1.1\r\nhost: x\r\n\r\n";

    async fn echo(request: Request) -> Response {
        let Request {
            method,
            uri,
            from_this_host,
        } = request;
        text(StatusCode::OK, format!("{method} {uri} {from_this_host}\n"))
    }

    /// Far beyond what anything here takes.
    const PATIENCE: Duration = Duration::from_secs(30);

    async fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").await.unwrap()
    }

    #[tokio::test]
    async fn who_asks_is_answered_once() {
        let listener = listener().await;
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(serve(listener, CONNECTION_LIFETIME, echo));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(ASK).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.ends_with("GET /page?a=b true\n"), "{answer}");
        serving.abort();
    }

    #[tokio::test]
    async fn those_who_hold_connections_do_not_keep_kubelet_waiting() {
        let listener = listener().await;
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(serve(listener, CONNECTION_LIFETIME, echo));
        let mut held = Vec::new();
        for _ in 0..2 * CONNECTIONS {
            held.push(TcpStream::connect(address).await.unwrap());
        }
        let mut probe = TcpStream::connect(address).await.unwrap();
        probe.write_all(ASK).await.unwrap();
        let mut answer = Vec::new();
        // Before the time is up for the heads of those who hold them.
        let answered = timeout(HEAD_TIMEOUT / 2, probe.read_to_end(&mut answer)).await;
        answered.expect("a probe waits a second").unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"));
        serving.abort();
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_let_go() {
        // Less than the head of an answer.
        let (mut client, server) = tokio::io::duplex(16);
        let life = Duration::from_millis(50);
        let serving = tokio::spawn(connection(server, false, life, echo));
        let _ = client.write_all(ASK).await;
        let ended = timeout(PATIENCE, serving).await;
        ended.expect("it holds its place for good").unwrap();
        drop(client);
    }

    #[tokio::test]
    async fn connections_end_with_the_server() {
        let listener = listener().await;
        let address = listener.local_addr().unwrap();
        let held = Arc::new(());
        let holds = held.clone();
        let answer = move |_| {
            let holds = holds.clone();
            async move {
                let _holds = holds;
                std::future::pending().await
            }
        };
        let serving = tokio::spawn(serve(listener, CONNECTION_LIFETIME, answer));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(ASK).await.unwrap();
        let asked = async {
            while Arc::strong_count(&held) < 3 {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, asked).await.unwrap();
        serving.abort();
        let _ = serving.await;
        let closed = timeout(PATIENCE, client.read_u8()).await;
        closed.expect("nobody serves it any more").unwrap_err();
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[test]
    fn a_host_is_near_to_itself() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(same_host(ip("::ffff:127.0.0.1"), ip("127.0.0.1")));
        assert!(same_host(ip("10.0.0.10"), ip("10.0.0.10")));
        assert!(!same_host(ip("10.0.0.11"), ip("10.0.0.10")));
    }
}
