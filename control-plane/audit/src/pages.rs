//! The record for people and programs: JSON over HTTP.

use std::{sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use turnpike_daemon::pages::{self, Request, Response, StatusCode, respond, text};

use crate::{
    query::Query,
    receive::{Receiver, now_ms},
    store::Store,
};

/// A long record takes its time to verify; after this a question to it is given up.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(600);

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
    let answer = move |request| {
        let shared = shared.clone();
        async move { answer(&request, show, &shared).await }
    };
    pages::serve(listener, CONNECTION_LIFETIME, answer).await;
}

async fn answer(request: &Request, show: Show, shared: &Shared) -> Response {
    if !request.is_safe() {
        return pages::read_only();
    }
    match (show, request.uri.path()) {
        (_, "/healthz/live") => pages::live(),
        (_, "/healthz/ready") => pages::ready(unready(shared).await),
        (_, "/metrics") => metrics(&shared.registry),
        (Show::Record, "/v1/records") => {
            match Query::parse(request.uri.query().unwrap_or_default()) {
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

/// Why an upload would not be taken.
async fn unready(shared: &Shared) -> Option<String> {
    if shared.receiver.trust().is_none() {
        let why = "waiting for a certificate from the CA; the log says why it takes long";
        return Some(why.to_owned());
    }
    let read = shared.store.nodes().await;
    read.err()
        .map(|error| format!("the store cannot be read: {error}"))
}

fn metrics(registry: &Registry) -> Response {
    let mut body = String::new();
    match prometheus_client::encoding::text::encode(&mut body, registry) {
        Ok(()) => pages::metrics(body),
        Err(_) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            "metrics cannot be written\n",
        ),
    }
}

fn json<T: serde::Serialize, E: std::fmt::Display>(result: Result<T, E>) -> Response {
    let body = result
        .map_err(|error| error.to_string())
        .and_then(|value| serde_json::to_vec(&value).map_err(|error| error.to_string()));
    match body {
        Ok(body) => respond(StatusCode::OK, "application/json", body),
        Err(error) => {
            tracing::error!(error, "a question to the record failed");
            text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
        }
    }
}
