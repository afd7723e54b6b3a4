//! The composition.

use std::{sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use turnpike_certs::{CredentialStore, server_config};
use turnpike_rules::Identity;
use turnpike_wire::{audit::audit_server::AuditServer, channel::accept_tls, names::ALPN_GRPC};

use crate::{
    http::{self, Shared, Show},
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

/// Serves uploads and questions until cancelled, then lets what runs finish.
pub async fn run(
    store: Store,
    credentials: Arc<CredentialStore>,
    gate: Identity,
    listeners: Listeners,
    cancel: CancellationToken,
) -> Result<(), tonic::transport::Error> {
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
    let tasks = TaskTracker::new();
    for (listener, show) in [(Some(questions), Show::Record), (health, Show::Health)] {
        let Some(listener) = listener else { continue };
        let serving = http::serve(listener, show, shared.clone());
        tasks.spawn(cancel.clone().run_until_cancelled_owned(serving));
    }
    let incoming = accept_tls(uploads, server_config(credentials, &[ALPN_GRPC]));
    let service = AuditServer::new(receiver).max_decoding_message_size(MAX_MESSAGE);
    let serving = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(service)
        .serve_with_incoming(incoming);
    // Uploads never end by themselves; a gate resumes where its last acknowledgement was.
    let result = tokio::select! {
        result = serving => result,
        () = cancel.cancelled() => Ok(()),
    };
    cancel.cancel();
    tasks.close();
    let _ = timeout(Duration::from_secs(5), tasks.wait()).await;
    result
}
