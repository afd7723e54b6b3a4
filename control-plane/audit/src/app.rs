//! The composition.

use std::{sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use turnpike_certs::{CredentialStore, server_config};
use turnpike_daemon::tasks::{Ended, Tasks};
use turnpike_rules::Identity;
use turnpike_wire::{audit::audit_server::AuditServer, channel::accept_tls, names::ALPN_GRPC};

use crate::{
    pages::{self, Shared, Show},
    receive::{Metrics, Receiver},
    store::Store,
};

/// A batch of a gate is far smaller.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// Where it is reached.
#[derive(Debug)]
pub struct Listeners {
    /// By gates, over mutual TLS.
    pub uploads: TcpListener,
    /// By people, who read the record: to be on loopback.
    pub questions: TcpListener,
    /// By kubelet and Prometheus, who learn nothing of the record.
    pub health: Option<TcpListener>,
}

/// Why it does not go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("uploads are not served any more: {0}")]
    Uploads(#[from] tonic::transport::Error),
    #[error(transparent)]
    Ended(#[from] Ended),
}

/// Serves uploads and questions until `stop`, or until one of `tasks`, which run beside it, ends. Who
/// is being served then is dropped: a gate resumes where its last acknowledgement was.
pub async fn run(
    store: Store,
    credentials: Arc<CredentialStore>,
    gate: Identity,
    listeners: Listeners,
    mut tasks: Tasks,
    stop: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let Listeners {
        uploads,
        questions,
        health,
    } = listeners;
    let metrics = Metrics::default();
    let mut registry = Registry::with_prefix("turnpike_audit");
    metrics.register(&mut registry);
    let receiver = Receiver::new(store.clone(), credentials.clone(), gate, metrics);
    let shared = Arc::new(Shared {
        store,
        receiver: receiver.clone(),
        registry,
    });
    tasks.spawn(
        "the record's pages",
        pages::serve(questions, Show::Record, shared.clone()),
    );
    if let Some(health) = health {
        tasks.spawn("health", pages::serve(health, Show::Health, shared));
    }
    let incoming = accept_tls(uploads, server_config(credentials, &[ALPN_GRPC]));
    let service = AuditServer::new(receiver).max_decoding_message_size(MAX_MESSAGE);
    let serving = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(service)
        .serve_with_incoming(incoming);
    tokio::select! {
        biased;
        () = stop => Ok(()),
        ended = tasks.ended() => Err(ended.into()),
        ended = serving => Ok(ended?),
    }
}
