//! The pages of a daemon: what people, kubelet and Prometheus ask of it over plain HTTP.
//!
//! The ports are open to pods, some of which may mean harm: whoever holds connections, sends heads
//! slowly or reads no answer keeps nobody else from being answered.

use std::{convert::Infallible, net::IpAddr, time::Duration};

use http::{HeaderValue, Request, Response, header::CONTENT_TYPE};
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

use crate::places::Places;

pub use http::{Method, StatusCode, Uri};

/// Connections at once.
const CONNECTIONS: usize = 64;
/// For a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const HEAD_BYTES: usize = 16 * 1024;
/// After a failed accept (no descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a connection lives at most, whatever it does: one that does not read its answer would
/// keep its place for good.
pub const LIFE: Duration = Duration::from_secs(60);

/// A whole answer.
pub type Page = Response<Full<Bytes>>;

/// What was asked. Bodies are not read.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: Method,
    pub uri: Uri,
    /// Over loopback, or from an address of this host to itself.
    pub near: bool,
}

impl Asked {
    /// Whether nothing is to be changed: GET or HEAD.
    pub fn reads(&self) -> bool {
        self.method == Method::GET || self.method == Method::HEAD
    }
}

/// Answers what is asked at `listener`, one request a connection, until dropped; its connections
/// end with it. None lives longer than `life`, usually [`LIFE`].
pub async fn serve<A, F>(listener: TcpListener, life: Duration, answer: A)
where
    A: Fn(Asked) -> F + Clone + Send + 'static,
    F: Future<Output = Page> + Send + 'static,
{
    let mut places = Places::new(CONNECTIONS);
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let near = near(&stream);
                places.take(peer.ip(), connection(stream, near, life, answer.clone()));
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
    near: bool,
    life: Duration,
    answer: A,
) where
    A: Fn(Asked) -> F,
    F: Future<Output = Page>,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let (head, _) = request.into_parts();
        let page = answer(Asked {
            method: head.method,
            uri: head.uri,
            near,
        });
        async move { Ok::<_, Infallible>(page.await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(life, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an HTTP connection broke off"),
        Err(_) => tracing::debug!("an HTTP client did not read its answer"),
    }
}

fn near(stream: &TcpStream) -> bool {
    match (stream.peer_addr(), stream.local_addr()) {
        (Ok(peer), Ok(local)) => same_host(peer.ip(), local.ip()),
        _ => false,
    }
}

fn same_host(peer: IpAddr, local: IpAddr) -> bool {
    let (peer, local) = (peer.to_canonical(), local.to_canonical());
    peer.is_loopback() || peer == local
}

/// Plain text; a line ends in a newline.
pub fn text(status: StatusCode, text: impl Into<Bytes>) -> Page {
    page(status, "text/plain; charset=utf-8", text)
}

/// JSON as people read it.
pub fn json(content: &impl Serialize) -> Page {
    match serde_json::to_vec_pretty(content) {
        Ok(mut body) => {
            body.push(b'\n');
            page(StatusCode::OK, "application/json", body)
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// Metrics as Prometheus reads them: text as its OpenMetrics format wants it.
pub fn metrics(exposition: impl Into<Bytes>) -> Page {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    page(StatusCode::OK, kind, exposition)
}

pub fn page(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Page {
    let mut page = Response::new(Full::new(body.into()));
    *page.status_mut() = status;
    let kind = HeaderValue::from_static(content_type);
    page.headers_mut().insert(CONTENT_TYPE, kind);
    page
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const ASK: &[u8] = b"GET /page?a=b HTTP/1.1\r\nhost: x\r\n\r\n";

    async fn echo(asked: Asked) -> Page {
        let Asked { method, uri, near } = asked;
        text(StatusCode::OK, format!("{method} {uri} {near}\n"))
    }

    async fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").await.unwrap()
    }

    #[tokio::test]
    async fn who_asks_is_answered_once() {
        let listener = listener().await;
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(serve(listener, LIFE, echo));
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
        let serving = tokio::spawn(serve(listener, LIFE, echo));
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
        let ended = timeout(Duration::from_secs(30), serving).await;
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
        let serving = tokio::spawn(serve(listener, LIFE, answer));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(ASK).await.unwrap();
        while Arc::strong_count(&held) < 3 {
            sleep(Duration::from_millis(1)).await;
        }
        serving.abort();
        let _ = serving.await;
        let closed = timeout(Duration::from_secs(30), client.read_u8()).await;
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
