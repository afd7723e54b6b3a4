//! Questions to the record.

use serde::Serialize;
use sqlx::{QueryBuilder, Row, Sqlite};
use turnpike_ledger::{Head, Record, Report, Trust, Verifier};

use crate::store::{Store, StoreError, entry};

/// What a listing may hold.
pub const MAX_LIMIT: u32 = 10_000;
const DEFAULT_LIMIT: u32 = 100;
/// Entries in memory while a chain is verified.
const PAGE: u32 = 2000;

/// What to list; everything that is set must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    pub node: Option<String>,
    pub namespace: Option<String>,
    pub pod: Option<String>,
    /// `allowed`, `denied` or `audit-would-deny`.
    pub verdict: Option<String>,
    /// The name asked of DNS or claimed in SNI or Host.
    pub name: Option<String>,
    /// `opened`, `closed`, `denied`, `dns`…
    pub kind: Option<String>,
    pub limit: Option<u32>,
}

/// A parameter that is not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidQuery {
    #[error("`{0}` is no parameter; use node, namespace, pod, verdict, name, kind, limit")]
    Unknown(String),
    #[error("verdict is allowed, denied or audit-would-deny, not `{0}`")]
    Verdict(String),
    #[error("limit is a number from 1 to {MAX_LIMIT}, not `{0}`")]
    Limit(String),
}

impl Query {
    /// From the query of a URL.
    pub fn parse(text: &str) -> Result<Self, InvalidQuery> {
        let mut query = Self::default();
        for (key, value) in form_urlencoded::parse(text.as_bytes()) {
            let value = value.into_owned();
            match &*key {
                "node" => query.node = Some(value),
                "namespace" => query.namespace = Some(value),
                "pod" => query.pod = Some(value),
                "name" => query.name = Some(value),
                "kind" => query.kind = Some(value),
                "verdict" => match &*value {
                    "allowed" | "denied" | "audit-would-deny" => query.verdict = Some(value),
                    _ => return Err(InvalidQuery::Verdict(value)),
                },
                "limit" => match value.parse() {
                    Ok(limit @ 1..=MAX_LIMIT) => query.limit = Some(limit),
                    _ => return Err(InvalidQuery::Limit(value)),
                },
                _ => return Err(InvalidQuery::Unknown(key.into_owned())),
            }
        }
        Ok(query)
    }
}

/// One entry found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    pub sequence: u64,
    #[serde(flatten)]
    pub record: Record,
}

impl Store {
    /// Records that fit, newest first. What this version cannot read is left out.
    pub async fn records(&self, query: &Query) -> Result<Vec<Found>, StoreError> {
        let Query {
            node,
            namespace,
            pod,
            verdict,
            name,
            kind,
            limit,
        } = query;
        let mut sql =
            QueryBuilder::<Sqlite>::new("SELECT sequence, body, hash FROM entries WHERE TRUE");
        for (column, value) in [
            (" AND node = ", node),
            (" AND namespace = ", namespace),
            (" AND pod = ", pod),
            (" AND verdict = ", verdict),
            (" AND name = ", name),
            (" AND kind = ", kind),
        ] {
            if let Some(value) = value {
                sql.push(column).push_bind(value);
            }
        }
        sql.push(" ORDER BY time_ms DESC, sequence DESC LIMIT ")
            .push_bind(limit.unwrap_or(DEFAULT_LIMIT).min(MAX_LIMIT));
        let rows = sql.build().fetch_all(&self.pool).await?;
        let found = rows.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
        let read = |entry: turnpike_ledger::Entry| {
            let record = Record::decode(&entry.body).ok()?;
            Some(Found {
                sequence: entry.sequence,
                record,
            })
        };
        Ok(found.into_iter().filter_map(read).collect())
    }

    /// Verifies every node's chain from its beginning to the last checkpoint received.
    pub async fn verify(&self, trust: &Trust, now_ms: i64) -> Result<Vec<Report>, StoreError> {
        let mut reports = Vec::new();
        for node in self.nodes().await? {
            reports.push(self.verify_node(&node, trust, now_ms).await?);
        }
        Ok(reports)
    }

    pub async fn verify_node(
        &self,
        node: &str,
        trust: &Trust,
        now_ms: i64,
    ) -> Result<Report, StoreError> {
        let latest = self.stand(node).await?.checkpoint;
        let start = Head::genesis(node);
        let mut verifier = Verifier::new(node, start, trust.clone(), latest, now_ms);
        let mut last = 0;
        loop {
            let page = self.after(node, last, PAGE).await?;
            let Some(end) = page.last() else { break };
            last = end.sequence;
            page.iter().for_each(|entry| verifier.push(entry));
        }
        Ok(verifier.finish())
    }

    /// How many entries there are.
    pub async fn count(&self) -> Result<u64, StoreError> {
        let row = sqlx::query("SELECT count(*) AS n FROM entries")
            .fetch_one(&self.pool)
            .await?;
        Ok(row.try_get::<i64, _>("n")?.unsigned_abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_checked() {
        let query = Query::parse("pod=pay-0&verdict=denied&limit=5").unwrap();
        assert_eq!(query.pod.as_deref(), Some("pay-0"));
        assert_eq!(query.limit, Some(5));
        assert_eq!(
            Query::parse("who=x"),
            Err(InvalidQuery::Unknown("who".into()))
        );
        assert_eq!(
            Query::parse("verdict=no"),
            Err(InvalidQuery::Verdict("no".into()))
        );
        assert_eq!(
            Query::parse("limit=0"),
            Err(InvalidQuery::Limit("0".into()))
        );
        assert_eq!(
            Query::parse("limit=10001"),
            Err(InvalidQuery::Limit("10001".into()))
        );
    }
}
