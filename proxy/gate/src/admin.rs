//! Metrics and health over HTTP, for the node alone.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{metrics::Metrics, parts::Parts, state::State};

/// Connections at a time; further ones wait.
const CONNECTIONS: usize = 32;

/// What the pages are made of.
#[derive(Clone, Debug)]
pub struct Pages {
    pub state: State,
    pub metrics: Arc<Metrics>,
    pub parts: Parts,
}

/// Serves until cancelled.
pub async fn serve(
    listener: TcpListener,
    pages: Pages,
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
        let (pages, cancel) = (pages.clone(), cancel.clone());
        tasks.spawn(async move {
            let _permit = permit;
            let service = service_fn(|request| {
                let response = respond(&request, &pages);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                result = connection => {
                    if let Err(error) = result {
                        tracing::debug!(%error, "a metrics connection broke off");
                    }
                }
                () = cancel.cancelled() => {}
            }
        });
    }
}

fn respond(request: &Request<Incoming>, pages: &Pages) -> Response<Full<Bytes>> {
    let Pages {
        state,
        metrics,
        parts,
    } = pages;
    match request.uri().path() {
        "/healthz" => match parts.missing() {
            None => text(StatusCode::OK, "ok\n"),
            Some(ended) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("{ended}\n")),
        },
        "/healthz/ready" => {
            let view = state.view();
            match (view.feed_synced, view.policies_known) {
                (true, true) => text(StatusCode::OK, "ready\n"),
                (false, _) => text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "waiting for the agent's feed to name the node's pods\n",
                ),
                (true, false) => text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "waiting for the controller to send egress policy\n",
                ),
            }
        }
        "/metrics" => {
            metrics
                .pods
                .set(i64::try_from(state.view().pods()).unwrap_or(i64::MAX));
            let mut body = String::new();
            match prometheus_client::encoding::text::encode(&mut body, &metrics.registry) {
                Ok(()) => {
                    let mut response = text(StatusCode::OK, &body);
                    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                    let kind = http::HeaderValue::from_static(kind);
                    response.headers_mut().insert(header::CONTENT_TYPE, kind);
                    response
                }
                Err(_) => text(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "metrics cannot be written\n",
                ),
            }
        }
        _ => text(
            StatusCode::NOT_FOUND,
            "/healthz, /healthz/ready, /metrics\n",
        ),
    }
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body.to_owned()));
    *response.status_mut() = status;
    response
}
