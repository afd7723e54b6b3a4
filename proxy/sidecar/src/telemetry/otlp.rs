//! Export over OTLP (gRPC): spans by the SDK's batch processor, metrics from our own atomics.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, SystemTime},
};

use opentelemetry::{KeyValue, Value};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_proto::tonic::{
    collector::metrics::v1::{
        ExportMetricsServiceRequest, metrics_service_client::MetricsServiceClient,
    },
    common::v1::{AnyValue, InstrumentationScope, KeyValue as Attribute, any_value},
    metrics::v1::{
        AggregationTemporality, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
        ResourceMetrics, ScopeMetrics, Sum, metric, number_data_point,
    },
    resource::v1::Resource as ResourceMessage,
};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracerProvider},
};
use percent_encoding::percent_decode_str;
use tokio::time::{interval, timeout};
use tonic::{
    Request,
    metadata::{MetadataKey, MetadataMap},
    transport::{Channel, Endpoint},
};

use super::{
    Telemetry,
    labels::Pair,
    metrics::{BOUNDS, HistogramSnapshot, HttpSnapshot, Metrics, TcpCell},
};

const TIMEOUT: Duration = Duration::from_secs(5);

/// Where telemetry goes, and in whose name.
#[derive(Clone, Debug)]
pub struct OtlpConfig {
    /// `http://host:port`.
    pub endpoint: String,
    /// How often metrics are sent.
    pub interval: Duration,
    /// Sent with each export: what a collector asks for, a secret among it.
    pub headers: MetadataMap,
    /// `service.name`, `k8s.pod.uid`…
    pub resource: Vec<(&'static str, String)>,
}

/// Why nothing can be exported.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    #[error(
        "OTEL_EXPORTER_OTLP_ENDPOINT `{0}`: TLS is not spoken to collectors; name one in the cluster \
         by http://, and let it send on"
    )]
    Https(String),
    #[error("OTEL_EXPORTER_OTLP_HEADERS: entry {0} is not name=value, with lower-case names")]
    Header(usize),
    #[error("OTEL_EXPORTER_OTLP_ENDPOINT `{endpoint}` cannot be used: {source}")]
    Spans {
        endpoint: String,
        source: ExporterBuildError,
    },
    #[error("OTEL_EXPORTER_OTLP_ENDPOINT `{endpoint}` is no URL: {source}")]
    Metrics {
        endpoint: String,
        source: tonic::transport::Error,
    },
}

/// Reads `OTEL_EXPORTER_OTLP_HEADERS`: `name=value` with commas between, values percent-encoded. What
/// is wrong is told by its place: a value may be a secret.
/// Source: <https://opentelemetry.io/docs/specs/otel/protocol/exporter/>.
pub fn headers(text: &str) -> Result<MetadataMap, OtlpError> {
    let mut headers = MetadataMap::new();
    let entries = text.split(',').enumerate();
    for (index, entry) in entries.filter(|(_, entry)| !entry.trim().is_empty()) {
        let wrong = || OtlpError::Header(index + 1);
        let (name, value) = entry.split_once('=').ok_or_else(wrong)?;
        let name = MetadataKey::from_bytes(name.trim().as_bytes()).map_err(|_| wrong())?;
        let value = percent_decode_str(value.trim())
            .decode_utf8()
            .map_err(|_| wrong())?;
        headers.insert(name, value.parse().map_err(|_| wrong())?);
    }
    Ok(headers)
}

fn plaintext(endpoint: &str) -> Result<(), OtlpError> {
    let scheme = endpoint.split_once("://").map(|(scheme, _)| scheme);
    match scheme {
        Some(scheme) if scheme.eq_ignore_ascii_case("https") => {
            Err(OtlpError::Https(endpoint.to_owned()))
        }
        _ => Ok(()),
    }
}

/// Makes the provider of spans. To be called on the runtime that the exporter's connection is to
/// live on. Whether a request is sampled is decided before a span is begun, so all are kept.
pub fn tracer_provider(config: &OtlpConfig) -> Result<SdkTracerProvider, OtlpError> {
    plaintext(&config.endpoint)?;
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&config.endpoint)
        .with_metadata(config.headers.clone())
        .with_timeout(TIMEOUT)
        .build()
        .map_err(|source| OtlpError::Spans {
            endpoint: config.endpoint.clone(),
            source,
        })?;
    let attribute =
        |(key, value): &(&'static str, String)| KeyValue::new(*key, Value::from(value.clone()));
    let resource = Resource::builder_empty()
        .with_attributes(config.resource.iter().map(attribute))
        .build();
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(Sampler::AlwaysOn)
        .with_resource(resource)
        .build())
}

/// Sends the metrics at intervals, for as long as it is polled.
pub async fn push_metrics(config: OtlpConfig, telemetry: Arc<Telemetry>) -> Result<(), OtlpError> {
    let mut pusher = Pusher::new(config)?;
    let mut ticks = interval(pusher.config.interval);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        pusher.push(&telemetry).await;
    }
}

/// Sends the metrics once: the last before the process ends.
pub async fn push_metrics_now(config: OtlpConfig, telemetry: &Telemetry) -> Result<(), OtlpError> {
    Pusher::new(config)?.push(telemetry).await;
    Ok(())
}

struct Pusher {
    config: OtlpConfig,
    client: MetricsServiceClient<Channel>,
    failing: bool,
}

impl Pusher {
    fn new(config: OtlpConfig) -> Result<Self, OtlpError> {
        plaintext(&config.endpoint)?;
        let endpoint = Endpoint::from_shared(config.endpoint.clone())
            .map_err(|source| OtlpError::Metrics {
                endpoint: config.endpoint.clone(),
                source,
            })?
            .connect_timeout(TIMEOUT);
        let client = MetricsServiceClient::new(endpoint.connect_lazy());
        Ok(Self {
            config,
            client,
            failing: false,
        })
    }

    async fn push(&mut self, telemetry: &Telemetry) {
        let mut request = Request::new(request(&self.config, telemetry.metrics()));
        *request.metadata_mut() = self.config.headers.clone();
        let sent = timeout(TIMEOUT, self.client.export(request)).await;
        let failure = match sent {
            Ok(Ok(_)) => None,
            Ok(Err(status)) => Some(status.message().to_owned()),
            Err(_) => Some(format!("no answer within {TIMEOUT:?}")),
        };
        if let Some(error) = &failure
            && !self.failing
        {
            let endpoint = &self.config.endpoint;
            tracing::warn!(
                endpoint,
                error,
                "cannot export metrics; trying on in silence"
            );
        }
        self.failing = failure.is_some();
    }
}

fn request(config: &OtlpConfig, metrics: &Metrics) -> ExportMetricsServiceRequest {
    let attributes = config
        .resource
        .iter()
        .map(|(key, value)| attribute(key, value))
        .collect();
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(ResourceMessage {
                attributes,
                ..Default::default()
            }),
            scope_metrics: vec![ScopeMetrics {
                scope: Some(InstrumentationScope {
                    name: "turnpike".into(),
                    ..Default::default()
                }),
                metrics: collect(metrics),
                ..Default::default()
            }],
            ..Default::default()
        }],
    }
}

fn collect(metrics: &Metrics) -> Vec<Metric> {
    let times = Times {
        start: nanos(metrics.started),
        now: nanos(SystemTime::now()),
    };
    let http = metrics.http_series();
    let requests = http
        .iter()
        .map(|(labels, cell)| times.number(labels, cell.count))
        .collect();
    let histogram = |of: fn(&HttpSnapshot) -> &HistogramSnapshot| {
        let points = http.iter();
        let points = points.map(|(labels, cell)| times.histogram(labels, of(cell)));
        metric::Data::Histogram(Histogram {
            data_points: points.collect(),
            aggregation_temporality: AggregationTemporality::Cumulative.into(),
        })
    };
    let tcp = metrics.tcp_series();
    let connections = |value: fn(&TcpCell) -> u64| -> Vec<_> {
        tcp.iter()
            .map(|(labels, cell)| times.number(labels, value(cell)))
            .collect()
    };
    vec![
        sum("istio_requests_total", "{request}", requests),
        named(
            "istio_request_duration_milliseconds",
            "ms",
            histogram(|cell| &cell.duration),
        ),
        named(
            "istio_request_bytes",
            "By",
            histogram(|cell| &cell.request_bytes),
        ),
        named(
            "istio_response_bytes",
            "By",
            histogram(|cell| &cell.response_bytes),
        ),
        sum(
            "istio_tcp_sent_bytes_total",
            "By",
            connections(|cell| cell.sent.load(Relaxed)),
        ),
        sum(
            "istio_tcp_received_bytes_total",
            "By",
            connections(|c| c.received.load(Relaxed)),
        ),
        sum(
            "istio_tcp_connections_opened_total",
            "{connection}",
            connections(|cell| cell.opened.load(Relaxed)),
        ),
        sum(
            "istio_tcp_connections_closed_total",
            "{connection}",
            connections(|cell| cell.closed.load(Relaxed)),
        ),
    ]
}

struct Times {
    start: u64,
    now: u64,
}

impl Times {
    fn histogram(&self, labels: &[Pair], snapshot: &HistogramSnapshot) -> HistogramDataPoint {
        HistogramDataPoint {
            attributes: attributes(labels),
            start_time_unix_nano: self.start,
            time_unix_nano: self.now,
            count: snapshot.count,
            sum: Some(snapshot.sum),
            bucket_counts: snapshot.buckets.clone(),
            explicit_bounds: BOUNDS.to_vec(),
            ..Default::default()
        }
    }

    fn number(&self, labels: &[Pair], value: u64) -> NumberDataPoint {
        NumberDataPoint {
            attributes: attributes(labels),
            start_time_unix_nano: self.start,
            time_unix_nano: self.now,
            value: Some(number_data_point::Value::AsInt(
                i64::try_from(value).unwrap_or(i64::MAX),
            )),
            ..Default::default()
        }
    }
}

fn sum(name: &str, unit: &str, data_points: Vec<NumberDataPoint>) -> Metric {
    let data = metric::Data::Sum(Sum {
        data_points,
        aggregation_temporality: AggregationTemporality::Cumulative.into(),
        is_monotonic: true,
    });
    named(name, unit, data)
}

fn named(name: &str, unit: &str, data: metric::Data) -> Metric {
    Metric {
        name: name.into(),
        unit: unit.into(),
        data: Some(data),
        ..Default::default()
    }
}

fn attributes(labels: &[Pair]) -> Vec<Attribute> {
    labels
        .iter()
        .map(|(key, value)| attribute(key, value))
        .collect()
}

fn attribute(key: &str, value: &str) -> Attribute {
    let value = any_value::Value::StringValue(value.to_owned());
    Attribute {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..Default::default()
    }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_the_specification_writes_them() {
        let read = headers("authorization=Bearer%20a%2Cb, x-tenant = shop ,").unwrap();
        assert_eq!(read.get("authorization").unwrap(), "Bearer a,b");
        assert_eq!(read.get("x-tenant").unwrap(), "shop");
        assert_eq!((read.len(), headers("").unwrap().len()), (2, 0));
        for (text, place) in [
            ("secret", "1"),
            ("a=b,=secret", "2"),
            ("a=b,A b=secret", "2"),
            ("a=%00secret", "1"),
        ] {
            let error = headers(text).unwrap_err().to_string();
            assert!(error.contains(&format!("entry {place} ")), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn https_is_refused_with_what_to_do() {
        for endpoint in ["https://collector:4317", "HTTPS://collector"] {
            let config = OtlpConfig {
                endpoint: endpoint.into(),
                interval: TIMEOUT,
                headers: MetadataMap::new(),
                resource: vec![],
            };
            let spans = tracer_provider(&config).unwrap_err().to_string();
            let metrics = Pusher::new(config).err().unwrap().to_string();
            assert_eq!(spans, metrics);
            assert!(
                spans.contains("http://") && spans.contains(endpoint),
                "{spans}"
            );
        }
    }
}
