//! What the data plane reports, turned into metrics, access log lines and spans.
//!
//! [`Telemetry`] is the data plane's [`Observer`]. Per request a worker adds to atomics
//! ([`metrics`]), appends one line to a buffer that a thread of its own writes out
//! ([`access_log`]), and, where the request is sampled, ends a span that the SDK's thread exports
//! ([`trace`]). Scrapes and OTLP pushes read the atomics on the control thread ([`exposition`],
//! [`otlp`]). [`labels`] says who is meant in Istio's words.

pub mod access_log;
mod exposition;
mod labels;
mod metrics;
pub mod otlp;
mod services;
mod trace;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use http::HeaderMap;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::sync::watch;
use turnpike_rules::{ServiceKey, workload::SelfConfig};

use crate::observe::{
    AccessRecord, Direction, HttpSeries, Labels, Mirrored, Observer, Refusal, Span, TcpSeries,
};
use access_log::AccessLog;
pub use exposition::Gauges;
pub use labels::Own;
use metrics::Metrics;
use trace::Tracing;

/// How long the last spans and metrics may take to leave.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The observer of a running proxy.
#[derive(Debug)]
pub struct Telemetry {
    metrics: Arc<Metrics>,
    log: AccessLog,
    log_enabled: AtomicBool,
    /// The bits of the share of new traces that are sampled.
    sampling: AtomicU64,
    tracing: Option<Tracing>,
}

impl Telemetry {
    /// `provider`: where spans go; without one none are made.
    pub fn new(own: Own, log: AccessLog, provider: Option<SdkTracerProvider>) -> Arc<Self> {
        Arc::new(Self {
            metrics: Metrics::new(own),
            log,
            log_enabled: AtomicBool::new(false),
            sampling: AtomicU64::new(0),
            tracing: provider.map(Tracing::new),
        })
    }

    /// Follows the pod's telemetry settings for as long as it is polled.
    pub async fn follow(self: Arc<Self>, mut own: watch::Receiver<Arc<SelfConfig>>) {
        loop {
            self.configure(&own.borrow_and_update().telemetry);
            if own.changed().await.is_err() {
                return;
            }
        }
    }

    pub fn configure(&self, telemetry: &turnpike_rules::workload::Telemetry) {
        let turnpike_rules::workload::Telemetry {
            sampling,
            access_log,
        } = telemetry;
        self.sampling.store(sampling.to_bits(), Relaxed);
        self.log_enabled.store(*access_log, Relaxed);
    }

    /// The metrics as Prometheus scrapes them (OpenMetrics text).
    pub fn exposition(&self, gauges: Gauges) -> String {
        exposition::text(&self.metrics, self.log.dropped(), gauges)
    }

    /// For the OTLP push.
    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Writes out and sends what has not left yet. Blocks.
    pub fn flush(&self) {
        self.log.flush();
        if let Some(tracing) = &self.tracing {
            tracing.shutdown(FLUSH_TIMEOUT);
        }
    }
}

impl Observer for Telemetry {
    fn http(&self, labels: &Labels) -> Arc<dyn HttpSeries> {
        self.metrics.http(labels)
    }

    fn tcp(&self, labels: &Labels) -> Arc<dyn TcpSeries> {
        self.metrics.tcp(labels)
    }

    fn span(&self, direction: Direction, headers: &mut HeaderMap) -> Option<Box<dyn Span>> {
        let tracing = self.tracing.as_ref()?;
        tracing.begin(
            direction,
            headers,
            f64::from_bits(self.sampling.load(Relaxed)),
        )
    }

    fn logs(&self) -> bool {
        self.log_enabled.load(Relaxed)
    }

    fn log(&self, record: &AccessRecord<'_>) {
        if self.logs() {
            self.log.record(record);
        }
    }

    fn ejected(&self, service: &ServiceKey) {
        self.metrics.services.ejected(service);
    }

    fn out(&self, service: &ServiceKey, endpoints: usize) {
        self.metrics.services.out(service, endpoints);
    }

    fn mirrored(&self, service: &ServiceKey, copy: Mirrored) {
        self.metrics.services.mirrored(service, copy);
    }

    fn refused(&self, refusal: &Refusal<'_>) {
        self.metrics.refused(refusal.direction, refusal.reason);
        if self.logs() {
            self.log.refused(refusal);
        }
    }
}
