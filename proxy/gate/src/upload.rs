//! The spool's entries on their way to the central record.

use std::{convert::Infallible, path::PathBuf, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use turnpike_certs::{CredentialStore, client_config};
use turnpike_ledger::Entry;
use turnpike_rules::Identity;
use turnpike_wire::{
    audit::{self, UploadReply, UploadRequest, audit_client::AuditClient},
    backoff::Backoff,
    channel::{ConnectError, connect},
    names::ALPN_GRPC,
};

use crate::spool::{Reader, Spool, StoreError};

/// Entries of one message.
const BATCH: u32 = 256;
/// For the central record to answer what it was sent. One that is there and says nothing is asked on
/// another connection.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
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
    Status(#[from] Status),
    #[error("the spool cannot be read: {0}")]
    Store(#[from] StoreError),
    #[error("the central record ended the upload")]
    Ended,
    #[error("the central record has not answered for {ANSWER_WITHIN:?}")]
    Silent,
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
pub async fn upload(config: UploadConfig, credentials: Arc<CredentialStore>, spool: Spool) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(15));
    loop {
        credentials.ready().await;
        let mut progress = false;
        let Err(error) = session(&config, &credentials, &spool, &mut progress).await;
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
    progress: &mut bool,
) -> Result<Infallible, UploadError> {
    let tls = client_config(credentials.clone(), config.identity.clone(), ALPN_GRPC);
    // The certificate is checked for the identity, not for this name.
    let channel = connect(&config.address, "turnpike-audit.turnpike-system.svc", tls).await?;
    let (requests, stream) = mpsc::channel(2);
    let node = config.node.clone();
    let hello = UploadRequest {
        node: node.clone(),
        entries: vec![],
    };
    requests.send(hello).await.map_err(|_| UploadError::Ended)?;
    let mut client = AuditClient::new(channel);
    let opened = client.upload(ReceiverStream::new(stream));
    let opened = timeout(ANSWER_WITHIN, opened).await;
    let session = Session {
        node,
        requests,
        replies: opened.map_err(|_| UploadError::Silent)??.into_inner(),
        reader: Reader::open(&config.spool_dir).await?,
        spool,
    };
    session.run(progress).await
}

/// One stream to the central record, on which it has been told the node.
struct Session<'a, R> {
    node: String,
    requests: mpsc::Sender<UploadRequest>,
    replies: R,
    reader: Reader,
    spool: &'a Spool,
}

impl<R: Stream<Item = Result<UploadReply, Status>> + Unpin> Session<'_, R> {
    async fn run(mut self, progress: &mut bool) -> Result<Infallible, UploadError> {
        let mut committed = self.spool.committed();
        let mut theirs = self.answer().await?;
        if theirs > *committed.borrow() {
            let ours = *committed.borrow();
            return Err(UploadError::Behind { theirs, ours });
        }
        self.spool.central_at(theirs);
        loop {
            if theirs == *committed.borrow_and_update() {
                tokio::select! {
                    changed = committed.changed() => changed.map_err(|_| UploadError::Ended)?,
                    // Nothing is asked, so a message is the end or a refusal.
                    reply = self.replies.next() => { accepted(reply)?; }
                }
                continue;
            }
            let acknowledged = self.send_after(theirs).await?;
            if acknowledged <= theirs {
                return Err(UploadError::Refused("it does not move on".into()));
            }
            theirs = acknowledged;
            self.spool.acknowledged(theirs);
            *progress = true;
        }
    }

    /// Sends what follows `theirs`; how far the central record has it then.
    async fn send_after(&mut self, theirs: u64) -> Result<u64, UploadError> {
        let entries = self.reader.after(theirs, BATCH).await?;
        let request = UploadRequest {
            node: self.node.clone(),
            entries: entries.into_iter().map(wire).collect(),
        };
        let sent = self.requests.send(request).await;
        sent.map_err(|_| UploadError::Ended)?;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<u64, UploadError> {
        match timeout(ANSWER_WITHIN, self.replies.next()).await {
            Ok(reply) => accepted(reply),
            Err(_) => Err(UploadError::Silent),
        }
    }
}

fn accepted(reply: Option<Result<UploadReply, Status>>) -> Result<u64, UploadError> {
    match reply.transpose()? {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spool::{SpoolConfig, Writer};

    #[tokio::test]
    async fn a_record_that_takes_entries_and_says_nothing_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let config = SpoolConfig::new(dir.path(), "node-a");
        let (_writer, spool) = Writer::open(config, CredentialStore::empty(), Arc::default())
            .await
            .unwrap();
        let (requests, mut sent) = mpsc::channel(2);
        let (answer, replies) = mpsc::channel(2);
        let hello = UploadReply {
            committed: 0,
            refused: String::new(),
        };
        answer.send(Ok(hello)).await.unwrap();
        let session = Session {
            node: "node-a".into(),
            requests,
            replies: ReceiverStream::new(replies),
            reader: Reader::open(dir.path()).await.unwrap(),
            spool: &spool,
        };
        let mut progress = false;
        let running = async {
            let running = session.run(&mut progress);
            tokio::pin!(running);
            tokio::select! {
                ended = &mut running => panic!("{ended:?}"),
                request = sent.recv() => assert_eq!(request.unwrap().entries.len(), 1, "the restart"),
            }
            // No disk is waited for from here on, which the clock would not see.
            tokio::time::pause();
            timeout(100 * ANSWER_WITHIN, running).await
        };
        let ended = running.await.expect("it waits for ever").unwrap_err();
        assert!(matches!(ended, UploadError::Silent), "{ended}");
        assert_eq!((progress, spool.unacknowledged()), (false, 1));
    }
}
