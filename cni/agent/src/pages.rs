//! Metrics, and the pool as people and tools look at it. Plain HTTP; what names pods is bound to
//! loopback.

use std::sync::Arc;

use serde_json::json;
use tokio::net::TcpListener;
use turnpike_daemon::pages::{self, CONNECTION_LIFETIME, Request, Response, StatusCode, text};

use crate::{node::Node, node::note_of};

/// Which of the two ports it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    Metrics,
    Introspection,
}

/// Serves until the node stops.
pub async fn serve(node: Arc<Node>, listener: TcpListener, show: Show) {
    let shown = Arc::clone(&node);
    let answer = move |request| std::future::ready(answer(&shown, &request, show));
    let serving = pages::serve(listener, CONNECTION_LIFETIME, answer);
    node.stop.run_until_cancelled(serving).await;
}

fn answer(node: &Node, request: &Request, show: Show) -> Response {
    if !request.is_safe() {
        return pages::read_only();
    }
    match (show, request.uri.path()) {
        (Show::Metrics, "/metrics") => {
            let counts = node.store.read(|pool| pool.counts(node.now()));
            match node.metrics.scrape(counts) {
                Ok(exposition) => pages::metrics(exposition),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            }
        }
        (Show::Metrics, "/healthz/live") => pages::live(),
        (Show::Metrics, "/healthz/ready") => pages::ready(node.unready()),
        (Show::Introspection, "/v1/enis") => pages::json(&enis(node)),
        (Show::Introspection, "/v1/pods") => pages::json(&pods(node)),
        (Show::Metrics, _) => text(
            StatusCode::NOT_FOUND,
            "/metrics, /healthz/live, /healthz/ready\n",
        ),
        (Show::Introspection, _) => text(StatusCode::NOT_FOUND, "/v1/enis, /v1/pods\n"),
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
