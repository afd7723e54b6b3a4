//! Uploads of gates: verified, committed, acknowledged.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{Stream, StreamExt};
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::server::Connected};
use turnpike_certs::{CredentialStore, peer_identity};
use turnpike_ledger::{Entry, Report, Trust, Verifier};
use turnpike_rules::Identity;
use turnpike_wire::audit::{self, UploadReply, UploadRequest, audit_server};

use crate::store::{Stand, Store};

/// A node's name at most.
const MAX_NODE: usize = 253;
/// A gate that says nothing for so long is gone; it comes back by itself.
const IDLE: Duration = Duration::from_secs(3600);

#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub committed: Counter,
    pub refused: Counter,
}

impl Metrics {
    pub fn register(&self, registry: &mut Registry) {
        let Self { committed, refused } = self;
        registry.register("entries", "Entries committed", committed.clone());
        registry.register("refused_uploads", "Uploads refused", refused.clone());
    }
}

/// Takes uploads.
#[derive(Clone, Debug)]
pub struct Receiver {
    store: Store,
    credentials: Arc<CredentialStore>,
    /// The only identity that may upload, and sign.
    gate: Identity,
    metrics: Metrics,
}

type Replies = Pin<Box<dyn Stream<Item = Result<UploadReply, Status>> + Send>>;

impl Receiver {
    pub fn new(
        store: Store,
        credentials: Arc<CredentialStore>,
        gate: Identity,
        metrics: Metrics,
    ) -> Self {
        Self {
            store,
            credentials,
            gate,
            metrics,
        }
    }

    /// Who signs checkpoints, by today's roots.
    pub fn trust(&self) -> Option<Trust> {
        let roots = self.credentials.load()?.roots().clone();
        Some(Trust {
            roots,
            signer: self.gate.clone(),
        })
    }

    fn authorise<T>(&self, request: &Request<T>) -> Result<(), Status> {
        type Info = <TlsStream<TcpStream> as Connected>::ConnectInfo;
        let info = request.extensions().get::<Info>();
        let certificates = info.and_then(Info::peer_certs);
        let leaf = certificates
            .as_ref()
            .and_then(|certificates| certificates.first());
        let Some(leaf) = leaf else {
            return Err(Status::unauthenticated(
                "a client certificate of the mesh is needed",
            ));
        };
        let caller =
            peer_identity(leaf).map_err(|error| Status::unauthenticated(error.to_string()))?;
        if caller == self.gate {
            return Ok(());
        }
        tracing::warn!(%caller, "an upload by somebody who is no gate was refused");
        let gate = &self.gate;
        Err(Status::permission_denied(format!(
            "{caller} may not upload; only {gate} may"
        )))
    }

    /// Verifies a batch against the chain so far and commits it. Returns how far the chain is.
    async fn take(&self, node: &str, entries: Vec<audit::Entry>) -> Result<u64, TakeError> {
        let Stand { head, .. } = self.store.stand(node).await?;
        let entries = entries
            .into_iter()
            .map(entry)
            .collect::<Option<Vec<_>>>()
            .ok_or(TakeError::Malformed)?;
        // What was acknowledged already comes again when the acknowledgement was lost.
        let known = entries
            .iter()
            .take_while(|entry| entry.sequence <= head.sequence)
            .count();
        let new = &entries[known..];
        if let Some(overlap) = known.checked_sub(1).map(|last| &entries[last])
            && overlap.sequence == head.sequence
            && overlap.hash != head.hash
        {
            return Err(TakeError::Fork(head.sequence));
        }
        let trust = self.trust().ok_or(TakeError::NotReady)?;
        let mut verifier = Verifier::new(node, head, trust, None, now_ms());
        new.iter().for_each(|entry| verifier.push(entry));
        let report = verifier.finish();
        if !report.holds() {
            return Err(TakeError::Invalid(Box::new(report)));
        }
        self.store.append(node, new).await?;
        self.metrics.committed.inc_by(new.len() as u64);
        Ok(new.last().map_or(head.sequence, |entry| entry.sequence))
    }

    async fn converse(
        &self,
        mut requests: Streaming<UploadRequest>,
        replies: &mpsc::Sender<Result<UploadReply, Status>>,
    ) -> Result<(), Status> {
        let mut node: Option<String> = None;
        while let Some(request) = tokio::time::timeout(IDLE, requests.next())
            .await
            .unwrap_or_default()
        {
            let request = request?;
            let node = &*node.get_or_insert_with(|| request.node.clone());
            if *node != request.node || node.is_empty() || node.len() > MAX_NODE {
                return Err(Status::invalid_argument(
                    "one upload is for one node, which it names",
                ));
            }
            let reply = match self.take(node, request.entries).await {
                Ok(committed) => UploadReply {
                    committed,
                    refused: String::new(),
                },
                Err(TakeError::Store(error)) => return Err(Status::unavailable(error.to_string())),
                Err(TakeError::NotReady) => {
                    return Err(Status::unavailable("this server has no certificate yet"));
                }
                Err(error) => {
                    self.metrics.refused.inc();
                    tracing::error!(node, %error, "an upload was refused");
                    UploadReply {
                        committed: 0,
                        refused: error.to_string(),
                    }
                }
            };
            let refused = !reply.refused.is_empty();
            if replies.send(Ok(reply)).await.is_err() || refused {
                return Ok(());
            }
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum TakeError {
    #[error("an entry's hash is not a SHA-256")]
    Malformed,
    #[error("entry {0} is another than the one received before")]
    Fork(u64),
    #[error("{}", .0.problems.first().map(ToString::to_string).unwrap_or_default())]
    Invalid(Box<Report>),
    #[error("no certificate yet")]
    NotReady,
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
}

#[tonic::async_trait]
impl audit_server::Audit for Receiver {
    type UploadStream = Replies;

    async fn upload(
        &self,
        request: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<Self::UploadStream>, Status> {
        self.authorise(&request)?;
        // Full: the next request is not read until the gate reads its replies.
        let (replies, stream) = mpsc::channel(4);
        let (receiver, requests) = (self.clone(), request.into_inner());
        // Ends with the connection: the request stream ends, or nobody takes the replies.
        tokio::spawn(async move {
            if let Err(status) = receiver.converse(requests, &replies).await {
                let _ = replies.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

fn entry(entry: audit::Entry) -> Option<Entry> {
    let hash = entry.hash.try_into().ok()?;
    Some(Entry {
        sequence: entry.sequence,
        body: entry.body,
        hash,
    })
}

pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
