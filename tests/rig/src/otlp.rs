//! A small OpenTelemetry collector: takes traces and metrics over OTLP/gRPC and keeps the newest.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Result;
use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::{KeyValue, any_value::Value},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Spans kept; older ones are forgotten first.
const KEPT_SPANS: usize = 20_000;

/// One finished span, as the report shows it.
#[derive(Clone, Debug)]
pub struct Span {
    pub service: String,
    pub name: String,
    pub trace: String,
    pub id: String,
    pub parent: String,
    /// Unix time in nanoseconds.
    pub start: u64,
    pub end: u64,
    pub attributes: BTreeMap<String, String>,
}

#[derive(Debug, Default)]
struct Received {
    spans: VecDeque<Span>,
    metric_names: BTreeMap<String, u64>,
}

/// A collector that runs until it is dropped.
#[derive(Debug)]
pub struct Sink {
    received: Arc<Mutex<Received>>,
    server: JoinHandle<()>,
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Sink {
    /// Serves on a listener, which may live in a namespace of its own.
    pub fn serve(listener: std::net::TcpListener) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let incoming = TcpListenerStream::new(TcpListener::from_std(listener)?);
        let received = Arc::<Mutex<Received>>::default();
        let collector = Collector(received.clone());
        let server = tokio::spawn(async move {
            let served = tonic::transport::Server::builder()
                .add_service(TraceServiceServer::new(collector.clone()))
                .add_service(MetricsServiceServer::new(collector))
                .serve_with_incoming(incoming)
                .await;
            if let Err(error) = served {
                tracing::warn!(%error, "the OTLP sink stopped");
            }
        });
        Ok(Self { received, server })
    }

    /// All spans of the traces in which some span fits.
    pub fn trace_of(&self, fits: impl Fn(&Span) -> bool) -> Vec<Span> {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(found) = received.spans.iter().rev().find(|span| fits(span)) else {
            return Vec::new();
        };
        let mut spans: Vec<_> = received
            .spans
            .iter()
            .filter(|span| span.trace == found.trace)
            .cloned()
            .collect();
        spans.sort_by_key(|span| span.start);
        spans
    }

    /// Names of the metrics seen, with the number of exports that carried each.
    pub fn metric_names(&self) -> BTreeMap<String, u64> {
        self.received
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .metric_names
            .clone()
    }
}

/// Draws the spans of one trace as a tree, children under their parents.
pub fn tree(spans: &[Span]) -> String {
    let mut text = String::new();
    let known = |id: &str| spans.iter().any(|span| span.id == id);
    for root in spans.iter().filter(|span| !known(&span.parent)) {
        if text.is_empty() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "trace {}", root.trace);
        }
        branch(spans, root, 0, &mut text);
    }
    text
}

fn branch(spans: &[Span], span: &Span, depth: usize, text: &mut String) {
    let millis = span.end.saturating_sub(span.start) as f64 / 1e6;
    let status = span
        .attributes
        .get("http.response.status_code")
        .map_or("", String::as_str);
    let _ = writeln!(
        text,
        "{:indent$}└─ {} · {} {} · {millis:.2} ms",
        "",
        span.service,
        span.name,
        status,
        indent = depth * 3
    );
    for child in spans.iter().filter(|child| child.parent == span.id) {
        branch(spans, child, depth + 1, text);
    }
}

#[derive(Clone, Debug)]
struct Collector(Arc<Mutex<Received>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for resource in request.into_inner().resource_spans {
            let of = attributes(resource.resource.map(|r| r.attributes).unwrap_or_default());
            let service = of.get("service.name").cloned().unwrap_or_default();
            for span in resource
                .scope_spans
                .into_iter()
                .flat_map(|scope| scope.spans)
            {
                received.spans.push_back(Span {
                    service: service.clone(),
                    name: span.name,
                    trace: hex::encode(span.trace_id),
                    id: hex::encode(span.span_id),
                    parent: hex::encode(span.parent_span_id),
                    start: span.start_time_unix_nano,
                    end: span.end_time_unix_nano,
                    attributes: attributes(span.attributes),
                });
                if received.spans.len() > KEPT_SPANS {
                    received.spans.pop_front();
                }
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let mut received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let scopes = request
            .into_inner()
            .resource_metrics
            .into_iter()
            .flat_map(|r| r.scope_metrics);
        for metric in scopes.flat_map(|scope| scope.metrics) {
            *received.metric_names.entry(metric.name).or_default() += 1;
        }
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

fn attributes(pairs: Vec<KeyValue>) -> BTreeMap<String, String> {
    pairs
        .into_iter()
        .map(|pair| {
            let value = match pair.value.and_then(|value| value.value) {
                Some(Value::StringValue(text)) => text,
                Some(Value::IntValue(number)) => number.to_string(),
                Some(Value::BoolValue(truth)) => truth.to_string(),
                Some(Value::DoubleValue(number)) => number.to_string(),
                other => format!("{other:?}"),
            };
            (pair.key, value)
        })
        .collect()
}
