//! Counters and histograms: atomics that workers add to and the control thread reads.
//!
//! One store serves both Prometheus and OTLP, which is why it is not either library's own: a
//! series here costs one histogram of atomics, and nothing is counted twice.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::SystemTime,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::{
    labels::{self, Code, GrpcCode, Kind, Own, Pair},
    services::Services,
};
use crate::observe::{Direction, Flags, HttpOutcome, HttpSeries, Labels, RefusalReason, TcpSeries};

/// Series of each kind. Past it all others are counted in one, with the label `overflow`.
pub(super) const MAX_SERIES: usize = 2000;

/// Istio's buckets, of milliseconds and of bytes; the last bucket is everything above.
pub(super) const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

#[derive(Debug)]
pub(crate) struct Metrics {
    own: Own,
    pub(super) started: SystemTime,
    http: Mutex<Family<HttpKey, HttpCell>>,
    tcp: Mutex<Family<TcpKey, TcpCell>>,
    refused: Mutex<HashMap<(Direction, RefusalReason), u64>>,
    pub(super) services: Services,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct HttpKey {
    labels: Labels,
    code: Code,
    grpc_code: Option<GrpcCode>,
    flags: Flags,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct TcpKey {
    labels: Labels,
    flags: Flags,
}

/// The series of one kind, no more than [`MAX_SERIES`].
#[derive(Debug)]
struct Family<K, C> {
    series: HashMap<K, Arc<C>>,
    /// By reporter.
    overflow: HashMap<Direction, Arc<C>>,
}

/// Requests; their number is the sum of all buckets of any of these.
#[derive(Debug, Default)]
struct HttpCell {
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// In thousandths, so that milliseconds keep their fractions.
    sum: AtomicU64,
}

/// An [`HttpCell`] as it was at one moment.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct HttpSnapshot {
    pub(super) count: u64,
    pub(super) duration: HistogramSnapshot,
    pub(super) request_bytes: HistogramSnapshot,
    pub(super) response_bytes: HistogramSnapshot,
}

#[derive(Debug, Default)]
pub(super) struct TcpCell {
    pub(super) opened: AtomicU64,
    pub(super) closed: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
}

/// A histogram as it was at one moment.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct HistogramSnapshot {
    pub(super) count: u64,
    pub(super) sum: f64,
    /// Not cumulative; one more than the bounds.
    pub(super) buckets: Vec<u64>,
}

impl Metrics {
    pub(super) fn new(own: Own) -> Arc<Self> {
        Arc::new(Self {
            own,
            started: SystemTime::now(),
            http: Mutex::default(),
            tcp: Mutex::default(),
            refused: Mutex::default(),
            services: Services::default(),
        })
    }

    pub(super) fn http(self: &Arc<Self>, labels: &Labels) -> Arc<dyn HttpSeries> {
        Arc::new(HttpHandle {
            metrics: self.clone(),
            labels: labels.clone(),
            recent: ArcSwap::default(),
        })
    }

    pub(super) fn tcp(self: &Arc<Self>, labels: &Labels) -> Arc<dyn TcpSeries> {
        let cell = self.tcp_cell(labels, Flags::NONE);
        Arc::new(TcpHandle {
            metrics: self.clone(),
            labels: labels.clone(),
            cell,
        })
    }

    pub(super) fn refused(&self, direction: Direction, reason: RefusalReason) {
        *self.refused.lock().entry((direction, reason)).or_default() += 1;
    }

    fn tcp_cell(&self, labels: &Labels, flags: Flags) -> Arc<TcpCell> {
        let key = TcpKey {
            labels: labels.clone(),
            flags,
        };
        self.tcp.lock().cell(key, labels.direction)
    }

    /// Each HTTP series with Istio's labels.
    pub(super) fn http_series(&self) -> Vec<(Vec<Pair>, HttpSnapshot)> {
        let family = self.http.lock();
        let series = family.series.iter().map(|(key, cell)| {
            let HttpKey {
                labels,
                code,
                grpc_code,
                flags,
            } = key;
            let kind = Kind::Http {
                code: *code,
                grpc_code: *grpc_code,
            };
            (
                labels::pairs(&self.own, labels, kind, *flags),
                cell.snapshot(),
            )
        });
        let overflow = family
            .overflow
            .iter()
            .map(|(d, cell)| (labels::overflow(*d), cell.snapshot()));
        series.chain(overflow).collect()
    }

    /// Each TCP series with Istio's labels.
    pub(super) fn tcp_series(&self) -> Vec<(Vec<Pair>, Arc<TcpCell>)> {
        let family = self.tcp.lock();
        let series = family.series.iter().map(|(key, cell)| {
            (
                labels::pairs(&self.own, &key.labels, Kind::Tcp, key.flags),
                cell.clone(),
            )
        });
        let overflow = family
            .overflow
            .iter()
            .map(|(d, cell)| (labels::overflow(*d), cell.clone()));
        series.chain(overflow).collect()
    }

    pub(super) fn refused_series(&self) -> Vec<(Vec<Pair>, u64)> {
        let refused = self.refused.lock();
        let series = refused.iter().map(|((direction, reason), count)| {
            let direction = match direction {
                Direction::Inbound => "inbound",
                Direction::Outbound => "outbound",
            };
            let labels = vec![
                ("direction", direction.to_owned()),
                ("reason", reason.as_str().to_owned()),
            ];
            (labels, *count)
        });
        series.collect()
    }
}

impl<K, C> Default for Family<K, C> {
    fn default() -> Self {
        Self {
            series: HashMap::new(),
            overflow: HashMap::new(),
        }
    }
}

impl<K: std::hash::Hash + Eq, C: Default> Family<K, C> {
    fn cell(&mut self, key: K, direction: Direction) -> Arc<C> {
        if let Some(cell) = self.series.get(&key) {
            return cell.clone();
        }
        if self.series.len() >= MAX_SERIES {
            return self.overflow.entry(direction).or_default().clone();
        }
        self.series.entry(key).or_default().clone()
    }
}

impl HttpCell {
    fn observe(&self, outcome: &HttpOutcome) {
        let micros = u64::try_from(outcome.duration.as_micros()).unwrap_or(u64::MAX);
        self.duration.observe(micros);
        for (histogram, bytes) in [
            (&self.request_bytes, outcome.request_bytes),
            (&self.response_bytes, outcome.response_bytes),
        ] {
            histogram.observe(bytes.saturating_mul(1000));
        }
    }

    fn snapshot(&self) -> HttpSnapshot {
        let duration = self.duration.snapshot();
        HttpSnapshot {
            count: duration.count,
            duration,
            request_bytes: self.request_bytes.snapshot(),
            response_bytes: self.response_bytes.snapshot(),
        }
    }
}

impl Histogram {
    #[allow(clippy::cast_precision_loss, reason = "a bucket is far wider")]
    fn observe(&self, thousandths: u64) {
        let value = thousandths as f64 / 1000.0;
        let bucket = BOUNDS
            .iter()
            .position(|bound| value <= *bound)
            .unwrap_or(BOUNDS.len());
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add(thousandths, Relaxed);
    }

    #[allow(clippy::cast_precision_loss, reason = "shown as a float anyhow")]
    fn snapshot(&self) -> HistogramSnapshot {
        let buckets: Vec<u64> = self
            .buckets
            .iter()
            .map(|bucket| bucket.load(Relaxed))
            .collect();
        HistogramSnapshot {
            count: buckets.iter().sum(),
            sum: self.sum.load(Relaxed) as f64 / 1000.0,
            buckets,
        }
    }
}

/// How a request ended, as it was told.
type Ending = (u16, Option<u32>, Flags);

#[derive(Debug)]
struct HttpHandle {
    metrics: Arc<Metrics>,
    labels: Labels,
    /// The endings met so far: few, so a walk over them beats a hash.
    recent: ArcSwap<Vec<(Ending, Arc<HttpCell>)>>,
}

impl HttpHandle {
    /// Endings that a handle remembers; the rest are looked up each time.
    const RECENT: usize = 16;

    #[cold]
    fn meet(&self, ending: Ending) -> Arc<HttpCell> {
        let (status, grpc_status, flags) = ending;
        let key = HttpKey {
            labels: self.labels.clone(),
            code: Code::of(status),
            grpc_code: grpc_status.map(GrpcCode::of),
            flags,
        };
        let cell = self.metrics.http.lock().cell(key, self.labels.direction);
        self.recent.rcu(|recent| {
            let mut recent = Vec::clone(recent);
            if recent.len() < Self::RECENT && !recent.iter().any(|(met, _)| *met == ending) {
                recent.push((ending, cell.clone()));
            }
            recent
        });
        cell
    }
}

impl HttpSeries for HttpHandle {
    fn finished(&self, outcome: &HttpOutcome) {
        let ending = (outcome.status, outcome.grpc_status, outcome.flags);
        let recent = self.recent.load();
        match recent.iter().find(|(met, _)| *met == ending) {
            Some((_, cell)) => cell.observe(outcome),
            None => self.meet(ending).observe(outcome),
        }
    }
}

#[derive(Debug)]
struct TcpHandle {
    metrics: Arc<Metrics>,
    labels: Labels,
    /// Without flags: how a connection ends is known only then.
    cell: Arc<TcpCell>,
}

impl TcpSeries for TcpHandle {
    fn opened(&self) {
        self.cell.opened.fetch_add(1, Relaxed);
    }

    fn transferred(&self, received: u64, sent: u64) {
        self.cell.received.fetch_add(received, Relaxed);
        self.cell.sent.fetch_add(sent, Relaxed);
    }

    fn closed(&self, flags: Flags) {
        if flags == Flags::NONE {
            self.cell.closed.fetch_add(1, Relaxed);
        } else {
            self.metrics
                .tcp_cell(&self.labels, flags)
                .closed
                .fetch_add(1, Relaxed);
        }
    }
}
