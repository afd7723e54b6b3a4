//! What people, kubelet and Prometheus ask of a running proxy.
//!
//! Three listeners: 15000 on loopback answers questions and sets the log level; 15020 gives the
//! metrics, 15021 the readiness, both to the whole network and nothing else. No answer contains a
//! key.

use std::{
    borrow::Cow,
    fmt, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::watch,
};
use turnpike_certs::CredentialStore;
use turnpike_daemon::pages::{
    self, CONNECTION_LIFETIME, Method, Request, Response, StatusCode, text,
};

use crate::{
    control::store::Store,
    telemetry::{Gauges, Telemetry},
};

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

type Answer = fn(&State, &Request) -> Response;

async fn listen(listener: TcpListener, state: Arc<State>, answer: Answer) {
    let answer = move |request| std::future::ready(answer(&state, &request));
    pages::serve(listener, CONNECTION_LIFETIME, answer).await;
}

fn answer_ready(state: &State, request: &Request) -> Response {
    match (&request.method, request.uri.path()) {
        (&Method::GET | &Method::HEAD, "/healthz/ready") => ready(state),
        _ => text(StatusCode::NOT_FOUND, "here is only /healthz/ready\n"),
    }
}

fn answer_metrics(state: &State, request: &Request) -> Response {
    match (&request.method, request.uri.path()) {
        (&Method::GET | &Method::HEAD, "/metrics" | "/stats/prometheus") => metrics(state),
        _ => text(
            StatusCode::NOT_FOUND,
            "here are only /metrics and /stats/prometheus\n",
        ),
    }
}

fn answer_admin(state: &State, request: &Request) -> Response {
    match (&request.method, request.uri.path()) {
        (&Method::GET, "/") => text(StatusCode::OK, HELP),
        (&Method::GET, "/config_dump") => pages::json(&state.store.dump()),
        (&Method::GET, "/clusters") => text(StatusCode::OK, state.store.clusters()),
        (&Method::GET, "/certs") => pages::json(&certificates(&state.credentials)),
        (&Method::GET, "/ready") => ready(state),
        (&Method::GET, "/stats/prometheus") => metrics(state),
        (&Method::POST, "/logging") => logging(state, request.uri.query().unwrap_or_default()),
        (_, "/logging") => text(
            StatusCode::METHOD_NOT_ALLOWED,
            "POST /logging?level=FILTER\n",
        ),
        _ => text(StatusCode::NOT_FOUND, HELP),
    }
}

const HELP: &str = "\
GET  /config_dump        what the proxy knows of the mesh\n\
GET  /clusters           endpoints in effect\n\
GET  /certs              the certificate and the roots, with their ends\n\
GET  /ready              whether the proxy serves, else why not\n\
GET  /stats/prometheus   metrics\n\
POST /logging?level=F    log filter, as RUST_LOG writes it (debug, turnpike_sidecar=trace)\n";

fn ready(state: &State) -> Response {
    pages::ready(state.unready())
}

fn metrics(state: &State) -> Response {
    match state.telemetry.get() {
        Some(telemetry) => pages::metrics(telemetry.exposition(state.gauges())),
        None => pages::metrics("# EOF\n"),
    }
}

fn logging(state: &State, query: &str) -> Response {
    let level = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("level="));
    let Some(level) = level.filter(|level| !level.is_empty()) else {
        return text(StatusCode::BAD_REQUEST, "POST /logging?level=FILTER\n");
    };
    match (state.set_level)(level) {
        Ok(()) => text(StatusCode::OK, format!("log filter: {level}\n")),
        Err(error) => text(
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

#[cfg(test)]
mod tests {
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
}
