//! The record for people and programs: JSON over HTTP.

use std::{sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use turnpike_wire::pages::{self, Asked, Page, StatusCode, page, text};

use crate::{
    query::Query,
    receive::{Receiver, now_ms},
    store::Store,
};

/// How long a connection lives: a long record takes its time to verify.
const LIFE: Duration = Duration::from_secs(600);

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

/// Serves until dropped.
pub async fn serve(listener: TcpListener, show: Show, shared: Arc<Shared>) {
    let answer = move |asked| {
        let shared = shared.clone();
        async move { respond(&asked, show, &shared).await }
    };
    pages::serve(listener, LIFE, answer).await;
}

async fn respond(asked: &Asked, show: Show, shared: &Shared) -> Page {
    if !asked.reads() {
        return text(
            StatusCode::METHOD_NOT_ALLOWED,
            "the record is only read: GET\n",
        );
    }
    match (show, asked.uri.path()) {
        (_, "/healthz/live") => text(StatusCode::OK, "ok\n"),
        (_, "/healthz/ready") => ready(shared).await,
        (_, "/metrics") => metrics(&shared.registry),
        (Show::Record, "/v1/records") => {
            match Query::parse(asked.uri.query().unwrap_or_default()) {
                Ok(query) => json(shared.store.records(&query).await),
                Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
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
            "/v1/records, /v1/verify, /healthz/live, /healthz/ready, /metrics\n",
        ),
        (Show::Health, _) => text(
            StatusCode::NOT_FOUND,
            "/healthz/live, /healthz/ready, /metrics; the record itself is read on loopback\n",
        ),
    }
}

/// Whether an upload would be taken.
async fn ready(shared: &Shared) -> Page {
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
            format!("the store cannot be read: {error}\n"),
        ),
    }
}

fn metrics(registry: &Registry) -> Page {
    let mut body = String::new();
    match prometheus_client::encoding::text::encode(&mut body, registry) {
        Ok(()) => pages::metrics(body),
        Err(_) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            "metrics cannot be written\n",
        ),
    }
}

fn json<T: serde::Serialize, E: std::fmt::Display>(result: Result<T, E>) -> Page {
    let body = result
        .map_err(|error| error.to_string())
        .and_then(|value| serde_json::to_vec(&value).map_err(|error| error.to_string()));
    match body {
        Ok(body) => page(StatusCode::OK, "application/json", body),
        Err(error) => {
            tracing::error!(error, "a question to the record failed");
            text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
        }
    }
}
