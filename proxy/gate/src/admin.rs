//! Metrics and health over HTTP, for the node alone.

use std::sync::Arc;

use tokio::net::TcpListener;
use turnpike_wire::pages::{self, Asked, LIFE, Page, StatusCode, text};

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
    let answer = move |asked: Asked| std::future::ready(respond(asked.uri.path(), &pages));
    pages::serve(listener, LIFE, answer).await;
}

fn respond(path: &str, pages: &Pages) -> Page {
    let Pages {
        state,
        spool,
        metrics,
        parts,
    } = pages;
    match path {
        "/healthz/live" => match parts.missing() {
            None => text(StatusCode::OK, "ok\n"),
            Some(ended) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{ended}\n")),
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
