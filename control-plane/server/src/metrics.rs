//! What Prometheus sees.

use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
    registry::Registry,
};
use turnpike_discovery::Discovery;
use turnpike_kubernetes::Impairments;

/// Clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    issued: Counter,
    refused: Family<Reason, Counter>,
    unauthenticated: Family<Reason, Counter>,
    rejected_objects: Gauge,
    injections: Family<Outcome, Counter>,
    objects: Counter,
    synced: Gauge,
}

/// A word from a fixed list each.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: String,
}

/// Likewise.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: String,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("turnpike");
        let metrics = Self {
            registry: Arc::default(),
            issued: Counter::default(),
            refused: Family::default(),
            unauthenticated: Family::default(),
            rejected_objects: Gauge::default(),
            injections: Family::default(),
            objects: Counter::default(),
            synced: Gauge::default(),
        };
        let Self {
            registry: _,
            issued,
            refused,
            unauthenticated,
            rejected_objects,
            injections,
            objects,
            synced,
        } = &metrics;
        registry.register("ca_issued", "Certificates issued", issued.clone());
        registry.register("ca_refused", "Certificates refused", refused.clone());
        registry.register(
            "unauthenticated_calls",
            "Calls without an acceptable token",
            unauthenticated.clone(),
        );
        registry.register(
            "rejected_objects",
            "Objects that are quarantined now",
            rejected_objects.clone(),
        );
        registry.register(
            "injections",
            "Pods that the injector was asked about",
            injections.clone(),
        );
        registry.register(
            "source_events",
            "Events taken from the source",
            objects.clone(),
        );
        registry.register(
            "synced",
            "1 when the source has delivered all it has",
            synced.clone(),
        );
        *metrics.registry.lock() = registry;
        metrics
    }

    /// Adds what discovery counts.
    pub fn observe(&self, discovery: &Discovery) {
        let collector = DiscoveryCollector(discovery.clone());
        self.registry.lock().register_collector(Box::new(collector));
    }

    /// Adds how much does not work.
    pub fn observe_impairments(&self, impairments: &Impairments) {
        let collector = ImpairmentCollector(impairments.clone());
        self.registry.lock().register_collector(Box::new(collector));
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry.lock());
        text
    }

    pub(crate) fn issued(&self) {
        self.issued.inc();
    }

    pub(crate) fn refused(&self, reason: &str) {
        self.refused
            .get_or_create(&Reason {
                reason: reason.into(),
            })
            .inc();
    }

    pub(crate) fn unauthenticated(&self, reason: &str) {
        self.unauthenticated
            .get_or_create(&Reason {
                reason: reason.into(),
            })
            .inc();
    }

    pub(crate) fn source_event(&self) {
        self.objects.inc();
    }

    pub(crate) fn set_rejected(&self, count: usize) {
        self.rejected_objects
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub(crate) fn injection(&self, outcome: &str) {
        self.injections
            .get_or_create(&Outcome {
                outcome: outcome.into(),
            })
            .inc();
    }

    pub(crate) fn set_synced(&self) {
        self.synced.set(1);
    }
}

#[derive(Debug)]
struct ImpairmentCollector(Impairments);

impl Collector for ImpairmentCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let all = self.0.all();
        let blocking = all.iter().filter(|impairment| impairment.blocking).count();
        for (name, help, count) in [
            (
                "impairments",
                "What does not work now; /debug/rejections has it in words",
                all.len(),
            ),
            (
                "source_impaired",
                "Parts of the source that cannot be read now",
                blocking,
            ),
        ] {
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            let kind = gauge.metric_type();
            gauge.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct DiscoveryCollector(Discovery);

impl Collector for DiscoveryCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let counters = self.0.counters();
        let subscribers = ConstGauge::new(i64::try_from(self.0.subscribers()).unwrap_or(i64::MAX));
        let descriptor = encoder.encode_descriptor(
            "discovery_subscribers",
            "Open discovery streams",
            None,
            subscribers.metric_type(),
        )?;
        subscribers.encode(descriptor)?;
        for (name, help, value) in [
            ("discovery_pushes", "Responses sent", counters.responses),
            ("discovery_resources", "Resources sent", counters.resources),
            ("discovery_acks", "Responses accepted", counters.accepted),
            ("discovery_nacks", "Responses refused", counters.refused),
            (
                "discovery_denied",
                "Subscriptions without the right to them",
                counters.denied,
            ),
            ("discovery_encoded", "Resources encoded", counters.encoded),
        ] {
            let counter = ConstCounter::new(value);
            let kind = counter.metric_type();
            counter.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        Ok(())
    }
}
