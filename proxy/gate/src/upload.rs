//! The spool's entries on their way to the central record.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use turnpike_certs::{CredentialStore, client_config};
use turnpike_ledger::Entry;
use turnpike_rules::Identity;
use turnpike_wire::{
    audit::{self, UploadReply, UploadRequest, audit_client::AuditClient},
    backoff::Backoff,
    channel::{ConnectError, connect},
    names::ALPN_GRPC,
};

use crate::{
    metrics::Metrics,
    spool::{Reader, Spool, StoreError},
};

/// Entries of one message.
const BATCH: u32 = 256;
/// After the central record has refused the chain: nothing but a person mends that.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);

/// Where the central record is and who it must be.
#[derive(Clone, Debug)]
pub struct UploadConfig {
    /// `host:port`.
    pub address: String,
    pub identity: Identity,
    pub node: String,
    pub spool_dir: PathBuf,
}

#[derive(Debug, thiserror::Error)]
enum UploadError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Status(#[from] tonic::Status),
    #[error("the spool cannot be read: {0}")]
    Store(#[from] StoreError),
    #[error("the central record ended the upload")]
    Ended,
    #[error(
        "the central record refuses this node's chain: {0}. Its entries stay in the spool; compare \
         the two with `turnpike egress verify`"
    )]
    Refused(String),
    #[error(
        "the central record has entries up to {theirs}, this spool only up to {ours}: the spool of \
         this node was lost or replaced"
    )]
    Behind { theirs: u64, ours: u64 },
}

/// Uploads for as long as it is polled; resumes where the central record stands.
pub async fn upload(
    config: UploadConfig,
    credentials: Arc<CredentialStore>,
    spool: Spool,
    metrics: Arc<Metrics>,
) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(15));
    loop {
        credentials.ready().await;
        let mut progress = false;
        let Err(error) = session(&config, &credentials, &spool, &metrics, &mut progress).await;
        if progress {
            backoff.reset();
        }
        match &error {
            UploadError::Refused(_) | UploadError::Behind { .. } => {
                tracing::error!(%error, "no upload");
                sleep(REFUSED_PAUSE).await;
            }
            _ => {
                tracing::warn!(%error, "the upload broke off; it resumes");
                sleep(backoff.next_pause()).await;
            }
        }
    }
}

async fn session(
    config: &UploadConfig,
    credentials: &Arc<CredentialStore>,
    spool: &Spool,
    metrics: &Metrics,
    progress: &mut bool,
) -> Result<std::convert::Infallible, UploadError> {
    let tls = client_config(credentials.clone(), config.identity.clone(), ALPN_GRPC);
    // The certificate is checked for the identity, not for this name.
    let channel = connect(&config.address, "turnpike-audit.turnpike-system.svc", tls).await?;
    let (requests, stream) = mpsc::channel(2);
    let hello = UploadRequest {
        node: config.node.clone(),
        entries: vec![],
    };
    requests.send(hello).await.map_err(|_| UploadError::Ended)?;
    let mut replies = AuditClient::new(channel)
        .upload(ReceiverStream::new(stream))
        .await?
        .into_inner();
    let mut reader = Reader::open(&config.spool_dir).await?;
    let mut committed = spool.committed();
    let mut theirs = accepted(replies.message().await?)?;
    if theirs > *committed.borrow() {
        let ours = *committed.borrow();
        return Err(UploadError::Behind { theirs, ours });
    }
    loop {
        let ours = *committed.borrow_and_update();
        metrics
            .unacknowledged
            .set(i64::try_from(ours.saturating_sub(theirs)).unwrap_or(i64::MAX));
        if theirs == ours {
            tokio::select! {
                changed = committed.changed() => changed.map_err(|_| UploadError::Ended)?,
                // Nothing is asked, so a message is the end or a refusal.
                reply = replies.message() => { accepted(reply?)?; }
            }
            continue;
        }
        let entries = reader
            .after(theirs, BATCH)
            .await?
            .into_iter()
            .map(wire)
            .collect();
        let request = UploadRequest {
            node: config.node.clone(),
            entries,
        };
        requests
            .send(request)
            .await
            .map_err(|_| UploadError::Ended)?;
        let acknowledged = accepted(replies.message().await?)?;
        if acknowledged <= theirs {
            return Err(UploadError::Refused("it does not move on".into()));
        }
        theirs = acknowledged;
        spool.acknowledged(theirs);
        *progress = true;
    }
}

fn accepted(reply: Option<UploadReply>) -> Result<u64, UploadError> {
    match reply {
        None => Err(UploadError::Ended),
        Some(reply) if reply.refused.is_empty() => Ok(reply.committed),
        Some(reply) => Err(UploadError::Refused(reply.refused)),
    }
}

fn wire(entry: Entry) -> audit::Entry {
    audit::Entry {
        sequence: entry.sequence,
        body: entry.body,
        hash: entry.hash.to_vec(),
    }
}
