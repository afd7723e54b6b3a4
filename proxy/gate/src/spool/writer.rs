//! The one task that writes the chain.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use turnpike_certs::CredentialStore;
use turnpike_ledger::{Chain, Checkpoint, Event, Record};

use super::{
    Command, NotRecorded, QUEUE, Shared, Spool, SpoolConfig, StoreError, now_ms,
    store::{Batch, Checkpointer, Store},
};
use crate::{bucket::Bucket, metrics::Metrics};

/// Records of one commit at most: bounds its memory and how long the first of them waits.
const BATCH: usize = 1024;

/// Owns the chain; [`Writer::run`] until cancelled.
pub struct Writer {
    store: Store,
    /// Until [`Writer::run`] sets it going.
    checkpointer: Option<Checkpointer>,
    chain: Chain,
    config: SpoolConfig,
    credentials: Arc<CredentialStore>,
    queue: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    committed: watch::Sender<u64>,
    /// Entries since the last checkpoint, and since when there are any.
    unsealed: u64,
    unsealed_since: Option<Instant>,
    /// The spool has grown to its bound: nothing new may begin until the central record has
    /// acknowledged enough.
    full: bool,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("head", &self.chain.head())
            .finish_non_exhaustive()
    }
}

type Waiting = Vec<tokio::sync::oneshot::Sender<Result<u64, NotRecorded>>>;

impl Writer {
    /// Opens the chain, and marks the restart and what the last stop lost.
    pub async fn open(
        config: SpoolConfig,
        credentials: Arc<CredentialStore>,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, Spool), StoreError> {
        let (mut store, head) = Store::open(&config.dir, &config.node, config.max_bytes).await?;
        let mut checkpointer = Checkpointer::open(&config.dir).await?;
        if let Err(error) = checkpointer.empty().await {
            tracing::warn!(%error, "what the last gate left in the spool's log stays there");
        }
        let live = store.live().await?;
        let (sender, queue) = mpsc::channel(QUEUE);
        let (committed, receiver) = watch::channel(head.sequence);
        let shared = Arc::new(Shared {
            dropped: AtomicU64::new(0),
            boot: format!("{:016x}", fastrand::u64(..)),
            next_connection: AtomicU64::new(1),
            strangers: Mutex::new(Bucket::new(10, 100)),
            metrics,
        });
        let spool = Spool {
            queue: sender,
            shared: shared.clone(),
            committed: receiver,
        };
        let chain = Chain::resume(head);
        let mut writer = Self {
            store,
            checkpointer: Some(checkpointer),
            chain,
            config,
            credentials,
            queue,
            shared,
            committed,
            unsealed: 0,
            unsealed_since: None,
            full: false,
        };
        writer.mark_restart(live).await?;
        Ok((writer, spool))
    }

    async fn mark_restart(&mut self, live: Vec<String>) -> Result<(), StoreError> {
        let boot = self.shared.boot.clone();
        let restart = Event::Restart {
            boot,
            version: env!("CARGO_PKG_VERSION").into(),
        };
        let lost = live
            .into_iter()
            .map(|connection| Event::Lost { connection });
        let events = std::iter::once(restart)
            .chain(lost)
            .map(|event| (now_ms(), event))
            .collect();
        self.commit(events, false).await
    }

    /// Writes until cancelled and the queue is empty, then seals the chain.
    pub async fn run(mut self, cancel: CancellationToken) {
        // Ends with this at the latest.
        let mut beside = JoinSet::new();
        if let Some(checkpointer) = self.checkpointer.take() {
            beside.spawn(checkpointer.run(self.committed.subscribe()));
        }
        let mut tick = interval(Duration::from_millis(250));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                command = self.queue.recv() => match command {
                    Some(command) => self.batch(command).await,
                    None => break,
                },
                _ = tick.tick() => self.seal_if_due().await,
                () = cancel.cancelled() => break,
            }
        }
        self.queue.close();
        while let Some(command) = self.queue.recv().await {
            self.batch(command).await;
        }
        if let Err(error) = self.commit(Vec::new(), true).await {
            tracing::warn!(%error, "the last checkpoint could not be written");
        }
    }

    /// Commits `first` and all that waits behind it, and answers.
    async fn batch(&mut self, first: Command) {
        let (mut events, mut waiting) = (Vec::new(), Waiting::new());
        let mut next = Some(first);
        while let Some(command) = next {
            match command {
                Command::Append {
                    time_ms,
                    event,
                    done,
                } => {
                    // Nobody waits for what was only noted.
                    let done = done.unwrap_or_else(|| tokio::sync::oneshot::channel().0);
                    if self.full && begins(&event) {
                        self.refuse_full(done);
                    } else {
                        events.push((time_ms, *event));
                        waiting.push(done);
                    }
                }
                Command::Acknowledged(sequence) => self.prune(sequence).await,
            }
            next = (events.len() < BATCH)
                .then(|| self.queue.try_recv().ok())
                .flatten();
        }
        if events.is_empty() {
            return;
        }
        let first = self.chain.head().sequence + 1;
        let count = events.len() as u64;
        let result = self.commit(events, false).await;
        if let Err(error) = &result {
            tracing::error!(%error, records = count, "records were not written: egress is denied");
            self.shared.dropped.fetch_add(count, Ordering::Relaxed);
            self.shared.metrics.dropped_records.inc_by(count);
        }
        let answer = result.map_err(|error| NotRecorded::Store(error.to_string().into()));
        for (sequence, done) in (first..).zip(waiting) {
            // Whoever waited may have given up.
            let _ = done.send(answer.clone().map(|()| sequence));
        }
    }

    fn refuse_full(&self, done: tokio::sync::oneshot::Sender<Result<u64, NotRecorded>>) {
        self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        self.shared.metrics.dropped_records.inc();
        let _ = done.send(Err(NotRecorded::Full));
    }

    async fn seal_if_due(&mut self) {
        if self.full {
            return; // the reserve is for ends, not for one gap after the other
        }
        let due = |since: Instant| since.elapsed() >= self.config.checkpoint_interval;
        let dropped = self.shared.dropped.load(Ordering::Relaxed) > 0;
        if (dropped || self.unsealed_since.is_some_and(due))
            && let Err(error) = self.commit(Vec::new(), true).await
        {
            tracing::warn!(%error, "a checkpoint could not be written");
        }
    }

    /// Appends to a copy of the chain, which takes the chain's place once it is on disk.
    async fn commit(&mut self, events: Vec<(i64, Event)>, seal: bool) -> Result<(), StoreError> {
        let mut chain = self.chain.clone();
        let mut batch = Batch::default();
        let node = self.config.node.clone();
        let append = |chain: &mut Chain, batch: &mut Batch, time_ms, event| {
            match &event {
                Event::Opened(attempt) => batch.opened.push(attempt.connection.clone()),
                Event::Closed(closed) => batch.ended.push(closed.connection.clone()),
                Event::Lost { connection } => batch.ended.push(connection.clone()),
                _ => {}
            }
            let record = Record {
                time_ms,
                node: node.clone(),
                event,
            };
            batch.entries.push(chain.append(record.encode()));
        };
        for (time_ms, event) in events {
            append(&mut chain, &mut batch, time_ms, event);
        }
        let dropped = self.shared.dropped.load(Ordering::Relaxed);
        if dropped > 0 {
            let reason = "records beyond the queue, the disk or a pod's budget".into();
            append(
                &mut chain,
                &mut batch,
                now_ms(),
                Event::Gap {
                    entries: dropped,
                    reason,
                },
            );
        }
        let unsealed = self.unsealed + batch.entries.len() as u64;
        let wanted = unsealed > 0 && (seal || unsealed >= self.config.checkpoint_entries);
        let checkpoint = if wanted {
            self.checkpoint(&chain)
        } else {
            None
        };
        let sealed = checkpoint.is_some();
        if let Some(checkpoint) = checkpoint {
            append(
                &mut chain,
                &mut batch,
                now_ms(),
                Event::Checkpoint(checkpoint),
            );
        }
        if batch.entries.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        self.store.commit(&batch).await?;
        self.shared
            .metrics
            .commit_seconds
            .observe(started.elapsed().as_secs_f64());
        self.shared
            .metrics
            .commit_entries
            .observe(batch.entries.len() as f64);
        self.shared.dropped.fetch_sub(dropped, Ordering::Relaxed);
        self.chain = chain;
        self.unsealed = if sealed { 0 } else { unsealed };
        self.unsealed_since = if sealed {
            None
        } else {
            self.unsealed_since.or_else(|| Some(Instant::now()))
        };
        self.committed.send_replace(self.chain.head().sequence);
        self.measure().await
    }

    async fn measure(&mut self) -> Result<(), StoreError> {
        let full = self.store.used().await? >= self.config.max_bytes;
        if full != self.full {
            self.full = full;
            if full {
                tracing::error!(
                    bound = self.config.max_bytes,
                    "the spool is full: new egress is denied until the central record has \
                     acknowledged enough of it, or its bound is raised"
                );
            } else {
                tracing::info!("the spool has room again");
            }
        }
        Ok(())
    }

    /// None while there are no credentials yet: the entries stay unsealed until there are.
    fn checkpoint(&self, chain: &Chain) -> Option<Checkpoint> {
        let credentials = self.credentials.load()?;
        let signed = Checkpoint::sign(&credentials, &self.config.node, &chain.head(), now_ms());
        signed
            .inspect_err(|error| tracing::error!(%error, "no checkpoint"))
            .ok()
    }

    async fn prune(&mut self, acknowledged: u64) {
        // The last acknowledged entry stays: the next one follows from it.
        let keep = if self.full {
            0
        } else {
            self.config.keep_acknowledged
        };
        let keep_from = acknowledged.saturating_sub(keep);
        if keep_from <= 1 {
            return;
        }
        let pruned = async {
            self.store.prune(keep_from).await?;
            self.measure().await
        };
        if let Err(error) = pruned.await {
            tracing::warn!(%error, "acknowledged entries could not be removed from the spool");
        }
    }
}

/// Whether an event is something new, which can be refused; not the end of what is on record.
fn begins(event: &Event) -> bool {
    matches!(
        event,
        Event::Opened(_) | Event::Request(_) | Event::Denied(_) | Event::Dns(_)
    )
}
