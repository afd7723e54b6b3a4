//! The injector: the API server asks it about each pod that is created in a labelled namespace.
//!
//! 1. [`serve`] takes connections over TLS, with the controller's own certificate; what a caller
//!    may send, and for how long, is bounded.
//! 2. [`Injector`] finds the labels of the pod's namespace: from the source, or where the API
//!    server knows more than the source does yet, from the API server.
//! 3. `turnpike_kubernetes::inject::review` makes the answer; [`settings`] follow a file.
//!
//! Whatever fails here fails the pod: one that should be in the mesh never starts outside of it.

mod settings;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};
use tokio_util::sync::CancellationToken;
use turnpike_daemon::slots::ConnectionSlots;
use turnpike_kubernetes::{
    cluster::Namespaces,
    inject::{
        InjectConfig, LABEL,
        review::{self, Outcome},
    },
};

pub use settings::{SettingsError, SettingsFile};

use crate::{metrics::Metrics, text::one_line};

const PATH: &str = "/inject";
/// A pod is 1.5 MiB at most, and comes once.
const MAX_BODY: usize = 3 << 20;
/// Connections at once, of which the API server shares a few.
const CONNECTIONS: usize = 128;
/// Calls at once in one connection.
const STREAMS: u32 = 100;
const HANDSHAKE: Duration = Duration::from_secs(5);
/// For a whole body; the API server waits 10 s at most for the answer.
const BODY: Duration = Duration::from_secs(5);
const LABELS: Duration = Duration::from_secs(3);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// After being told to stop: the API server, whose list of endpoints is a little old, may still call, and
/// a pod that it could not ask about would not be created.
const LINGER: Duration = Duration::from_secs(5);
/// For a connection that has asked nothing by then. One that has is told to go: whoever takes over is to
/// be asked next.
const MOMENT: Duration = Duration::from_secs(2);
/// For calls that are in flight then.
const DRAIN: Duration = Duration::from_secs(5);

/// Answers reviews.
#[derive(Clone)]
pub struct Injector {
    pub settings: watch::Receiver<Arc<InjectConfig>>,
    pub namespaces: Namespaces,
    /// Asked about namespaces that were made or labelled just now.
    pub api: Api<Namespace>,
    pub metrics: Metrics,
}

impl std::fmt::Debug for Injector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Injector").finish_non_exhaustive()
    }
}

/// Serves until a while after `stop`; what is in flight then is finished.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    injector: Injector,
    stop: CancellationToken,
) {
    let last = later(&stop, LINGER);
    let acceptor = TlsAcceptor::from(tls);
    let mut slots = ConnectionSlots::new(CONNECTIONS, HANDSHAKE);
    loop {
        let accepted = tokio::select! {
            () = last.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (acceptor, injector, stop) = (acceptor.clone(), injector.clone(), stop.clone());
                let connection = connection(stream, acceptor, injector, stop);
                slots.take(peer.ip(), connection).await;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for the injector");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    let _ = timeout(DRAIN, slots.drained()).await;
}

/// Cancelled some time after `stop` is.
fn later(stop: &CancellationToken, pause: Duration) -> CancellationToken {
    let later = CancellationToken::new();
    let (stop, told) = (stop.clone(), later.clone());
    tokio::spawn(async move {
        stop.cancelled().await;
        sleep(pause).await;
        told.cancel();
    });
    later
}

async fn connection(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    injector: Injector,
    stop: CancellationToken,
) {
    let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::warn!(%error, "a TLS handshake with the injector failed");
            return;
        }
        Err(_) => return,
    };
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HANDSHAKE)
        .max_buf_size(64 * 1024);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(30))
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(64 * 1024);
    let asked = Arc::new(AtomicBool::new(false));
    let asks = asked.clone();
    let answer = service_fn(move |request| {
        asks.store(true, Ordering::Relaxed);
        let injector = injector.clone();
        async move { Ok::<_, Infallible>(injector.answer(request).await) }
    });
    let told_to_go = async {
        stop.cancelled().await;
        if !asked.load(Ordering::Relaxed) {
            sleep(MOMENT).await;
        }
    };
    let served = builder.serve_connection(TokioIo::new(stream), answer);
    let mut served = std::pin::pin!(served);
    let ended = tokio::select! {
        ended = &mut served => ended,
        () = told_to_go => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection to the injector failed");
    }
}

type Answer = Response<Full<Bytes>>;

impl Injector {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        if request.uri().path() != PATH {
            return text(StatusCode::NOT_FOUND, format!("there is {PATH}\n"));
        }
        if request.method() != Method::POST {
            return text(StatusCode::METHOD_NOT_ALLOWED, "allowed is POST\n");
        }
        let body = Limited::new(request.into_body(), MAX_BODY).collect();
        let body = match timeout(BODY, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                let message = format!("a review has {MAX_BODY} bytes at most\n");
                return text(StatusCode::PAYLOAD_TOO_LARGE, message);
            }
            Ok(Err(error)) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
            Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the review came too slowly\n"),
        };
        match review::Request::parse(&body) {
            Ok(request) => json(self.review(&request).await),
            Err(error) => {
                self.metrics.injection("invalid");
                tracing::warn!("a review is refused: {}", one_line(&error.to_string()));
                text(StatusCode::BAD_REQUEST, format!("{error}\n"))
            }
        }
    }

    async fn review(&self, request: &review::Request) -> Vec<u8> {
        let settings = self.settings.borrow().clone();
        let namespace = request.namespace();
        let answer = match self.labels(namespace, &settings).await {
            Ok(labels) => request.answer(&labels, &settings),
            Err(error) => {
                let why = format!(
                    "whether pods of the namespace {namespace} get a sidecar cannot be read \
                     ({error}), so the pod is not created; try again"
                );
                request.deny(&why, 503)
            }
        };
        let (bytes, outcome) = answer;
        let pod = one_line(request.pod_name());
        match &outcome {
            Outcome::Injected => {
                self.metrics.injection("injected");
                tracing::debug!(namespace, pod, "injected");
            }
            Outcome::Skipped(reason) => {
                self.metrics.injection("skipped");
                tracing::info!(namespace, pod, "not injected: {reason}");
            }
            Outcome::Denied(why) => {
                self.metrics.injection("denied");
                tracing::warn!(namespace, pod, "denied: {}", one_line(why));
            }
        }
        bytes
    }

    /// The API server asks about labelled namespaces alone. Where the source does not know of the
    /// label it is behind, and the API server itself is asked.
    async fn labels(
        &self,
        namespace: &str,
        settings: &InjectConfig,
    ) -> Result<Arc<BTreeMap<String, String>>, String> {
        let exempt = settings.exempt_namespaces.iter();
        if exempt.clone().any(|exempt| exempt == namespace) {
            return Ok(Arc::default());
        }
        let known = self.namespaces.labels(namespace);
        if let Some(labels) =
            known.filter(|labels| labels.get(LABEL).is_some_and(|v| v == "enabled"))
        {
            return Ok(labels);
        }
        match timeout(LABELS, self.api.get_metadata(namespace)).await {
            Ok(Ok(found)) => Ok(Arc::new(found.metadata.labels.unwrap_or_default())),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", LABELS.as_secs())),
        }
    }
}

fn json(body: Vec<u8>) -> Answer {
    page(StatusCode::OK, "application/json", body)
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    page(status, "text/plain; charset=utf-8", body)
}

fn page(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut page = Response::new(Full::new(body.into()));
    *page.status_mut() = status;
    let content_type = HeaderValue::from_static(content_type);
    page.headers_mut().insert(CONTENT_TYPE, content_type);
    page
}
