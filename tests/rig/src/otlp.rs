//! A small OpenTelemetry collector: takes traces and metrics over OTLP/gRPC and keeps the newest.
//!
//! Nothing in the box has a way out, so that a collector outside of it hears of the box by this one:
//! [`Sink::pass_on`] sends it what was taken, from where this process runs.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_client::MetricsServiceClient,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_client::TraceServiceClient,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::{KeyValue, any_value::Value},
};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::mpsc::{self, error::TrySendError},
    task::JoinHandle,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint},
};

/// Spans kept; older ones are forgotten first.
const KEPT_SPANS: usize = 20_000;
/// Exports that wait to be passed on; what comes when they are that many is lost, and counted.
const WAITING: usize = 1024;
/// How long the collector outside may take over one export.
const PATIENCE: Duration = Duration::from_secs(5);

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

/// How passing on to a collector outside went: exports, not spans.
#[derive(Clone, Debug, Default)]
pub struct Passed {
    pub traces: u64,
    pub metrics: u64,
    pub lost: u64,
    /// Why the last that was lost was.
    pub error: Option<String>,
}

#[derive(Debug, Default)]
struct Received {
    spans: VecDeque<Span>,
    metric_names: BTreeMap<String, u64>,
    passed: Passed,
}

#[derive(Debug, Default)]
struct Shared {
    received: Mutex<Received>,
    outside: OnceLock<mpsc::Sender<Export>>,
}

/// What one call of a sidecar brought.
#[derive(Debug)]
enum Export {
    Traces(ExportTraceServiceRequest),
    Metrics(ExportMetricsServiceRequest),
}

/// A collector that runs until it is dropped.
#[derive(Debug)]
pub struct Sink {
    shared: Arc<Shared>,
    server: JoinHandle<()>,
    relay: OnceLock<JoinHandle<()>>,
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.server.abort();
        if let Some(relay) = self.relay.get() {
            relay.abort();
        }
    }
}

impl Sink {
    /// Serves on a listener, which may live in a namespace of its own.
    pub fn serve(listener: std::net::TcpListener) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let incoming = TcpListenerStream::new(TcpListener::from_std(listener)?);
        let shared = Arc::<Shared>::default();
        let collector = Collector(shared.clone());
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
        Ok(Self {
            shared,
            server,
            relay: OnceLock::new(),
        })
    }

    /// From now on sends everything also to the collector at this URL.
    pub fn pass_on(&self, collector: &str, runtime: &Runtime) -> Result<()> {
        let name = || format!("OTEL_EXPORTER_OTLP_ENDPOINT `{collector}`");
        ensure!(
            collector.starts_with("http://"),
            "{} is not usable here: what the box measures is passed on by OTLP over gRPC without \
             TLS; name a collector as http://HOST:4317",
            name()
        );
        let endpoint = Endpoint::from_shared(collector.to_owned()).with_context(name)?;
        let endpoint = endpoint.connect_timeout(PATIENCE).timeout(PATIENCE);
        let (sender, waiting) = mpsc::channel(WAITING);
        let _entered = runtime.enter();
        let relay = tokio::spawn(relay(endpoint.connect_lazy(), waiting, self.shared.clone()));
        let first = self.relay.set(relay).is_ok() && self.shared.outside.set(sender).is_ok();
        ensure!(
            first,
            "{}: the sink passes on to one collector already",
            name()
        );
        Ok(())
    }

    /// How passing on went so far; `None`: there is no collector outside.
    pub fn passed(&self) -> Option<Passed> {
        self.shared.outside.get()?;
        Some(self.shared.lock().passed.clone())
    }

    /// All spans of the traces in which some span fits.
    pub fn trace_of(&self, fits: impl Fn(&Span) -> bool) -> Vec<Span> {
        let received = self.shared.lock();
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
        self.shared.lock().metric_names.clone()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Received> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves an export to the relay, if there is one.
    fn hand_over(&self, export: impl FnOnce() -> Export) {
        let Some(outside) = self.outside.get() else {
            return;
        };
        if let Err(error) = outside.try_send(export()) {
            let why = match error {
                TrySendError::Full(_) => format!("{WAITING} exports wait already"),
                TrySendError::Closed(_) => "the relay has ended".to_owned(),
            };
            self.lock().passed.lose(why);
        }
    }
}

impl Passed {
    fn lose(&mut self, why: String) {
        self.lost += 1;
        self.error = Some(why);
    }
}

/// Sends on what comes, one export after the other, until nothing can come any more.
async fn relay(channel: Channel, mut waiting: mpsc::Receiver<Export>, shared: Arc<Shared>) {
    let mut traces = TraceServiceClient::new(channel.clone());
    let mut metrics = MetricsServiceClient::new(channel);
    while let Some(export) = waiting.recv().await {
        let (sent, are_traces) = match export {
            Export::Traces(request) => (traces.export(request).await.map(drop), true),
            Export::Metrics(request) => (metrics.export(request).await.map(drop), false),
        };
        let mut received = shared.lock();
        match sent {
            Ok(()) if are_traces => received.passed.traces += 1,
            Ok(()) => received.passed.metrics += 1,
            Err(status) => received.passed.lose(status.to_string()),
        }
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
struct Collector(Arc<Shared>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let request = request.into_inner();
        self.0.hand_over(|| Export::Traces(request.clone()));
        let mut received = self.0.lock();
        for resource in request.resource_spans {
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
        let request = request.into_inner();
        self.0.hand_over(|| Export::Metrics(request.clone()));
        let mut received = self.0.lock();
        let scopes = request
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

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span as Sent};

    use super::*;
    use crate::wait_for;

    fn sink(runtime: &Runtime) -> (Sink, String) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let _entered = runtime.enter();
        (Sink::serve(listener).unwrap(), url)
    }

    fn send(runtime: &Runtime, url: &str, name: &str) {
        let span = Sent {
            trace_id: vec![1; 16],
            name: name.to_owned(),
            ..Sent::default()
        };
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                scope_spans: vec![ScopeSpans {
                    spans: vec![span],
                    ..ScopeSpans::default()
                }],
                ..ResourceSpans::default()
            }],
        };
        runtime.block_on(async {
            let mut client = TraceServiceClient::connect(url.to_owned()).await.unwrap();
            client.export(request).await.unwrap();
        });
    }

    fn has(sink: &Sink, name: &str) -> bool {
        !sink.trace_of(|span| span.name == name).is_empty()
    }

    #[test]
    fn what_a_sink_takes_reaches_the_collector_outside_too() {
        let runtime = Runtime::new().unwrap();
        let (outside, collector) = sink(&runtime);
        let (inside, url) = sink(&runtime);
        send(&runtime, &url, "before");
        assert!(inside.passed().is_none());
        inside.pass_on(&collector, &runtime).unwrap();
        send(&runtime, &url, "after");
        assert!(has(&inside, "before") && has(&inside, "after"));
        let soon = Duration::from_secs(10);
        assert!(wait_for(soon, || has(&outside, "after").then_some(())).is_some());
        let counted = wait_for(soon, || inside.passed().filter(|passed| passed.traces == 1));
        assert_eq!(counted.map(|passed| passed.lost), Some(0));
    }

    #[test]
    fn a_collector_that_is_not_there_is_told_of() {
        let runtime = Runtime::new().unwrap();
        let nowhere = {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            format!("http://{}", listener.local_addr().unwrap())
        };
        let (inside, url) = sink(&runtime);
        inside.pass_on(&nowhere, &runtime).unwrap();
        send(&runtime, &url, "lost");
        let lost = wait_for(Duration::from_secs(10), || {
            inside.passed().filter(|passed| passed.lost == 1)
        });
        assert!(lost.is_some_and(|passed| passed.error.is_some()));
        assert!(has(&inside, "lost"), "it is kept nevertheless");
    }

    #[test]
    fn a_collector_by_tls_is_refused_with_what_to_name() {
        let runtime = Runtime::new().unwrap();
        let (inside, _) = sink(&runtime);
        let refused = inside.pass_on("https://collector.example:4317", &runtime);
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("http://HOST:4317"), "{text}");
    }
}
