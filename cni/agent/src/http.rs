//! Metrics, and the pool as people and tools look at it. Plain HTTP; what names pods is bound to
//! loopback.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, body::Bytes, body::Incoming, service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use crate::{node::Node, node::note_of};

/// Connections at once; one more waits for its turn in the kernel's queue.
const CONNECTIONS: usize = 32;
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Which of the two ports it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    Metrics,
    Introspection,
}

/// Serves until the node stops.
pub async fn serve(node: Arc<Node>, listener: TcpListener, show: Show) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let permit = Arc::clone(&permits).acquire_owned();
        let accepted = node.stop.run_until_cancelled(async {
            // Never closed.
            let permit = permit.await.ok();
            (permit, listener.accept().await)
        });
        match accepted.await {
            None => return,
            Some((_, Err(error))) => {
                tracing::warn!(%error, "HTTP connections cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            Some((permit, Ok((stream, _)))) => {
                let node = Arc::clone(&node);
                tokio::spawn(async move {
                    let served = connection(&node, stream, show);
                    tokio::time::timeout(CONNECTION_TIMEOUT, served).await.ok();
                    drop(permit);
                });
            }
        }
    }
}

async fn connection(node: &Node, stream: TcpStream, show: Show) {
    let service =
        service_fn(|request| async move { Ok::<_, Infallible>(answer(node, &request, show)) });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Some(Err(error)) = node.stop.run_until_cancelled(served).await {
        tracing::debug!(%error, "an HTTP connection ended early");
    }
}

fn answer(node: &Node, request: &Request<Incoming>, show: Show) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into());
    }
    match (show, request.uri().path()) {
        (Show::Metrics, "/metrics") => {
            let counts = node.store.read(|pool| pool.counts(node.now()));
            match node.metrics.scrape(counts) {
                Ok(metrics) => text(StatusCode::OK, metrics),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            }
        }
        (Show::Metrics, "/healthz/live") => text(StatusCode::OK, "ok\n".into()),
        (Show::Metrics, "/healthz/ready") => match node.unready() {
            None => text(StatusCode::OK, "ok\n".into()),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        },
        (Show::Introspection, "/v1/enis") => json_of(&enis(node)),
        (Show::Introspection, "/v1/pods") => json_of(&pods(node)),
        (Show::Metrics, _) => text(
            StatusCode::NOT_FOUND,
            "/metrics, /healthz/live, /healthz/ready\n".into(),
        ),
        (Show::Introspection, _) => text(StatusCode::NOT_FOUND, "/v1/enis, /v1/pods\n".into()),
    }
}

fn enis(node: &Node) -> serde_json::Value {
    let now = node.now();
    node.store.read(|pool| {
        let enis = pool.enis().map(|eni| {
            let addresses: Vec<_> = pool.addresses(&eni.id).collect();
            json!({
                "id": eni.id,
                "mac": eni.mac,
                "deviceIndex": eni.device_index,
                "primaryAddress": eni.primary,
                "subnet": eni.subnet,
                "addresses": addresses,
                "leased": pool.leased_on(&eni.id),
            })
        });
        let enis: Vec<_> = enis.collect();
        let targets = pool.config().targets;
        json!({
            "counts": pool.counts(now),
            "targets": {
                "WARM_ENI_TARGET": targets.warm_enis,
                "WARM_IP_TARGET": targets.warm_addresses,
                "MINIMUM_IP_TARGET": targets.minimum_addresses,
                "MAX_ENI": targets.max_enis,
            },
            "enis": enis,
        })
    })
}

fn pods(node: &Node) -> serde_json::Value {
    let pods = node.leases().into_iter().map(|lease| {
        let note = note_of(&lease);
        let holder = &lease.holder;
        json!({
            "namespace": holder.pod.namespace,
            "name": holder.pod.name,
            "uid": holder.pod.uid,
            "containerId": holder.attachment.container_id,
            "interface": holder.attachment.ifname,
            "network": holder.network,
            "address": lease.address,
            "eni": lease.eni,
            "hostInterface": note.as_ref().map(|note| note.applied.host_interface.clone()),
            "captured": note.as_ref().is_some_and(|note| note.enforced.capture.is_some()),
            "egressPolicy": note.as_ref().is_some_and(|note| note.enforced.policy.selected),
        })
    });
    pods.collect()
}

fn json_of(value: &impl Serialize) -> Response<Full<Bytes>> {
    // A `Value` always serialises.
    let body = serde_json::to_vec_pretty(value).unwrap_or_default();
    respond(StatusCode::OK, "application/json", body.into())
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    respond(
        status,
        "text/plain; version=0.0.4; charset=utf-8",
        body.into(),
    )
}

fn respond(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let kind = hyper::header::HeaderValue::from_static(kind);
    response
        .headers_mut()
        .insert(hyper::header::CONTENT_TYPE, kind);
    response
}
