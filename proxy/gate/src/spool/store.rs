//! The SQLite file under the spool.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use sqlx::{
    Connection, QueryBuilder, Row, Sqlite, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::sync::watch;
use turnpike_ledger::{Entry, Head, Record};

const FILE: &str = "record.sqlite";
const LOCK: &str = "record.lock";
const PAGE: u64 = 4096;
/// Beyond the bound, for what has happened already: ends of connections, restarts, checkpoints.
const RESERVE: u64 = 4 << 20;

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS entries (
        sequence INTEGER PRIMARY KEY, body BLOB NOT NULL, hash BLOB NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS live (connection TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value ANY) STRICT, WITHOUT ROWID;
";

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the gate's restart is not on record yet")]
    NoRestart,
    #[error("{0} is in use by another gate")]
    InUse(PathBuf),
    #[error("the spool's database: {0}")]
    Database(#[from] sqlx::Error),
    #[error(
        "{path} holds the chain of node {found:?}, but this is node {node:?}; give each node a \
         --spool-dir of its own"
    )]
    OtherNode {
        path: PathBuf,
        found: String,
        node: String,
    },
    #[error(
        "{path}: entry {sequence} does not follow from the entry before it; the chain was changed. \
         Keep the file as evidence and start with an empty --spool-dir"
    )]
    Broken { path: PathBuf, sequence: u64 },
}

/// The writing connection. The lock file keeps a second gate off the same chain.
pub(super) struct Store {
    connection: SqliteConnection,
    path: PathBuf,
    _lock: Flock<File>,
}

/// What one commit changes.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) entries: Vec<Entry>,
    pub(super) opened: Vec<String>,
    pub(super) ended: Vec<String>,
    /// How far the central record has the chain, where that is news.
    pub(super) acknowledged: Option<u64>,
}

impl Store {
    /// Opens or begins the chain and returns where it stands.
    pub(super) async fn open(
        dir: &Path,
        node: &str,
        max_bytes: u64,
    ) -> Result<(Self, Head), StoreError> {
        let lock = lock(&dir.join(LOCK))?;
        let path = dir.join(FILE);
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .page_size(u32::try_from(PAGE).expect("a small constant"))
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .pragma("max_page_count", ((max_bytes + RESERVE) / PAGE).to_string())
            // In a commit, connections would wait for it; the [`Checkpointer`] does it.
            .pragma("wal_autocheckpoint", "0")
            .busy_timeout(Duration::from_secs(5));
        let mut connection = SqliteConnection::connect_with(&options).await?;
        sqlx::raw_sql(SCHEMA).execute(&mut connection).await?;
        let mut store = Self {
            connection,
            path,
            _lock: lock,
        };
        store.check_node(node).await?;
        let head = store.head(node).await?;
        Ok((store, head))
    }

    async fn check_node(&mut self, node: &str) -> Result<(), StoreError> {
        sqlx::query("INSERT INTO meta (name, value) VALUES ('node', ?) ON CONFLICT DO NOTHING")
            .bind(node)
            .execute(&mut self.connection)
            .await?;
        let found: String = sqlx::query_scalar("SELECT value FROM meta WHERE name = 'node'")
            .fetch_one(&mut self.connection)
            .await?;
        if found == node {
            return Ok(());
        }
        Err(StoreError::OtherNode {
            path: self.path.clone(),
            found,
            node: node.to_owned(),
        })
    }

    /// The last entry, after a look at whether it follows from the one before.
    async fn head(&mut self, node: &str) -> Result<Head, StoreError> {
        let rows = sqlx::query("SELECT * FROM entries ORDER BY sequence DESC LIMIT 2")
            .fetch_all(&mut self.connection)
            .await?;
        let entries = rows.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
        let before = match entries.get(1) {
            Some(before) => before.head(),
            None => Head::genesis(node),
        };
        let Some(last) = entries.first() else {
            return Ok(before);
        };
        // A pruned chain may have a single entry left, whose predecessor is gone.
        let alone = entries.len() == 1 && last.sequence > 1;
        let follows =
            last.sequence == before.sequence + 1 && before.next_hash(&last.body) == last.hash;
        if alone || follows {
            return Ok(last.head());
        }
        Err(StoreError::Broken {
            path: self.path.clone(),
            sequence: last.sequence,
        })
    }

    /// Connections that were open when the writer last stopped.
    pub(super) async fn live(&mut self) -> Result<Vec<String>, StoreError> {
        let query = sqlx::query_scalar("SELECT connection FROM live ORDER BY connection");
        Ok(query.fetch_all(&mut self.connection).await?)
    }

    /// All of the batch or none of it, on disk when this returns.
    pub(super) async fn commit(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.run("BEGIN IMMEDIATE").await?;
        let written = match self.write(batch).await {
            Ok(()) => self.run("COMMIT").await,
            Err(error) => Err(error),
        };
        if written.is_err() {
            // Where the disk was full, SQLite has done it by itself and refuses; sqlx's own
            // transactions take that for one that goes on, and begin no other.
            let _ = self.run("ROLLBACK").await;
        }
        written
    }

    async fn run(&mut self, statement: &'static str) -> Result<(), StoreError> {
        sqlx::raw_sql(statement)
            .execute(&mut self.connection)
            .await?;
        Ok(())
    }

    async fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        for entries in batch.entries.chunks(1000) {
            let mut insert =
                QueryBuilder::<Sqlite>::new("INSERT INTO entries (sequence, body, hash) ");
            insert.push_values(entries, |mut row, entry| {
                row.push_bind(i64::try_from(entry.sequence).unwrap_or(i64::MAX))
                    .push_bind(&entry.body[..])
                    .push_bind(&entry.hash[..]);
            });
            insert.build().execute(&mut self.connection).await?;
        }
        for connection in &batch.opened {
            sqlx::query("INSERT OR IGNORE INTO live (connection) VALUES (?)")
                .bind(connection)
                .execute(&mut self.connection)
                .await?;
        }
        for connection in &batch.ended {
            sqlx::query("DELETE FROM live WHERE connection = ?")
                .bind(connection)
                .execute(&mut self.connection)
                .await?;
        }
        if let Some(sequence) = batch.acknowledged {
            sqlx::query(
                "INSERT INTO meta (name, value) VALUES ('acknowledged', ?) \
                 ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            )
            .bind(i64::try_from(sequence).unwrap_or(i64::MAX))
            .execute(&mut self.connection)
            .await?;
        }
        Ok(())
    }

    /// How far the central record had the chain at the last commit; what was removed, it had.
    pub(super) async fn acknowledged(&mut self) -> Result<u64, StoreError> {
        let sequence: i64 = sqlx::query_scalar(
            "SELECT max(coalesce((SELECT value FROM meta WHERE name = 'acknowledged'), 0), \
             coalesce((SELECT min(sequence) FROM entries), 1) - 1)",
        )
        .fetch_one(&mut self.connection)
        .await?;
        Ok(sequence.unsigned_abs())
    }

    /// Bytes in use; what was pruned is used again.
    pub(super) async fn used(&mut self) -> Result<u64, StoreError> {
        let pages: i64 = sqlx::query_scalar(
            "SELECT (SELECT page_count FROM pragma_page_count) \
             - (SELECT freelist_count FROM pragma_freelist_count)",
        )
        .fetch_one(&mut self.connection)
        .await?;
        Ok(pages.unsigned_abs() * PAGE)
    }

    /// Removes entries before `sequence`, a bounded number at a time.
    pub(super) async fn prune(&mut self, sequence: u64) -> Result<(), StoreError> {
        sqlx::query(
            "DELETE FROM entries WHERE sequence IN \
             (SELECT sequence FROM entries WHERE sequence < ? ORDER BY sequence LIMIT 2000)",
        )
        .bind(i64::try_from(sequence).unwrap_or(i64::MAX))
        .execute(&mut self.connection)
        .await?;
        Ok(())
    }
}

/// Carries what was committed from SQLite's log into its file, on a connection of its own.
pub(super) struct Checkpointer(SqliteConnection);

/// Entries whose commits may wait in the log.
const LOGGED_ENTRIES: u64 = 500;
/// A log that has grown to this is emptied though the writer must wait for that: it could grow for
/// as long as the writer never pauses.
const LOG_PAGES: i64 = (64 << 20) / PAGE as i64;

impl Checkpointer {
    pub(super) async fn open(dir: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(dir.join(FILE))
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(5));
        Ok(Self(SqliteConnection::connect_with(&options).await?))
    }

    /// Follows the commits; ends with their writer.
    pub(super) async fn run(mut self, mut committed: watch::Receiver<u64>) {
        let mut done = *committed.borrow();
        loop {
            let due = |head: &u64| *head >= done + LOGGED_ENTRIES;
            let Ok(head) = committed.wait_for(due).await.map(|head| *head) else {
                return;
            };
            done = head;
            if let Err(error) = self.checkpoint().await {
                tracing::warn!(%error, "the spool's log could not be carried into its file");
            }
        }
    }

    /// Keeps no writer waiting, unless the log is far too long.
    async fn checkpoint(&mut self) -> Result<(), StoreError> {
        let row = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)")
            .fetch_one(&mut self.0)
            .await?;
        let pages: i64 = row.try_get(1)?;
        if pages >= LOG_PAGES {
            self.empty().await?;
        }
        Ok(())
    }

    /// The same to the end, and the log's room is given back.
    pub(super) async fn empty(&mut self) -> Result<(), StoreError> {
        sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
            .execute(&mut self.0)
            .await?;
        Ok(())
    }
}

fn lock(path: &Path) -> Result<Flock<File>, StoreError> {
    let io = |source| StoreError::Io {
        path: path.to_owned(),
        source,
    };
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(io)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| StoreError::InUse(path.to_owned()))
}

/// Reads the chain beside its writer.
pub struct Reader(SqliteConnection);

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl Reader {
    pub async fn open(dir: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(dir.join(FILE))
            .read_only(true)
            .busy_timeout(Duration::from_secs(5));
        Ok(Self(SqliteConnection::connect_with(&options).await?))
    }

    /// At most `limit` entries after `sequence`, in order.
    pub async fn after(&mut self, sequence: u64, limit: u32) -> Result<Vec<Entry>, StoreError> {
        let rows =
            sqlx::query("SELECT * FROM entries WHERE sequence > ? ORDER BY sequence LIMIT ?")
                .bind(i64::try_from(sequence).unwrap_or(i64::MAX))
                .bind(limit)
                .fetch_all(&mut self.0)
                .await?;
        Ok(rows.iter().map(entry).collect::<Result<_, _>>()?)
    }

    /// At most `limit` records, newest first; what cannot be read is left out.
    pub async fn newest(&mut self, limit: u32) -> Result<Vec<Record>, StoreError> {
        let rows = sqlx::query("SELECT * FROM entries ORDER BY sequence DESC LIMIT ?")
            .bind(limit)
            .fetch_all(&mut self.0)
            .await?;
        let entries = rows.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
        Ok(entries
            .iter()
            .filter_map(|entry| Record::decode(&entry.body).ok())
            .collect())
    }
}

fn entry(row: &sqlx::sqlite::SqliteRow) -> Result<Entry, sqlx::Error> {
    let sequence: i64 = row.try_get("sequence")?;
    let hash: &[u8] = row.try_get("hash")?;
    let hash = hash
        .try_into()
        .map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    Ok(Entry {
        sequence: sequence.unsigned_abs(),
        body: row.try_get("body")?,
        hash,
    })
}

#[cfg(test)]
mod tests {
    use turnpike_ledger::Chain;

    use super::*;

    fn length(dir: &Path, name: &str) -> u64 {
        dir.join(name).metadata().unwrap().len()
    }

    #[tokio::test]
    async fn no_commit_waits_for_the_log_to_be_carried_over() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, head) = Store::open(dir.path(), "node-a", 1 << 30).await.unwrap();
        let mut beside = Checkpointer::open(dir.path()).await.unwrap();
        beside.empty().await.unwrap();
        let before = length(dir.path(), FILE);
        let mut chain = Chain::resume(head);
        for _ in 0..100 {
            let mut batch = Batch::default();
            for _ in 0..20 {
                batch.entries.push(chain.append(vec![0; 3000]));
            }
            store.commit(&batch).await.unwrap();
        }
        assert!(length(dir.path(), &format!("{FILE}-wal")) > 1500 * PAGE);
        assert_eq!(length(dir.path(), FILE), before, "a commit carried it over");
        beside.checkpoint().await.unwrap();
        assert!(length(dir.path(), FILE) > 1500 * PAGE);
        beside.empty().await.unwrap();
        assert_eq!(length(dir.path(), &format!("{FILE}-wal")), 0);
    }

    #[tokio::test]
    async fn the_log_is_carried_over_in_step_with_the_commits() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, head) = Store::open(dir.path(), "node-a", 1 << 30).await.unwrap();
        let beside = Checkpointer::open(dir.path()).await.unwrap();
        let (committed, receiver) = watch::channel(0);
        let task = tokio::spawn(beside.run(receiver));
        let mut batch = Batch::default();
        let mut chain = Chain::resume(head);
        for _ in 0..LOGGED_ENTRIES {
            batch.entries.push(chain.append(vec![0; 3000]));
        }
        store.commit(&batch).await.unwrap();
        let before = length(dir.path(), FILE);
        committed.send_replace(LOGGED_ENTRIES);
        while length(dir.path(), FILE) == before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(committed);
        task.await.unwrap();
    }
}
