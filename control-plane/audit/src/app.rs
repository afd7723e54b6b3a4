//! The composition.

use std::{sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use turnpike_certs::{CredentialStore, server_config};
use turnpike_rules::Identity;
use turnpike_wire::{audit::audit_server::AuditServer, channel::accept_tls, names::ALPN_GRPC};

use crate::{
    http::{self, Shared},
    receive::{Metrics, Receiver},
    store::Store,
};

/// A batch of a gate is far smaller.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// Serves uploads and questions until cancelled, then lets what runs finish.
pub async fn run(
    store: Store,
    credentials: Arc<CredentialStore>,
    gate: Identity,
    uploads: TcpListener,
    questions: TcpListener,
    cancel: CancellationToken,
) -> Result<(), tonic::transport::Error> {
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
    tasks.spawn(http::serve(
        questions,
        shared,
        tasks.clone(),
        cancel.clone(),
    ));
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
