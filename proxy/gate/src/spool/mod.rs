//! The spool: this node's chain of records on disk.
//!
//! One task owns the chain and is its only writer. Whoever has something to record sends it through
//! a bounded queue; the writer takes all that waits, commits it with one disk sync and answers
//! everybody. Where the queue is full or the disk refuses, the caller is told, and what needed the
//! record does not happen: no record, no egress.
//!
//! A chain begins once per node. After a crash it continues from the last committed entry with a
//! `restart`, and with a `lost` for each connection whose end nobody saw.

mod store;
mod writer;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use turnpike_ledger::Event;

pub use self::{
    store::{Reader, StoreError},
    writer::Writer,
};
use crate::{bucket::Bucket, metrics::Metrics, state::Pod};

/// Records waiting for their commit. A full queue means that the disk does not keep up with what is
/// asked; new egress is denied until it does.
const QUEUE: usize = 4096;

/// How the spool is kept.
#[derive(Clone, Debug)]
pub struct SpoolConfig {
    /// Must exist and belong to the gate's user.
    pub dir: PathBuf,
    pub node: String,
    /// The file never grows beyond this; then new egress is denied.
    pub max_bytes: u64,
    /// A checkpoint at least every so many entries,
    pub checkpoint_entries: u64,
    /// and this long after an entry at the latest.
    pub checkpoint_interval: Duration,
    /// Entries kept here after the central record has them.
    pub keep_acknowledged: u64,
}

impl SpoolConfig {
    pub fn new(dir: impl Into<PathBuf>, node: impl Into<String>) -> Self {
        Self {
            dir: dir.into(),
            node: node.into(),
            max_bytes: 1 << 30,
            checkpoint_entries: 1024,
            checkpoint_interval: Duration::from_secs(5),
            keep_acknowledged: 100_000,
        }
    }
}

/// Why something could not be recorded. Whatever depended on the record must not happen.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotRecorded {
    #[error("the record's queue is full: the node's disk does not keep up")]
    QueueFull,
    #[error("the record has grown to its bound on this node")]
    Full,
    #[error("the record cannot be written: {0}")]
    Store(Arc<str>),
    #[error("the gate is stopping")]
    Stopping,
}

enum Command {
    Append {
        time_ms: i64,
        event: Box<Event>,
        done: Option<oneshot::Sender<Result<u64, NotRecorded>>>,
    },
    /// The central record has committed everything up to here.
    Acknowledged(u64),
}

/// The way to the writer; cheap to clone.
#[derive(Clone, Debug)]
pub struct Spool {
    queue: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    committed: watch::Receiver<u64>,
}

#[derive(Debug)]
struct Shared {
    /// Records that found no room; they become one `gap`.
    dropped: AtomicU64,
    /// How far the central record has the chain, as far as is known.
    acknowledged: AtomicU64,
    boot: String,
    next_connection: AtomicU64,
    /// For refusals of nobody's packets: anybody who reaches the node can cause those.
    strangers: Mutex<Bucket>,
    metrics: Arc<Metrics>,
}

impl Spool {
    /// Records and returns the sequence once it is on disk. Refused at once where the queue is full.
    /// What is refused for want of room or disk counts as dropped, and so becomes part of a `gap`.
    pub async fn record(&self, event: Event) -> Result<u64, NotRecorded> {
        let (done, answer) = oneshot::channel();
        let command = Command::Append {
            time_ms: now_ms(),
            event: Box::new(event),
            done: Some(done),
        };
        self.queue.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                self.drop_one();
                NotRecorded::QueueFull
            }
            mpsc::error::TrySendError::Closed(_) => NotRecorded::Stopping,
        })?;
        answer.await.map_err(|_| NotRecorded::Stopping)?
    }

    /// The same for what has happened already, such as a connection's end: waits for room.
    pub async fn record_end(&self, event: Event) -> Result<u64, NotRecorded> {
        let (done, answer) = oneshot::channel();
        let command = Command::Append {
            time_ms: now_ms(),
            event: Box::new(event),
            done: Some(done),
        };
        self.queue
            .send(command)
            .await
            .map_err(|_| NotRecorded::Stopping)?;
        answer.await.map_err(|_| NotRecorded::Stopping)?
    }

    /// Records without waiting for the disk. What finds no room is counted, and the count becomes a
    /// `gap` in the chain.
    pub fn note(&self, event: Event) {
        let command = Command::Append {
            time_ms: now_ms(),
            event: Box::new(event),
            done: None,
        };
        if self.queue.try_send(command).is_err() {
            self.drop_one();
        }
    }

    /// Counts something that was not recorded on purpose or for want of room.
    pub fn drop_one(&self) {
        self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        self.shared.metrics.dropped_records.inc();
    }

    /// Whether a refusal fits the pod's budget of records, or that of all sources that are no pod's.
    /// One that does not is counted as dropped.
    pub fn may_record_denial(&self, pod: Option<&Pod>, now: Instant) -> bool {
        let may = match pod {
            Some(pod) => pod.runtime.denials.lock().take(now),
            None => self.shared.strangers.lock().take(now),
        };
        if !may {
            self.drop_one();
        }
        may
    }

    /// The central record has taken everything up to here, which makes room. Never blocks: an
    /// acknowledgement that finds no room is repeated by the next one.
    pub fn acknowledged(&self, sequence: u64) {
        self.central_at(sequence);
        let _ = self.queue.try_send(Command::Acknowledged(sequence));
    }

    /// How far the central record says that it has a chain of this node. Makes no room: whether it
    /// is this chain shows only when it takes what follows.
    pub fn central_at(&self, sequence: u64) {
        self.shared.acknowledged.store(sequence, Ordering::Relaxed);
    }

    /// Entries that this node alone has. Of the time before the central record has spoken to this
    /// gate, what was written down of it: a few too many rather than too few.
    pub fn unacknowledged(&self) -> u64 {
        let acknowledged = self.shared.acknowledged.load(Ordering::Relaxed);
        self.committed.borrow().saturating_sub(acknowledged)
    }

    /// Sequence of the last committed entry, as it moves.
    pub fn committed(&self) -> watch::Receiver<u64> {
        self.committed.clone()
    }

    /// A name for a connection that no other on this node has or had.
    pub fn connection_id(&self) -> String {
        let n = self.shared.next_connection.fetch_add(1, Ordering::Relaxed);
        format!("{}-{n}", self.shared.boot)
    }
}

/// Unix time in milliseconds, as records carry it.
pub fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
