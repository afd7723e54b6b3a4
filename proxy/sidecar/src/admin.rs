//! What people, kubelet and Prometheus ask of a running proxy.
//!
//! Three listeners: 15000 on loopback answers questions and sets the log level; 15020 gives the
//! metrics, 15021 the readiness, both to the whole network and nothing else. No answer contains a
//! key.

use std::{
    borrow::Cow,
    collections::VecDeque,
    fmt, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpSocket},
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use turnpike_certs::CredentialStore;

use crate::{
    control::store::Store,
    telemetry::{Gauges, Telemetry},
};

/// Connections of each listener at once. At one more the oldest is closed: kubelet and Prometheus
/// ask at once and are answered at once, so that it is one of somebody who means to be in the way.
const CONNECTIONS: usize = 64;
/// For a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is closed after this, whatever it does: one that does not read its answer would
/// keep its place for good.
const CONNECTION_LIFE: Duration = Duration::from_secs(60);
/// After a failed accept (no descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where each listener stands.
#[derive(Clone, Debug)]
pub struct AdminConfig {
    pub admin: SocketAddr,
    pub metrics: SocketAddr,
    pub ready: SocketAddr,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self {
            admin: (Ipv4Addr::LOCALHOST, 15000).into(),
            metrics: (Ipv6Addr::UNSPECIFIED, 15020).into(),
            ready: (Ipv6Addr::UNSPECIFIED, 15021).into(),
        }
    }
}

/// What the proxy is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for the certificate and the pod's own configuration.
    Starting,
    Serving,
    /// Told to stop: no new work, finishing what is there.
    Draining,
    /// A task that should not has ended: as draining, to be started anew.
    Failed(&'static str),
}

/// Sets the log filter, as `RUST_LOG` writes it, or says what is wrong with it.
pub type SetLevel = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// What the answers are made of.
pub struct State {
    pub store: Store,
    pub credentials: Arc<CredentialStore>,
    /// Set when the pod's own configuration has come.
    pub telemetry: OnceLock<Arc<Telemetry>>,
    pub phase: watch::Sender<Phase>,
    pub set_level: SetLevel,
}

impl State {
    /// Why the proxy is not ready; `None`: it is.
    fn unready(&self) -> Option<Cow<'static, str>> {
        let why = match *self.phase.borrow() {
            Phase::Failed(task) => {
                let why = format!("the task `{task}` has failed, the log says why; restarting");
                return Some(why.into());
            }
            Phase::Draining => "draining",
            _ if self.credentials.load().is_none() => {
                "waiting for a certificate from the CA; the log says why it takes long"
            }
            _ if self.store.own_now().is_none() => {
                "waiting for this pod's configuration from the controller"
            }
            Phase::Starting => "starting",
            Phase::Serving => return None,
        };
        Some(why.into())
    }

    fn gauges(&self) -> Gauges {
        let certificate = self.credentials.load();
        Gauges {
            connected: self.store.connected(),
            refused_updates: self.store.refused(),
            certificate_expiry: certificate.map_or(0, |current| unix(current.not_after())),
        }
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("phase", &*self.phase.borrow())
            .finish_non_exhaustive()
    }
}

/// The bound listeners.
#[derive(Debug)]
pub struct Admin {
    admin: TcpListener,
    metrics: TcpListener,
    ready: TcpListener,
}

impl Admin {
    /// Binds all three, or none.
    pub fn bind(config: &AdminConfig) -> io::Result<Self> {
        let AdminConfig {
            admin,
            metrics,
            ready,
        } = config;
        Ok(Self {
            admin: bind(*admin)?,
            metrics: bind(*metrics)?,
            ready: bind(*ready)?,
        })
    }

    /// Where admin, metrics and readiness are answered.
    pub fn addresses(&self) -> io::Result<[SocketAddr; 3]> {
        let Self {
            admin,
            metrics,
            ready,
        } = self;
        Ok([
            admin.local_addr()?,
            metrics.local_addr()?,
            ready.local_addr()?,
        ])
    }

    /// Answers for as long as it is polled.
    pub async fn serve(self, state: Arc<State>) {
        tokio::join!(
            listen(self.admin, state.clone(), answer_admin),
            listen(self.metrics, state.clone(), answer_metrics),
            listen(self.ready, state, answer_ready),
        );
    }
}

/// Binds for both families, or for IPv4 alone where the machine has no IPv6.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listen = |address: SocketAddr| {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(128)
    };
    let bound = match listen(address) {
        Err(_) if address.ip() == Ipv6Addr::UNSPECIFIED => {
            listen((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        bound => bound,
    };
    bound.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
    })
}

type Answer = fn(&State, &Request<Incoming>) -> Response<Full<Bytes>>;

async fn listen(listener: TcpListener, state: Arc<State>, answer: Answer) {
    let mut connections = JoinSet::new();
    let mut oldest_first = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let served = serve(stream, state.clone(), answer, CONNECTION_LIFE);
                oldest_first.push_back(connections.spawn(served));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to the admin ports");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
        oldest_first.retain(|connection: &AbortHandle| !connection.is_finished());
        if oldest_first.len() > CONNECTIONS
            && let Some(oldest) = oldest_first.pop_front()
        {
            oldest.abort();
        }
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    state: Arc<State>,
    answer: Answer,
    life: Duration,
) {
    let service = service_fn(move |request| {
        let response = answer(&state, &request);
        async move { Ok::<_, std::convert::Infallible>(response) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        // One request each, so that nobody keeps a place from kubelet.
        .keep_alive(false)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(life, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "connection to an admin port ended"),
        Err(_) => tracing::debug!("a client of an admin port did not read its answer"),
    }
}

fn answer_ready(state: &State, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/healthz/ready") => ready(state),
        _ => plain(StatusCode::NOT_FOUND, "here is only /healthz/ready\n"),
    }
}

fn answer_metrics(state: &State, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics" | "/stats/prometheus") => metrics(state),
        _ => plain(
            StatusCode::NOT_FOUND,
            "here are only /metrics and /stats/prometheus\n",
        ),
    }
}

fn answer_admin(state: &State, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/") => plain(StatusCode::OK, HELP),
        (&Method::GET, "/config_dump") => json(&state.store.dump()),
        (&Method::GET, "/clusters") => plain(StatusCode::OK, state.store.clusters()),
        (&Method::GET, "/certs") => json(&certificates(&state.credentials)),
        (&Method::GET, "/ready") => ready(state),
        (&Method::GET, "/stats/prometheus") => metrics(state),
        (&Method::POST, "/logging") => logging(state, request.uri().query().unwrap_or_default()),
        (_, "/logging") => plain(
            StatusCode::METHOD_NOT_ALLOWED,
            "POST /logging?level=FILTER\n",
        ),
        _ => plain(StatusCode::NOT_FOUND, HELP),
    }
}

const HELP: &str = "\
GET  /config_dump        what the proxy knows of the mesh\n\
GET  /clusters           endpoints in effect\n\
GET  /certs              the certificate and the roots, with their ends\n\
GET  /ready              whether the proxy serves, else why not\n\
GET  /stats/prometheus   metrics\n\
POST /logging?level=F    log filter, as RUST_LOG writes it (debug, turnpike_sidecar=trace)\n";

fn ready(state: &State) -> Response<Full<Bytes>> {
    match state.unready() {
        None => plain(StatusCode::OK, "ready\n"),
        Some(reason) => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {reason}\n"),
        ),
    }
}

fn metrics(state: &State) -> Response<Full<Bytes>> {
    match state.telemetry.get() {
        Some(telemetry) => respond(
            StatusCode::OK,
            OPENMETRICS,
            telemetry.exposition(state.gauges()),
        ),
        None => respond(StatusCode::OK, OPENMETRICS, "# EOF\n"),
    }
}

fn logging(state: &State, query: &str) -> Response<Full<Bytes>> {
    let level = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("level="));
    let Some(level) = level.filter(|level| !level.is_empty()) else {
        return plain(StatusCode::BAD_REQUEST, "POST /logging?level=FILTER\n");
    };
    match (state.set_level)(level) {
        Ok(()) => plain(StatusCode::OK, format!("log filter: {level}\n")),
        Err(error) => plain(
            StatusCode::BAD_REQUEST,
            format!("`{level}` is no filter: {error}\n"),
        ),
    }
}

fn certificates(store: &CredentialStore) -> serde_json::Value {
    let Some(current) = store.load() else {
        return json!({"certificates": []});
    };
    json!({"certificates": [{
        "identity": current.identity().to_string(),
        "serial": current.serial(),
        "validFrom": rfc3339(current.not_before()),
        "expirationTime": rfc3339(current.not_after()),
        "trustedRoots": current.roots().certificates().len(),
    }]})
}

fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time)
        .format(&Rfc3339)
        .unwrap_or_default()
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", text)
}

fn json(value: &serde_json::Value) -> Response<Full<Bytes>> {
    respond(StatusCode::OK, "application/json", format!("{value:#}\n"))
}

fn respond(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use turnpike_rules::Identity;

    use super::*;

    fn state() -> Arc<State> {
        let identity = Identity::new("cluster.local", "shop", "web").unwrap();
        Arc::new(State {
            store: Store::new("cluster", "default", "u1", identity),
            credentials: CredentialStore::empty(),
            telemetry: OnceLock::new(),
            phase: watch::Sender::new(Phase::Starting),
            set_level: Box::new(|_| Ok(())),
        })
    }

    #[test]
    fn a_proxy_that_has_failed_says_so() {
        let state = state();
        state.phase.send_replace(Phase::Failed("discovery"));
        assert_eq!(ready(&state).status(), StatusCode::SERVICE_UNAVAILABLE);
        let why = state.unready().unwrap();
        assert!(why.starts_with("the task `discovery` has failed"), "{why}");
    }

    #[tokio::test]
    async fn those_who_hold_connections_do_not_keep_kubelet_waiting() {
        let listener = bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let listening = tokio::spawn(listen(listener, state(), answer_ready));
        let connect = || tokio::net::TcpStream::connect(address);
        let mut held = Vec::new();
        for _ in 0..2 * CONNECTIONS {
            held.push(connect().await.unwrap());
        }
        let mut probe = connect().await.unwrap();
        let ask = b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\n\r\n";
        probe.write_all(ask).await.unwrap();
        let mut answer = Vec::new();
        let answered = timeout(HEAD_TIMEOUT / 5, probe.read_to_end(&mut answer)).await;
        answered.expect("a probe's timeout is a second").unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 503"));
        listening.abort();
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_let_go() {
        let state = state();
        // Less than the head of an answer.
        let (mut client, server) = tokio::io::duplex(16);
        let life = Duration::from_millis(50);
        let serving = tokio::spawn(serve(server, state, answer_ready, life));
        let ask = b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\n\r\n";
        client.write_all(ask).await.unwrap();
        let patience = Duration::from_secs(30);
        let ended = timeout(patience, serving).await;
        ended.expect("it holds its place for good").unwrap();
        drop(client);
    }
}
