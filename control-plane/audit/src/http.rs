//! The record for people and programs: JSON over HTTP.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, sync::Semaphore, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    query::Query,
    receive::{Receiver, now_ms},
    store::Store,
};

/// Connections at a time; further ones wait.
const CONNECTIONS: usize = 64;

/// What the answers are made of.
#[derive(Debug)]
pub struct Shared {
    pub store: Store,
    pub receiver: Receiver,
    pub registry: Registry,
}

/// Which of the two ports it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    Record,
    /// Metrics and health alone.
    Health,
}

/// Serves until cancelled.
pub async fn serve(
    listener: TcpListener,
    show: Show,
    shared: Arc<Shared>,
    tasks: TaskTracker,
    cancel: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = cancel.cancelled() => return,
        };
        let (shared, cancel) = (shared.clone(), cancel.clone());
        tasks.spawn(async move {
            let _permit = permit;
            let service = service_fn(|request| {
                let shared = shared.clone();
                async move { Ok::<_, Infallible>(respond(&request, show, &shared).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                result = connection => {
                    if let Err(error) = result {
                        tracing::debug!(%error, "a connection broke off");
                    }
                }
                () = cancel.cancelled() => {}
            }
        });
    }
}

async fn respond(
    request: &Request<Incoming>,
    show: Show,
    shared: &Shared,
) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return text(
            StatusCode::METHOD_NOT_ALLOWED,
            "the record is only read: GET\n",
        );
    }
    match (show, request.uri().path()) {
        (_, "/healthz") => text(StatusCode::OK, "ok\n"),
        (_, "/healthz/ready") => ready(shared).await,
        (_, "/metrics") => metrics(&shared.registry),
        (Show::Record, "/v1/records") => {
            match Query::parse(request.uri().query().unwrap_or_default()) {
                Ok(query) => json(shared.store.records(&query).await),
                Err(error) => text(StatusCode::BAD_REQUEST, &format!("{error}\n")),
            }
        }
        (Show::Record, "/v1/verify") => match shared.receiver.trust() {
            Some(trust) => json(shared.store.verify(&trust, now_ms()).await),
            None => text(
                StatusCode::SERVICE_UNAVAILABLE,
                "this server has no roots yet to verify signatures with\n",
            ),
        },
        (Show::Record, _) => text(
            StatusCode::NOT_FOUND,
            "/v1/records, /v1/verify, /healthz, /healthz/ready, /metrics\n",
        ),
        (Show::Health, _) => text(
            StatusCode::NOT_FOUND,
            "/healthz, /healthz/ready, /metrics; the record itself is read on loopback\n",
        ),
    }
}

/// Whether an upload would be taken.
async fn ready(shared: &Shared) -> Response<Full<Bytes>> {
    if shared.receiver.trust().is_none() {
        return text(
            StatusCode::SERVICE_UNAVAILABLE,
            "waiting for a certificate from the CA; the log says why it takes long\n",
        );
    }
    match shared.store.nodes().await {
        Ok(_) => text(StatusCode::OK, "ready\n"),
        Err(error) => text(
            StatusCode::SERVICE_UNAVAILABLE,
            &format!("the store cannot be read: {error}\n"),
        ),
    }
}

fn metrics(registry: &Registry) -> Response<Full<Bytes>> {
    let mut body = String::new();
    match prometheus_client::encoding::text::encode(&mut body, registry) {
        Ok(()) => typed(
            StatusCode::OK,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            body.into(),
        ),
        Err(_) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            "metrics cannot be written\n",
        ),
    }
}

fn json<T: serde::Serialize, E: std::fmt::Display>(result: Result<T, E>) -> Response<Full<Bytes>> {
    let body = result
        .map_err(|error| error.to_string())
        .and_then(|value| serde_json::to_vec(&value).map_err(|error| error.to_string()));
    match body {
        Ok(body) => typed(StatusCode::OK, "application/json", body.into()),
        Err(error) => {
            tracing::error!(error, "a question to the record failed");
            text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n"))
        }
    }
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    typed(
        status,
        "text/plain; charset=utf-8",
        Bytes::copy_from_slice(body.as_bytes()),
    )
}

fn typed(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
