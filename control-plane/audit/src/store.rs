//! Chains of all nodes in one database.

use std::{str::FromStr, time::Duration};

use sqlx::{
    QueryBuilder, Row, Sqlite, SqlitePool,
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
    },
};
use turnpike_ledger::{Checkpoint, Entry, Event, Head, Record};

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS chains (
        node TEXT PRIMARY KEY, sequence INTEGER NOT NULL, hash BLOB NOT NULL, checkpoint BLOB
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS entries (
        node TEXT NOT NULL, sequence INTEGER NOT NULL, body BLOB NOT NULL, hash BLOB NOT NULL,
        time_ms INTEGER NOT NULL, kind TEXT NOT NULL,
        namespace TEXT, pod TEXT, name TEXT, verdict TEXT,
        PRIMARY KEY (node, sequence)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS by_time ON entries (time_ms);
    CREATE INDEX IF NOT EXISTS by_pod ON entries (namespace, pod, time_ms);
";

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the record's database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("`{0}` is no store: give sqlite:PATH")]
    Url(String),
}

/// A handle on the database; cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) pool: SqlitePool,
}

/// How far a node's chain has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stand {
    pub head: Head,
    /// The last one received; kept apart from the entries, so that losing those shows.
    pub checkpoint: Option<Checkpoint>,
}

impl Store {
    /// Opens `sqlite:PATH` and makes the tables.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        let options = Self::options(url)?
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full);
        let pool = SqlitePoolOptions::new()
            .max_connections(8)
            .connect_with(options)
            .await?;
        sqlx::raw_sql(SCHEMA).execute(&pool).await?;
        Ok(Self { pool })
    }

    /// Opens a store that exists, to read it.
    pub async fn open_read_only(url: &str) -> Result<Self, StoreError> {
        let options = Self::options(url)?.read_only(true);
        let pool = SqlitePoolOptions::new()
            .max_connections(2)
            .connect_with(options)
            .await?;
        Ok(Self { pool })
    }

    fn options(url: &str) -> Result<SqliteConnectOptions, StoreError> {
        let options = url
            .starts_with("sqlite:")
            .then(|| SqliteConnectOptions::from_str(url).ok())
            .flatten()
            .ok_or_else(|| StoreError::Url(url.to_owned()))?;
        Ok(options.busy_timeout(Duration::from_secs(10)))
    }

    pub async fn nodes(&self) -> Result<Vec<String>, StoreError> {
        let query = sqlx::query_scalar("SELECT node FROM chains ORDER BY node");
        Ok(query.fetch_all(&self.pool).await?)
    }

    pub async fn stand(&self, node: &str) -> Result<Stand, StoreError> {
        let row = sqlx::query("SELECT sequence, hash, checkpoint FROM chains WHERE node = ?")
            .bind(node)
            .fetch_optional(&self.pool)
            .await?;
        let Some(row) = row else {
            return Ok(Stand {
                head: Head::genesis(node),
                checkpoint: None,
            });
        };
        let checkpoint: Option<&[u8]> = row.try_get("checkpoint")?;
        Ok(Stand {
            head: Head {
                sequence: unsigned(row.try_get("sequence")?),
                hash: hash(&row)?,
            },
            checkpoint: checkpoint.and_then(|bytes| serde_json::from_slice(bytes).ok()),
        })
    }

    /// Appends entries that follow from where the node's chain stands, on disk when this returns.
    /// The caller has verified them.
    pub async fn append(&self, node: &str, entries: &[Entry]) -> Result<(), StoreError> {
        let Some(last) = entries.last() else {
            return Ok(());
        };
        let rows: Vec<_> = entries
            .iter()
            .map(|entry| Indexed::of(node, entry))
            .collect();
        let checkpoint = rows.iter().rev().find_map(|row| row.checkpoint.clone());
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        for rows in rows.chunks(1000) {
            let mut insert = QueryBuilder::<Sqlite>::new(
                "INSERT INTO entries \
                 (node, sequence, body, hash, time_ms, kind, namespace, pod, name, verdict) ",
            );
            insert.push_values(rows, |mut values, row| {
                values
                    .push_bind(row.node)
                    .push_bind(signed(row.entry.sequence))
                    .push_bind(&row.entry.body[..])
                    .push_bind(&row.entry.hash[..])
                    .push_bind(row.time_ms)
                    .push_bind(row.kind)
                    .push_bind(row.namespace.clone())
                    .push_bind(row.pod.clone())
                    .push_bind(row.name.clone())
                    .push_bind(row.verdict);
            });
            insert.build().execute(&mut *transaction).await?;
        }
        sqlx::query(
            "INSERT INTO chains (node, sequence, hash, checkpoint) VALUES (?, ?, ?, ?) \
             ON CONFLICT (node) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash, \
             checkpoint = coalesce(excluded.checkpoint, checkpoint)",
        )
        .bind(node)
        .bind(signed(last.sequence))
        .bind(&last.hash[..])
        .bind(checkpoint)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(())
    }

    /// At most `limit` entries of a node after `sequence`, in order.
    pub async fn after(
        &self,
        node: &str,
        sequence: u64,
        limit: u32,
    ) -> Result<Vec<Entry>, StoreError> {
        let rows = sqlx::query(
            "SELECT sequence, body, hash FROM entries WHERE node = ? AND sequence > ? \
             ORDER BY sequence LIMIT ?",
        )
        .bind(node)
        .bind(signed(sequence))
        .bind(limit)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.iter().map(entry).collect::<Result<_, _>>()?)
    }
}

/// An entry with the columns it is searched by.
struct Indexed<'a> {
    node: &'a str,
    entry: &'a Entry,
    time_ms: i64,
    kind: &'static str,
    namespace: Option<String>,
    pod: Option<String>,
    name: Option<String>,
    verdict: Option<&'static str>,
    checkpoint: Option<Vec<u8>>,
}

impl<'a> Indexed<'a> {
    fn of(node: &'a str, entry: &'a Entry) -> Self {
        let mut row = Self {
            node,
            entry,
            time_ms: 0,
            kind: "unreadable",
            namespace: None,
            pod: None,
            name: None,
            verdict: None,
            checkpoint: None,
        };
        let Ok(record) = Record::decode(&entry.body) else {
            return row;
        };
        row.time_ms = record.time_ms;
        let (kind, attempt, lookup) = match &record.event {
            Event::Opened(attempt) => ("opened", Some(attempt), None),
            Event::Request(attempt) => ("request", Some(attempt), None),
            Event::Denied(attempt) => ("denied", Some(attempt), None),
            Event::Dns(lookup) => ("dns", None, Some(lookup)),
            Event::Closed(_) => ("closed", None, None),
            Event::Restart { .. } => ("restart", None, None),
            Event::Lost { .. } => ("lost", None, None),
            Event::Gap { .. } => ("gap", None, None),
            Event::Checkpoint(checkpoint) => {
                row.checkpoint = serde_json::to_vec(checkpoint).ok();
                ("checkpoint", None, None)
            }
        };
        row.kind = kind;
        let pod = attempt
            .and_then(|a| a.pod.as_ref())
            .or(lookup.map(|l| &l.pod));
        row.namespace = pod.map(|pod| pod.namespace.clone());
        row.pod = pod.map(|pod| pod.name.clone());
        let claimed = attempt.and_then(|a| a.claimed.as_ref().or(a.name.as_ref()));
        row.name = claimed.or(lookup.map(|l| &l.name)).cloned();
        let verdict = attempt.map(|a| a.verdict).or(lookup.map(|l| l.verdict));
        row.verdict = verdict.map(turnpike_ledger::record::Verdict::as_str);
        row
    }
}

pub(crate) fn entry(row: &SqliteRow) -> Result<Entry, sqlx::Error> {
    Ok(Entry {
        sequence: unsigned(row.try_get("sequence")?),
        body: row.try_get("body")?,
        hash: hash(row)?,
    })
}

fn hash(row: &SqliteRow) -> Result<turnpike_ledger::Hash, sqlx::Error> {
    let hash: &[u8] = row.try_get("hash")?;
    hash.try_into()
        .map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

fn unsigned(sequence: i64) -> u64 {
    sequence.unsigned_abs()
}

/// SQLite's integers are signed; a chain of 2^63 entries there will not be.
fn signed(sequence: u64) -> i64 {
    i64::try_from(sequence).unwrap_or(i64::MAX)
}
