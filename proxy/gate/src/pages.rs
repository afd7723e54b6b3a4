//! Metrics and health over HTTP, for the node alone.

use std::sync::Arc;

use tokio::net::TcpListener;
use turnpike_daemon::pages::{self, CONNECTION_LIFETIME, Request, Response, StatusCode, text};

use crate::{metrics::Metrics, parts::Parts, spool::Spool, state::State};

/// What the pages are made of.
#[derive(Clone, Debug)]
pub struct Pages {
    pub state: State,
    pub spool: Spool,
    pub metrics: Arc<Metrics>,
    pub parts: Parts,
}

/// Serves until dropped.
pub async fn serve(listener: TcpListener, pages: Pages) {
    let answer = move |request| std::future::ready(respond(&request, &pages));
    pages::serve(listener, CONNECTION_LIFETIME, answer).await;
}

fn respond(request: &Request, pages: &Pages) -> Response {
    if !request.is_safe() {
        return pages::read_only();
    }
    let Pages {
        state,
        spool,
        metrics,
        parts,
    } = pages;
    match request.uri.path() {
        "/healthz/live" => match parts.missing() {
            None => pages::live(),
            Some(ended) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{ended}\n")),
        },
        "/healthz/ready" => {
            let view = state.view();
            pages::ready(match (view.feed_synced, view.policies_known) {
                (true, true) => None,
                (false, _) => Some("waiting for the agent's feed to name the node's pods"),
                (true, false) => Some("waiting for the controller to send egress policy"),
            })
        }
        "/metrics" => {
            let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
            metrics.pods.set(count(state.view().pods() as u64));
            metrics.unacknowledged.set(count(spool.unacknowledged()));
            let mut body = String::new();
            match prometheus_client::encoding::text::encode(&mut body, &metrics.registry) {
                Ok(()) => pages::metrics(body),
                Err(_) => text(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "metrics cannot be written\n",
                ),
            }
        }
        _ => text(
            StatusCode::NOT_FOUND,
            "/healthz/live, /healthz/ready, /metrics\n",
        ),
    }
}
