//! The gate's numbers, for Prometheus.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// Labels of few and known values only; who did what is in the record, not here.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Judged {
    pub protocol: &'static str,
    pub verdict: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Answered {
    pub result: &'static str,
}

#[derive(Debug)]
pub struct Metrics {
    pub registry: Registry,
    pub connections: Family<Judged, Counter>,
    pub open_connections: Gauge,
    pub revoked: Counter,
    pub bytes_out: Counter,
    pub bytes_in: Counter,
    pub requests: Family<Judged, Counter>,
    pub dns: Family<Answered, Counter>,
    pub dns_cache_hits: Counter,
    pub dropped_records: Counter,
    pub commit_seconds: Histogram,
    pub commit_entries: Histogram,
    pub unacknowledged: Gauge<i64>,
    pub pods: Gauge,
    pub policy_updates: Counter<u64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("turnpike_gate"),
            connections: Family::default(),
            open_connections: Gauge::default(),
            revoked: Counter::default(),
            bytes_out: Counter::default(),
            bytes_in: Counter::default(),
            requests: Family::default(),
            dns: Family::default(),
            dns_cache_hits: Counter::default(),
            dropped_records: Counter::default(),
            commit_seconds: Histogram::new(exponential_buckets(0.000_05, 2.0, 16)),
            commit_entries: Histogram::new(exponential_buckets(1.0, 2.0, 12)),
            unacknowledged: Gauge::default(),
            pods: Gauge::default(),
            policy_updates: Counter::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let Self {
            registry,
            connections,
            open_connections,
            revoked,
            bytes_out,
            bytes_in,
            requests,
            dns,
            dns_cache_hits,
            dropped_records,
            commit_seconds,
            commit_entries,
            unacknowledged,
            pods,
            policy_updates,
        } = self;
        registry.register("connections", "Connections judged", connections.clone());
        registry.register(
            "open_connections",
            "Connections open now",
            open_connections.clone(),
        );
        registry.register(
            "revoked",
            "Connections cut by a change of policy",
            revoked.clone(),
        );
        registry.register(
            "bytes_out",
            "Payload bytes sent for pods",
            bytes_out.clone(),
        );
        registry.register(
            "bytes_in",
            "Payload bytes received for pods",
            bytes_in.clone(),
        );
        registry.register(
            "requests",
            "Plaintext HTTP requests judged",
            requests.clone(),
        );
        registry.register("dns_queries", "Questions of pods answered", dns.clone());
        registry.register(
            "dns_cache_hits",
            "Answers from the cache",
            dns_cache_hits.clone(),
        );
        registry.register(
            "records_dropped",
            "Records not kept",
            dropped_records.clone(),
        );
        registry.register(
            "commit_seconds",
            "Time of a spool commit",
            commit_seconds.clone(),
        );
        registry.register(
            "commit_entries",
            "Entries of a spool commit",
            commit_entries.clone(),
        );
        registry.register(
            "unacknowledged_entries",
            "Entries that this node alone has: the central record has not acknowledged them, or there is none",
            unacknowledged.clone(),
        );
        registry.register("pods", "Pods known on this node", pods.clone());
        registry.register(
            "policy_updates",
            "Policy snapshots taken",
            policy_updates.clone(),
        );
    }
}
