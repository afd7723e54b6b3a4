//! The pool behind a lock, with its journal behind a thread.
//!
//! A caller changes the pool in memory, leaves the records in the batch and waits. The writer
//! takes whatever has gathered, commits it with one sync and wakes all who wait for it: 30 ADDs
//! at once cost a few syncs, not 30. The batch is bounded by the callers: each leaves at most one
//! entry and waits for it, and the agent bounds the callers.

use std::{
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::{oneshot, watch};

use crate::{
    Attachment, Config, EniId, Full, Holder, Lease, Moment, PodRef, Pool, Record, encode,
    journal::{Journal, JournalError, Opened},
};

/// The disk refused. What was asked stands in memory alone and must be undone.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the node's journal could not be written: {0}")]
pub struct NotRecorded(#[source] Arc<JournalError>);

/// A commit under way.
#[derive(Debug)]
#[must_use = "nothing is durable before this is awaited"]
pub struct Recording(oneshot::Receiver<Verdict>);

impl Recording {
    /// Waits for the commit.
    pub async fn done(self) -> Result<(), NotRecorded> {
        // The writer outlives every caller; if it broke, nothing is durable any more.
        self.0.await.unwrap_or_else(|_| {
            Err(NotRecorded(Arc::new(JournalError::Io {
                action: "commit to",
                path: "pool.journal".into(),
                source: std::io::Error::other("the writer has stopped"),
            })))
        })
    }
}

/// What a release freed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Released {
    /// None: the attachment held nothing.
    pub lease: Option<Lease>,
    /// False where the disk refused: the release stands in this process, and a restart makes it
    /// again from the kernel, where the veth is gone.
    pub recorded: bool,
}

type Verdict = Result<(), NotRecorded>;

#[derive(Debug)]
pub struct Store {
    shared: Arc<Shared>,
    changes: watch::Receiver<u64>,
    writer: Option<JoinHandle<()>>,
    /// Its other end is the writer's.
    lives: watch::Receiver<()>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    changes: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    pool: Pool,
    batch: Vec<u8>,
    waiters: Vec<oneshot::Sender<Verdict>>,
    /// Memory is ahead of the disk: the next commit writes everything.
    behind: bool,
    /// The writer is at work on a batch that it took.
    committing: bool,
    syncs: u64,
    /// The store is dropped, or the writer is gone: nothing becomes durable any more.
    closed: bool,
}

impl Store {
    /// Restores the pool from `folder`'s journal. `boot` is the kernel's boot id.
    pub fn open(
        folder: &Path,
        config: Config,
        boot: &str,
        now: Moment,
    ) -> Result<Self, JournalError> {
        let Opened {
            mut journal,
            records,
            tail,
            cut,
            kept_as,
        } = Journal::open(folder)?;
        if cut > 0 {
            tracing::warn!(?tail, cut, ?kept_as, "the pool's journal did not end whole");
        }
        let mut pool = Pool::new(config);
        records.iter().for_each(|record| pool.apply(record));
        let mut behind = false;
        if cut > 0 {
            // The end of some ADD may have been in it.
            pool.distrust();
            if let Err(error) = journal.rewrite(&pool.snapshot()) {
                tracing::error!(%error, "the pool's journal is not whole yet");
                behind = true;
            }
        }
        let mut log = Vec::new();
        pool.boot(boot, now, &mut log);
        let mut batch = Vec::new();
        log.iter().for_each(|record| encode(record, &mut batch));
        Self::start(pool, batch, behind, journal).map_err(|source| JournalError::Io {
            action: "start the writer of",
            path: folder.to_owned(),
            source,
        })
    }

    fn start(
        pool: Pool,
        batch: Vec<u8>,
        behind: bool,
        journal: impl Commits + Send + 'static,
    ) -> std::io::Result<Self> {
        let (changes, receiver) = watch::channel(0);
        let state = State {
            pool,
            batch,
            waiters: Vec::new(),
            behind,
            committing: false,
            syncs: 0,
            closed: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            work: Condvar::new(),
            changes,
        });
        let (living, lives) = watch::channel(());
        let writer = thread::Builder::new().name("journal".into()).spawn({
            let shared = Arc::clone(&shared);
            move || {
                let _end = End {
                    shared: &shared,
                    _living: living,
                };
                write(&shared, journal);
            }
        })?;
        Ok(Self {
            shared,
            changes: receiver,
            writer: Some(writer),
            lives,
        })
    }

    /// Reads the pool.
    pub fn read<T>(&self, look: impl FnOnce(&Pool) -> T) -> T {
        look(&self.shared.state.lock().pool)
    }

    /// Changes the pool and returns when the records it appended are durable. The change stands
    /// in memory even if they could not be written; they are written with the next that can.
    pub async fn change<T>(
        &self,
        change: impl FnOnce(&mut Pool, &mut Vec<Record>) -> T,
    ) -> (T, Result<(), NotRecorded>) {
        let (value, done) = self.submit(change);
        (value, Recording(done).done().await)
    }

    /// An address for the attachment: a new one, or the one it has. It is reserved at once and
    /// durable when the [`Recording`] says so. It counts as unfinished until [`Pool::confirm`].
    pub fn lease(&self, holder: Holder, now: Moment) -> Result<(Lease, Recording), Full> {
        let (lease, done) = self.submit(|pool, log| pool.lease(holder, now, log));
        Ok((lease?, Recording(done)))
    }

    /// Puts a note beside the lease; `Ok` when it is durable.
    pub async fn note(&self, attachment: &Attachment, note: String) -> Result<(), NotRecorded> {
        let ((), recorded) = self
            .change(|pool, log| pool.note(attachment, note, log))
            .await;
        recorded
    }

    /// See [`Pool::recognise`]; `Ok` when it is durable.
    pub async fn recognise(
        &self,
        attachment: &Attachment,
        pod: PodRef,
        note: String,
    ) -> Result<(), NotRecorded> {
        let ((), recorded) = self
            .change(|pool, log| pool.recognise(attachment, pod, note, log))
            .await;
        recorded
    }

    /// Ends the attachment's lease. Its datapath must be gone.
    pub async fn release(&self, attachment: &Attachment, now: Moment) -> Released {
        let (lease, recorded) = self
            .change(|pool, log| pool.release(attachment, now, log))
            .await;
        if let Err(error) = &recorded {
            tracing::error!(%attachment, %error, "a release was not recorded");
        }
        Released {
            lease,
            recorded: recorded.is_ok(),
        }
    }

    /// The ADD failed before its address was used.
    pub async fn undo(&self, attachment: &Attachment) {
        let ((), recorded) = self.change(|pool, log| pool.undo(attachment, log)).await;
        if let Err(error) = recorded {
            tracing::error!(%attachment, %error, "an undone lease was not recorded");
        }
    }

    pub fn confirm(&self, attachment: &Attachment) {
        self.shared.state.lock().pool.confirm(attachment);
    }

    /// See [`Pool::ready`].
    pub fn ready(&self, eni: &EniId) {
        self.shared.state.lock().pool.ready(eni);
        self.shared.changes.send_modify(|count| *count += 1);
    }

    /// Wakes after every change of the pool.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// Returns when the writer has ended, which it does by a fault alone: nothing can be put on
    /// record any more, and whoever waits for it is told so.
    pub async fn ended(&self) {
        // Nothing is ever sent: it returns when the writer's end is gone.
        self.lives.clone().changed().await.ok();
    }

    /// Syncs of the journal so far.
    pub fn syncs(&self) -> u64 {
        self.shared.state.lock().syncs
    }

    fn submit<T>(
        &self,
        change: impl FnOnce(&mut Pool, &mut Vec<Record>) -> T,
    ) -> (T, oneshot::Receiver<Verdict>) {
        let (sender, receiver) = oneshot::channel();
        let mut log = Vec::new();
        let mut state = self.shared.state.lock();
        let value = change(&mut state.pool, &mut log);
        log.iter()
            .for_each(|record| encode(record, &mut state.batch));
        let settled = state.batch.is_empty() && !state.committing && !state.behind;
        if state.closed {
            drop(sender);
        } else if log.is_empty() && settled {
            sender.send(Ok(())).ok();
        } else {
            // Also for who only read: what it saw may not be durable yet.
            state.waiters.push(sender);
            self.shared.work.notify_one();
        }
        drop(state);
        self.shared.changes.send_modify(|count| *count += 1);
        (value, receiver)
    }
}

impl Drop for Store {
    /// Commits what is left.
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.work.notify_one();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the journal's writer panicked");
        }
    }
}

/// The writer's end, however it comes: nobody waits for it any more.
struct End<'a> {
    shared: &'a Shared,
    _living: watch::Sender<()>,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.closed = true;
        state.waiters.clear();
    }
}

/// Where batches become durable; takes as long as a disk does.
trait Commits {
    fn append(&mut self, lines: &[u8]) -> Result<(), JournalError>;
    fn rewrite(&mut self, snapshot: &[Record]) -> Result<(), JournalError>;
    fn wants_compaction(&self) -> bool;
    fn syncs(&self) -> u64;
}

impl Commits for Journal {
    fn append(&mut self, lines: &[u8]) -> Result<(), JournalError> {
        Self::append(self, lines)
    }

    fn rewrite(&mut self, snapshot: &[Record]) -> Result<(), JournalError> {
        Self::rewrite(self, snapshot)
    }

    fn wants_compaction(&self) -> bool {
        Self::wants_compaction(self)
    }

    fn syncs(&self) -> u64 {
        Self::syncs(self)
    }
}

/// The writer thread: one batch at a time, until the store is dropped and nothing is left.
fn write(shared: &Shared, mut journal: impl Commits) {
    loop {
        let mut state = shared.state.lock();
        while state.batch.is_empty() && state.waiters.is_empty() && !state.closed {
            shared.work.wait(&mut state);
        }
        if state.batch.is_empty() && state.waiters.is_empty() {
            return;
        }
        let batch = std::mem::take(&mut state.batch);
        let waiters = std::mem::take(&mut state.waiters);
        state.committing = true;
        let whole = (state.behind || journal.wants_compaction()).then(|| state.pool.snapshot());
        drop(state);
        let verdict = match whole {
            Some(snapshot) => journal.rewrite(&snapshot),
            None if batch.is_empty() => Ok(()),
            None => journal.append(&batch),
        };
        let mut state = shared.state.lock();
        state.syncs = journal.syncs();
        state.behind = verdict.is_err();
        state.committing = false;
        drop(state);
        let verdict = verdict.map_err(|error| NotRecorded(Arc::new(error)));
        for waiter in waiters {
            waiter.send(verdict.clone()).ok();
        }
    }
}

#[cfg(test)]
mod tests;
