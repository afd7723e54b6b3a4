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
    metrics::{BOUNDS, HistogramSnapshot, HttpSnapshot, Metrics, TcpCell},
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
        self.services(&mut encoder)?;
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
        type Of = fn(&HttpSnapshot) -> &HistogramSnapshot;
        let families: [(&str, &str, Of); 3] = [
            (
                "istio_request_duration_milliseconds",
                "Duration of requests",
                |cell| &cell.duration,
            ),
            ("istio_request_bytes", "Size of request bodies", |cell| {
                &cell.request_bytes
            }),
            ("istio_response_bytes", "Size of response bodies", |cell| {
                &cell.response_bytes
            }),
        ];
        for (name, help, of) in families {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for (labels, cell) in &series {
                let HistogramSnapshot {
                    count,
                    sum,
                    buckets,
                } = of(cell);
                let bounds = BOUNDS.iter().copied().chain([f64::INFINITY]);
                let buckets: Vec<_> = bounds.zip(buckets.iter().copied()).collect();
                family
                    .encode_family(labels)?
                    .encode_histogram::<[(&str, &str); 0]>(*sum, *count, &buckets, None)?;
            }
        }
        Ok(())
    }

    fn services(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let services = &self.metrics.services;
        counters(
            encoder,
            "turnpike_outlier_ejections",
            "Endpoints taken out because they kept failing",
            &services.ejection_series(),
        )?;
        let mut out = encoder.encode_descriptor(
            "turnpike_outlier_ejected",
            "Endpoints that are out now",
            None,
            MetricType::Gauge,
        )?;
        for (labels, value) in services.out_series() {
            out.encode_family(&labels)?.encode_gauge(&value)?;
        }
        counters(
            encoder,
            "turnpike_mirrored_requests",
            "Copies of requests, by what became of them",
            &services.mirrored_series(),
        )
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
        if labels.is_empty() {
            family.encode_counter(value, NONE)?;
        } else {
            family.encode_family(labels)?.encode_counter(value, NONE)?;
        }
    }
    Ok(())
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    encoder
        .encode_descriptor(name, help, None, MetricType::Gauge)?
        .encode_gauge(&value)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use turnpike_rules::{Identity, ServiceKey, workload::Names};

    use super::*;
    use crate::{
        observe::{Direction, Flags, HttpOutcome, Labels, Mirrored, RefusalReason},
        telemetry::{labels::Own, metrics::MAX_SERIES},
    };

    fn metrics() -> Arc<Metrics> {
        Metrics::new(Own {
            names: Names::unlabelled("web", "shop").into(),
            principal: "spiffe://cluster.local/ns/shop/sa/web".into(),
            cluster: "cluster".into(),
        })
    }

    fn labels(direction: Direction, peer: &str) -> Labels {
        Labels {
            direction,
            peer: Some(Identity::new("cluster.local", "bank", peer).unwrap()),
            names: Some(Names::unlabelled(peer, "bank").into()),
            service: Some(ServiceKey::new("cluster", "bank", "pay")),
            passthrough: false,
            grpc: false,
            mutual_tls: true,
        }
    }

    fn outcome(status: u16, ms: u64) -> HttpOutcome {
        HttpOutcome {
            status,
            grpc_status: None,
            flags: Flags::NONE,
            duration: Duration::from_millis(ms),
            request_bytes: 40,
            response_bytes: 300,
        }
    }

    fn exposed(metrics: &Arc<Metrics>) -> String {
        text(
            metrics,
            3,
            Gauges {
                connected: true,
                refused_updates: 2,
                certificate_expiry: 77,
            },
        )
    }

    #[track_caller]
    fn line<'a>(text: &'a str, name: &str, labels: &[&str]) -> &'a str {
        text.lines()
            .find(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)))
            .unwrap_or_else(|| panic!("no {name} with {labels:?} in\n{text}"))
    }

    #[test]
    fn requests_are_told_in_istios_words() {
        let metrics = metrics();
        let outbound = metrics.http(&labels(Direction::Outbound, "pay"));
        outbound.finished(&outcome(200, 3));
        outbound.finished(&outcome(200, 700));
        let flags = Flags::CONNECT_FAILED.with(Flags::RETRY_LIMIT);
        outbound.finished(&HttpOutcome {
            flags,
            ..outcome(503, 1)
        });
        metrics
            .http(&labels(Direction::Inbound, "front"))
            .finished(&outcome(404, 2));

        let text = exposed(&metrics);
        let source = r#"reporter="source",source_workload="web",source_canonical_service="web""#;
        let ok = line(
            &text,
            "istio_requests_total",
            &[source, r#"response_code="200""#],
        );
        assert!(ok.ends_with(" 2"), "{ok}");
        for label in [
            r#"source_workload_namespace="shop""#,
            r#"source_principal="spiffe://cluster.local/ns/shop/sa/web""#,
            r#"destination_workload="pay""#,
            r#"destination_workload_namespace="bank""#,
            r#"destination_principal="spiffe://cluster.local/ns/bank/sa/pay""#,
            r#"destination_service="pay.bank.svc.cluster.local""#,
            r#"destination_service_name="pay""#,
            r#"destination_service_namespace="bank""#,
            r#"request_protocol="http""#,
            r#"grpc_response_status="""#,
            r#"response_flags="-""#,
            r#"connection_security_policy="mutual_tls""#,
        ] {
            assert!(ok.contains(label), "{label} is missing in {ok}");
        }
        let failed = [r#"response_code="503""#, r#"response_flags="UF,URX""#];
        assert!(line(&text, "istio_requests_total", &failed).ends_with(" 1"));
        let inbound = [
            r#"reporter="destination""#,
            r#"source_workload="front""#,
            r#"destination_workload="web""#,
            r#"connection_security_policy="mutual_tls""#,
        ];
        assert!(line(&text, "istio_requests_total", &inbound).ends_with(" 1"));
        assert!(text.contains("# TYPE istio_requests counter"), "{text}");

        let duration = "istio_request_duration_milliseconds";
        let of = |suffix: &str, le: &str| {
            let labels = [source, r#"response_code="200""#, le];
            let line = line(&text, &format!("{duration}_{suffix}"), &labels);
            line.rsplit_once(' ').unwrap().1.to_owned()
        };
        assert_eq!(of("count", ""), "2");
        assert_eq!(of("sum", ""), "703.0");
        assert_eq!(of("bucket", r#"le="1.0""#), "0");
        assert_eq!(of("bucket", r#"le="5.0""#), "1");
        assert_eq!(of("bucket", r#"le="1000.0""#), "2");
        assert_eq!(of("bucket", r#"le="+Inf""#), "2");
        for (name, sum, le, below) in [
            ("istio_request_bytes", "80.0", "le=\"50.0\"", "le=\"25.0\""),
            (
                "istio_response_bytes",
                "600.0",
                "le=\"500.0\"",
                "le=\"250.0\"",
            ),
        ] {
            let of = |suffix: &str, le: &str| {
                let labels = [source, r#"response_code="200""#, le];
                let line = line(&text, &format!("{name}_{suffix}"), &labels);
                line.rsplit_once(' ').unwrap().1.to_owned()
            };
            assert_eq!((of("count", ""), of("sum", "")), ("2".into(), sum.into()));
            assert_eq!(
                (of("bucket", le), of("bucket", below)),
                ("2".into(), "0".into())
            );
        }
    }

    #[test]
    fn connections_are_told_in_istios_words() {
        let metrics = metrics();
        let tcp = metrics.tcp(&labels(Direction::Outbound, "db"));
        tcp.opened();
        tcp.transferred(10, 200);
        tcp.transferred(1, 2);
        tcp.closed(Flags::UPSTREAM_RESET);
        let text = exposed(&metrics);
        let value = |name: &str, flags: &str| {
            let labels = [r#"request_protocol="tcp""#, flags];
            line(&text, name, &labels)
                .rsplit_once(' ')
                .unwrap()
                .1
                .to_owned()
        };
        let none = r#"response_flags="-""#;
        assert_eq!(value("istio_tcp_received_bytes_total", none), "11");
        assert_eq!(value("istio_tcp_sent_bytes_total", none), "202");
        assert_eq!(value("istio_tcp_connections_opened_total", none), "1");
        assert_eq!(value("istio_tcp_connections_closed_total", none), "0");
        assert_eq!(
            value(
                "istio_tcp_connections_closed_total",
                r#"response_flags="UR""#
            ),
            "1"
        );
    }

    #[test]
    fn the_proxys_own_state_is_told() {
        let metrics = metrics();
        metrics.refused(Direction::Inbound, RefusalReason::Strict);
        metrics.refused(Direction::Inbound, RefusalReason::Strict);
        let service = ServiceKey::new("cluster", "bank", "pay");
        metrics.services.ejected(&service);
        metrics.services.ejected(&service);
        metrics.services.out(&service, 1);
        metrics.services.mirrored(&service, Mirrored::Answered);
        let text = exposed(&metrics);
        for expected in [
            "turnpike_refused_total{direction=\"inbound\",reason=\"strict\"} 2\n",
            "turnpike_outlier_ejections_total{service=\"pay.bank\"} 2\n",
            "turnpike_outlier_ejected{service=\"pay.bank\"} 1\n",
            "turnpike_mirrored_requests_total{service=\"pay.bank\",result=\"answered\"} 1\n",
            "turnpike_access_log_dropped_total 3\n",
            "turnpike_updates_refused_total 2\n",
            "turnpike_controller_connected 1\n",
            "turnpike_certificate_expiry_timestamp_seconds 77\n",
        ] {
            assert!(text.contains(expected), "{expected} is missing in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn a_million_peers_are_a_bounded_number_of_series() {
        let metrics = metrics();
        let total = MAX_SERIES + 500;
        for peer in 0..total {
            let series = metrics.http(&labels(Direction::Inbound, &format!("p{peer}")));
            series.finished(&outcome(200, 1));
            series.finished(&outcome(200, 1));
        }
        let series = metrics.http_series();
        assert_eq!(series.len(), MAX_SERIES + 1);
        let counted: u64 = series.iter().map(|(_, cell)| cell.count).sum();
        assert_eq!(counted, 2 * total as u64, "and none is lost");
        let text = exposed(&metrics);
        let overflow = line(&text, "istio_requests_total", &[r#"overflow="true""#]);
        assert!(overflow.ends_with(" 1000"), "{overflow}");
    }

    #[test]
    fn a_handle_that_meets_many_endings_counts_them_all() {
        let metrics = metrics();
        let series = metrics.http(&labels(Direction::Outbound, "pay"));
        let mut flags = Flags::NONE;
        for flag in [Flags::NONE, Flags::TIMEOUT, Flags::OVERFLOW, Flags::IDLE] {
            flags = flags.with(flag);
            for status in [200, 201, 301, 400, 404, 500, 502, 503] {
                for _ in 0..2 {
                    let outcome = outcome(status, 1);
                    series.finished(&HttpOutcome { flags, ..outcome });
                }
            }
        }
        let all = metrics.http_series();
        assert_eq!(all.len(), 32);
        assert!(all.iter().all(|(_, cell)| cell.count == 2));
    }

    #[test]
    fn a_server_that_makes_up_statuses_makes_few_series() {
        let metrics = metrics();
        let series = metrics.http(&labels(Direction::Outbound, "pay"));
        for status in 0..1000 {
            series.finished(&outcome(status, 1));
        }
        for status in (0..1000).chain([u32::MAX]) {
            let outcome = outcome(200, 1);
            series.finished(&HttpOutcome {
                grpc_status: Some(status),
                ..outcome
            });
        }
        let all = metrics.http_series();
        assert!(all.len() < 100, "{}", all.len());
        assert_eq!(all.iter().map(|(_, cell)| cell.count).sum::<u64>(), 2001);
        let text = exposed(&metrics);
        let count = |labels: &[&str]| {
            let line = line(&text, "istio_requests_total", labels);
            line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()
        };
        assert_eq!(count(&[r#"response_code="404""#]), 1);
        assert!(count(&[r#"response_code="4xx""#]) > 60);
        assert!(count(&[r#"response_code="other""#]) >= 400);
        assert_eq!(count(&[r#"grpc_response_status="16""#]), 1);
        assert_eq!(count(&[r#"grpc_response_status="other""#]), 984);
    }

    /// A label's value cannot break out of its quotes.
    #[test]
    fn values_are_escaped() {
        let metrics = metrics();
        let mut odd = labels(Direction::Outbound, "pay");
        odd.service = Some(ServiceKey::new("cluster", "bank", "x\"} 1\nevil 1"));
        metrics.http(&odd).finished(&outcome(200, 1));
        assert!(
            !exposed(&metrics)
                .lines()
                .any(|line| line.starts_with("evil"))
        );
    }
}
