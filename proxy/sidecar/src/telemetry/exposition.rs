//! The metrics as Prometheus reads them.

use std::{fmt, sync::Arc, sync::atomic::Ordering::Relaxed};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text::encode},
    metrics::{MetricType, exemplar::Exemplar},
    registry::Registry,
};

use super::{
    labels::Pair,
    metrics::{BOUNDS, Metrics, TcpCell},
};

/// The state of the control side at the moment of a scrape.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gauges {
    pub connected: bool,
    /// Updates of the controller that were refused.
    pub refused_updates: u64,
    /// When the certificate ends, in Unix seconds; 0 without one.
    pub certificate_expiry: u64,
}

pub(super) fn text(metrics: &Arc<Metrics>, dropped_lines: u64, gauges: Gauges) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape {
        metrics: metrics.clone(),
        dropped_lines,
        gauges,
    }));
    let mut text = String::new();
    encode(&mut text, &registry).expect("writing to a string does not fail");
    text
}

#[derive(Debug)]
struct Scrape {
    metrics: Arc<Metrics>,
    dropped_lines: u64,
    gauges: Gauges,
}

/// No series has exemplars.
const NONE: Option<&Exemplar<[(&str, &str); 0], f64>> = None;

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.requests(&mut encoder)?;
        self.connections(&mut encoder)?;
        let Gauges {
            connected,
            refused_updates,
            certificate_expiry,
        } = self.gauges;
        counters(
            &mut encoder,
            "turnpike_refused",
            "Connections and requests refused before they were forwarded",
            &self.metrics.refused_series(),
        )?;
        let plain = |value| [(Vec::new(), value)];
        counters(
            &mut encoder,
            "turnpike_access_log_dropped",
            "Access log lines dropped because the log was not written out fast enough",
            &plain(self.dropped_lines),
        )?;
        counters(
            &mut encoder,
            "turnpike_updates_refused",
            "Updates of the controller that were refused as invalid",
            &plain(refused_updates),
        )?;
        gauge(
            &mut encoder,
            "turnpike_controller_connected",
            "Whether there is a connection to the controller",
            u64::from(connected),
        )?;
        gauge(
            &mut encoder,
            "turnpike_certificate_expiry_timestamp_seconds",
            "When this workload's certificate ends",
            certificate_expiry,
        )
    }
}

impl Scrape {
    fn requests(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let series = self.metrics.http_series();
        let counts: Vec<_> = series
            .iter()
            .map(|(labels, cell)| (labels.clone(), cell.count))
            .collect();
        counters(
            encoder,
            "istio_requests",
            "Requests handled by the proxy",
            &counts,
        )?;
        let mut family = encoder.encode_descriptor(
            "istio_request_duration_milliseconds",
            "Duration of requests",
            None,
            MetricType::Histogram,
        )?;
        for (labels, cell) in &series {
            let bounds = BOUNDS.iter().copied().chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(cell.buckets.iter().copied()).collect();
            family
                .encode_family(labels)?
                .encode_histogram::<[(&str, &str); 0]>(cell.sum_ms, cell.count, &buckets, None)?;
        }
        Ok(())
    }

    fn connections(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let series = self.metrics.tcp_series();
        let mut family = |name: &str, help: &str, value: fn(&TcpCell) -> u64| {
            let values: Vec<_> = series
                .iter()
                .map(|(labels, cell)| (labels.clone(), value(cell)))
                .collect();
            counters(encoder, name, help, &values)
        };
        family(
            "istio_tcp_sent_bytes",
            "Bytes sent to clients of TCP connections",
            |cell| cell.sent.load(Relaxed),
        )?;
        family(
            "istio_tcp_received_bytes",
            "Bytes received from clients of TCP connections",
            |cell| cell.received.load(Relaxed),
        )?;
        family(
            "istio_tcp_connections_opened",
            "TCP connections opened",
            |cell| cell.opened.load(Relaxed),
        )?;
        family(
            "istio_tcp_connections_closed",
            "TCP connections closed",
            |cell| cell.closed.load(Relaxed),
        )
    }
}

fn counters(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    series: &[(Vec<Pair>, u64)],
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in series {
        family.encode_family(labels)?.encode_counter(value, NONE)?;
    }
    Ok(())
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    encoder
        .encode_descriptor(name, help, None, MetricType::Gauge)?
        .encode_gauge(&value)
}
