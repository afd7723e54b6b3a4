//! Metrics, health, and what on-call wants to see, over plain HTTP.

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use turnpike_discovery::{Adoption, Counters, Discovery, SubscriberStatus};
use turnpike_kubernetes::Place;

use crate::{feed::Health, metrics::Metrics};

/// Connections at once; further ones wait in the kernel's queue.
const CONNECTIONS: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is closed after this, whatever it does.
const CONNECTION_LIFE: Duration = Duration::from_secs(300);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the pages show.
#[derive(Clone, Debug)]
pub struct Pages {
    pub metrics: Metrics,
    pub discovery: Discovery,
    pub health: Arc<Health>,
}

type Page = Response<Full<Bytes>>;

/// Serves until dropped, and its connections with it.
pub async fn serve(listener: TcpListener, pages: Pages) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let pages = pages.clone();
                connections.spawn(async move {
                    let _permit = permit;
                    let _ = timeout(CONNECTION_LIFE, connection(stream, pages)).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(stream: TcpStream, pages: Pages) {
    let near = match (stream.peer_addr(), stream.local_addr()) {
        (Ok(peer), Ok(local)) => same_host(peer.ip(), local.ip()),
        _ => false,
    };
    let answer = service_fn(move |request: Request<Incoming>| {
        let page = pages.answer(request.method(), request.uri().path(), near);
        async move { Ok::<_, Infallible>(page) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), answer);
    if let Err(error) = served.await {
        tracing::debug!(%error, "HTTP connection failed");
    }
}

/// Over loopback, or from an address of this host to itself.
fn same_host(peer: IpAddr, local: IpAddr) -> bool {
    let (peer, local) = (peer.to_canonical(), local.to_canonical());
    peer.is_loopback() || peer == local
}

impl Pages {
    fn answer(&self, method: &Method, path: &str, near: bool) -> Page {
        if method != Method::GET && method != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "allowed are GET and HEAD\n");
        }
        match path {
            "/metrics" => page(
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                self.metrics.text(),
            ),
            "/healthz/live" => text(StatusCode::OK, "alive\n"),
            "/healthz/ready" => match self.health.why_not_ready() {
                None => text(StatusCode::OK, "ready\n"),
                Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
            },
            "/debug/rejections" | "/debug/status" if !near => text(
                StatusCode::FORBIDDEN,
                "/debug is for callers on the controller's own host: use kubectl port-forward, or \
                 ask over loopback\n",
            ),
            "/debug/rejections" => json(&self.health.rejections()),
            "/debug/status" => json(&self.status()),
            _ => text(
                StatusCode::NOT_FOUND,
                "there are /metrics, /healthz/live, /healthz/ready, /debug/rejections, \
                 /debug/status\n",
            ),
        }
    }

    fn status(&self) -> Status {
        let statuses = self.discovery.read(turnpike_model::Model::statuses);
        let policies = statuses.into_iter().map(|status| {
            let shaped = self.discovery.read(|model| model.shaped_by(&status.object));
            let conditions = status
                .conditions
                .into_iter()
                .map(|condition| ConditionStatus {
                    condition: condition.kind.to_string(),
                    status: condition.holds,
                    reason: condition.reason,
                    message: condition.message,
                });
            PolicyStatus {
                place: self.health.place(&status.object),
                object: status.object.to_string(),
                parent: status.parent,
                conditions: conditions.collect(),
                proxies: self.discovery.adoption(&shaped),
            }
        });
        Status {
            ready: self.health.why_not_ready().is_none(),
            policies: policies.collect(),
            discovery: self.discovery.counters(),
            subscribers: self.discovery.status(),
        }
    }
}

#[derive(Serialize)]
struct Status {
    ready: bool,
    policies: Vec<PolicyStatus>,
    discovery: Counters,
    subscribers: Vec<SubscriberStatus>,
}

#[derive(Serialize)]
struct PolicyStatus {
    object: String,
    /// Where something does not hold, and the object is in a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    conditions: Vec<ConditionStatus>,
    proxies: Adoption,
}

#[derive(Serialize)]
struct ConditionStatus {
    #[serde(rename = "type")]
    condition: String,
    status: bool,
    reason: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
}

fn json(content: &impl Serialize) -> Page {
    match serde_json::to_vec_pretty(content) {
        Ok(body) => page(StatusCode::OK, "application/json", body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Page {
    page(status, "text/plain; charset=utf-8", body)
}

fn page(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Page {
    let mut page = Response::new(Full::new(body.into()));
    *page.status_mut() = status;
    page.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static(content_type),
    );
    page
}

#[cfg(test)]
mod tests {
    use turnpike_model::{Model, Settings};

    use super::*;

    fn pages() -> Pages {
        let settings = Settings {
            cluster: "cluster".into(),
            trust_domain: "cluster.local".into(),
            network: "default".into(),
        };
        Pages {
            metrics: Metrics::new(),
            discovery: Discovery::new(Model::new(settings)),
            health: Arc::default(),
        }
    }

    #[tokio::test]
    async fn connections_end_with_the_server() {
        use tokio::{io::AsyncReadExt, io::AsyncWriteExt, task::yield_now};
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let pages = pages();
        let health = pages.health.clone();
        let server = tokio::spawn(serve(listener, pages));
        let mut client = TcpStream::connect(address).await.unwrap();
        let ask = b"GET /healthz/live HTTP/1.1\r\nhost: x\r\n\r\n";
        client.write_all(ask).await.unwrap();
        client.read_u8().await.unwrap();
        server.abort();
        let _ = server.await;
        for _ in 0..100 {
            yield_now().await;
        }
        assert_eq!(
            Arc::strong_count(&health),
            1,
            "nobody serves pages any more"
        );
    }

    #[test]
    fn debug_pages_are_for_the_same_host() {
        let pages = pages();
        let status = |path, near| pages.answer(&Method::GET, path, near).status();
        for path in ["/debug/rejections", "/debug/status"] {
            assert_eq!(status(path, true), StatusCode::OK);
            assert_eq!(status(path, false), StatusCode::FORBIDDEN);
        }
        assert_eq!(status("/metrics", false), StatusCode::OK);
        assert_eq!(
            status("/healthz/ready", false),
            StatusCode::SERVICE_UNAVAILABLE
        );
        let post = pages.answer(&Method::POST, "/metrics", true).status();
        assert_eq!(post, StatusCode::METHOD_NOT_ALLOWED);
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(same_host(ip("::ffff:127.0.0.1"), ip("127.0.0.1")));
        assert!(same_host(ip("10.0.0.10"), ip("10.0.0.10")));
        assert!(!same_host(ip("10.0.0.11"), ip("10.0.0.10")));
    }
}
