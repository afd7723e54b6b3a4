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
    /// What the record must say before anything else of this start, while the disk refuses it.
    restart: Events,
    /// Entries since the last checkpoint, and since when there are any.
    unsealed: u64,
    unsealed_since: Option<Instant>,
    /// When a checkpoint was last tried, for what is not new enough to be due by itself.
    sealed: Instant,
    /// How far the spool has grown.
    level: Level,
    /// Goes to disk with the next commit: one of its own would cost a disk sync.
    acknowledged: Option<u64>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("head", &self.chain.head())
            .finish_non_exhaustive()
    }
}

type Events = Vec<(i64, Event)>;

/// What a spool of some size still takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    All,
    /// From half of its bound on, what happened is counted where it is not needed for something to
    /// happen: refusals of one pod do not end the egress of all.
    Needed,
    /// At its bound: nothing new may begin until the central record has acknowledged enough.
    Ends,
}

impl Level {
    fn takes(self, event: &Event) -> bool {
        match event {
            Event::Denied(_) | Event::Dns(_) => self == Self::All,
            Event::Opened(_) | Event::Request(_) => self != Self::Ends,
            _ => true,
        }
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
        let acknowledged = store.acknowledged().await?;
        let (sender, queue) = mpsc::channel(QUEUE);
        let (committed, receiver) = watch::channel(head.sequence);
        let shared = Arc::new(Shared {
            dropped: AtomicU64::new(0),
            acknowledged: AtomicU64::new(acknowledged),
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
            restart: Events::new(),
            unsealed: 0,
            unsealed_since: None,
            sealed: Instant::now(),
            level: Level::All,
            acknowledged: None,
        };
        writer.measure().await;
        writer.mark_restart(live);
        writer.settle_restart().await;
        Ok((writer, spool))
    }

    fn mark_restart(&mut self, live: Vec<String>) {
        let boot = self.shared.boot.clone();
        let restart = Event::Restart {
            boot,
            version: env!("CARGO_PKG_VERSION").into(),
        };
        let lost = live
            .into_iter()
            .map(|connection| Event::Lost { connection });
        let events = std::iter::once(restart).chain(lost);
        self.restart = events.map(|event| (now_ms(), event)).collect();
    }

    /// Puts the restart on record. A disk or spool without room is no reason not to start: names
    /// are answered, and what is there is uploaded, which makes room.
    async fn settle_restart(&mut self) {
        if self.restart.is_empty() {
            return;
        }
        match self.commit(self.restart.clone(), false).await {
            Ok(()) => self.restart.clear(),
            Err(error) => tracing::error!(
                %error,
                "the restart cannot be recorded: egress is denied until it can"
            ),
        }
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
        if !self.restart.is_empty() {
            return;
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
                    if !self.level.takes(&event) {
                        self.refuse_full(done);
                    } else {
                        events.push((time_ms, *event));
                        waiting.push(done);
                    }
                }
                Command::Acknowledged(sequence) => {
                    self.acknowledged = Some(sequence);
                    self.prune(sequence).await;
                }
            }
            next = (events.len() < BATCH)
                .then(|| self.queue.try_recv().ok())
                .flatten();
        }
        if events.is_empty() {
            return;
        }
        let count = events.len() as u64;
        self.settle_restart().await;
        let first = self.chain.head().sequence + 1;
        let result = if self.restart.is_empty() {
            self.commit(events, false).await
        } else {
            Err(StoreError::NoRestart)
        };
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
        let due = |since: Instant| since.elapsed() >= self.config.checkpoint_interval;
        // Not sooner for drops: they may be one pod's doing, and many.
        let dropped = self.shared.dropped.load(Ordering::Relaxed) > 0 && due(self.sealed);
        if !dropped && !self.unsealed_since.is_some_and(due) {
            return;
        }
        self.settle_restart().await;
        if self.level == Level::Ends || !self.restart.is_empty() {
            return; // the reserve is for ends, not for one gap after the other
        }
        self.sealed = Instant::now();
        if let Err(error) = self.commit(Vec::new(), true).await {
            tracing::warn!(%error, "a checkpoint could not be written");
        }
    }

    /// Puts all of it on disk or none; with `seal`, what was dropped and a checkpoint too.
    async fn commit(&mut self, events: Events, seal: bool) -> Result<(), StoreError> {
        let mut draft = Draft::after(&self.chain, &self.config.node);
        for (time_ms, event) in events {
            draft.append(time_ms, event);
        }
        let due = self.unsealed + draft.length() >= self.config.checkpoint_entries;
        let seal = seal || due;
        let told = if seal {
            self.tell_dropped(&mut draft)
        } else {
            0
        };
        let unsealed = self.unsealed + draft.length();
        let sealed = seal && unsealed > 0 && self.seal(&mut draft);
        if draft.length() == 0 {
            return Ok(());
        }
        let Draft {
            chain, mut batch, ..
        } = draft;
        batch.acknowledged = self.acknowledged;
        let started = Instant::now();
        self.store.commit(&batch).await?;
        self.acknowledged = None;
        self.shared
            .metrics
            .commit_seconds
            .observe(started.elapsed().as_secs_f64());
        self.shared
            .metrics
            .commit_entries
            .observe(batch.entries.len() as f64);
        self.shared.dropped.fetch_sub(told, Ordering::Relaxed);
        self.chain = chain;
        self.unsealed = if sealed { 0 } else { unsealed };
        self.unsealed_since = if sealed {
            None
        } else {
            self.unsealed_since.or_else(|| Some(Instant::now()))
        };
        self.committed.send_replace(self.chain.head().sequence);
        self.measure().await;
        Ok(())
    }

    fn tell_dropped(&self, draft: &mut Draft) -> u64 {
        let entries = self.shared.dropped.load(Ordering::Relaxed);
        if entries > 0 {
            let reason = "records beyond the queue, the disk or a pod's budget".into();
            draft.append(now_ms(), Event::Gap { entries, reason });
        }
        entries
    }

    /// False while there are no credentials yet: the entries stay unsealed until there are.
    fn seal(&self, draft: &mut Draft) -> bool {
        let Some(credentials) = self.credentials.load() else {
            return false;
        };
        let head = draft.chain.head();
        match Checkpoint::sign(&credentials, &self.config.node, &head, now_ms()) {
            Ok(checkpoint) => {
                draft.append(now_ms(), Event::Checkpoint(checkpoint));
                true
            }
            Err(error) => {
                tracing::error!(%error, "no checkpoint");
                false
            }
        }
    }

    /// What is on disk stays so if this fails.
    async fn measure(&mut self) {
        let used = match self.store.used().await {
            Ok(used) => used,
            Err(error) => return tracing::error!(%error, "the spool cannot be measured"),
        };
        let bound = self.config.max_bytes;
        let level = if used >= bound {
            Level::Ends
        } else if used >= bound / 2 {
            Level::Needed
        } else {
            Level::All
        };
        if level == self.level {
            return;
        }
        self.level = level;
        match level {
            Level::All => tracing::info!("the spool has room again"),
            Level::Needed => tracing::warn!(
                bound,
                "the spool is half full: refusals and answers are counted, not recorded, until the \
                 central record has acknowledged enough of it"
            ),
            Level::Ends => tracing::error!(
                bound,
                "the spool is full: new egress is denied until the central record has \
                 acknowledged enough of it, or its bound is raised"
            ),
        }
    }

    async fn prune(&mut self, acknowledged: u64) {
        // The last acknowledged entry stays: the next one follows from it.
        let keep = if self.level == Level::All && self.restart.is_empty() {
            self.config.keep_acknowledged
        } else {
            0
        };
        let keep_from = acknowledged.saturating_sub(keep);
        if keep_from <= 1 {
            return;
        }
        if let Err(error) = self.store.prune(keep_from).await {
            tracing::warn!(%error, "acknowledged entries could not be removed from the spool");
        }
        self.measure().await;
        self.settle_restart().await;
    }
}

/// A commit in the making, on a copy of the chain, which takes the chain's place once it is on disk.
struct Draft {
    node: String,
    chain: Chain,
    batch: Batch,
}

impl Draft {
    fn after(chain: &Chain, node: &str) -> Self {
        Self {
            node: node.to_owned(),
            chain: chain.clone(),
            batch: Batch::default(),
        }
    }

    fn append(&mut self, time_ms: i64, event: Event) {
        match &event {
            Event::Opened(attempt) => self.batch.opened.push(attempt.connection.clone()),
            Event::Closed(closed) => self.batch.ended.push(closed.connection.clone()),
            Event::Lost { connection } => self.batch.ended.push(connection.clone()),
            _ => {}
        }
        let record = Record {
            time_ms,
            node: self.node.clone(),
            event,
        };
        self.batch.entries.push(self.chain.append(record.encode()));
    }

    fn length(&self) -> u64 {
        self.batch.entries.len() as u64
    }
}
