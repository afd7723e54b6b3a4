//! OTLP to a real collector in this process.

use std::{
    net::SocketAddr,
    sync::{Arc, LazyLock},
    time::Duration,
};

use http::{HeaderMap, Method, Uri, Version};
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
    metrics::v1::metric::Data,
    trace::v1::{Span, span::SpanKind},
};
use tokio::{net::TcpListener, sync::watch, time::timeout};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use turnpike_rules::workload::{Names, Telemetry as Settings};
use turnpike_sidecar::{
    observe::{AccessRecord, Direction, Flags, HttpOutcome, HttpRecord, Labels, Observer},
    telemetry::{
        Own, Telemetry,
        access_log::AccessLog,
        otlp::{self, OtlpConfig},
    },
};

use crate::{controller::PATIENCE, rig::*};

/// Keeps what it is sent: service name and span; metrics.
#[derive(Clone)]
struct Collector {
    spans: Arc<watch::Sender<Vec<(String, Span)>>>,
    metrics: Arc<watch::Sender<Vec<ExportMetricsServiceRequest>>>,
}

impl Collector {
    async fn start() -> (Self, SocketAddr) {
        let collector = Self {
            spans: Arc::new(watch::Sender::new(Vec::new())),
            metrics: Arc::new(watch::Sender::new(Vec::new())),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .add_service(MetricsServiceServer::new(collector.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(async move { server.await.unwrap() });
        (collector, address)
    }
}

/// A collector that wants to be told who sends.
fn admitted(metadata: &tonic::metadata::MetadataMap) -> Result<(), Status> {
    match metadata.get("x-tenant") {
        Some(tenant) if tenant == "shop one" => Ok(()),
        other => Err(Status::unauthenticated(format!("x-tenant is {other:?}"))),
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        admitted(request.metadata())?;
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let name = attributes.iter().find(|a| a.key == "service.name").unwrap();
            let name = format!("{:?}", name.value.as_ref().unwrap().value);
            let spans = resource
                .scope_spans
                .into_iter()
                .flat_map(|scope| scope.spans);
            self.spans
                .send_modify(|all| all.extend(spans.map(|span| (name.clone(), span))));
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
        admitted(request.metadata())?;
        self.metrics
            .send_modify(|all| all.push(request.into_inner()));
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

fn proxy(workload: &str, collector: SocketAddr) -> (Arc<Telemetry>, OtlpConfig) {
    let config = OtlpConfig {
        endpoint: format!("http://{collector}"),
        interval: Duration::from_millis(100),
        headers: otlp::headers("x-tenant=shop%20one").unwrap(),
        resource: vec![("service.name", workload.to_owned())],
    };
    let mut own = own();
    own.names = Names::unlabelled(workload, "shop").into();
    let log = AccessLog::start(std::io::sink()).unwrap();
    let provider = otlp::tracer_provider(&config).unwrap();
    let telemetry = Telemetry::new(Own::new(&own, "cluster"), log, Some(provider));
    telemetry.configure(&Settings {
        sampling: 1.0,
        access_log: true,
    });
    (telemetry, config)
}

fn record<'a>(direction: Direction, http: HttpRecord<'a>) -> AccessRecord<'a> {
    AccessRecord {
        direction,
        http: Some(http),
        flags: Flags::NONE,
        details: None,
        duration: Duration::from_millis(3),
        received: 1,
        sent: 2,
        downstream: "10.0.0.1:40000".parse().unwrap(),
        original: "10.0.96.1:80".parse().unwrap(),
        upstream: Some("10.0.0.2:8080".parse().unwrap()),
        peer: None,
        service: None,
        route: None,
        attempts: 1,
        sni: None,
    }
}

/// The request of the test, as it ended.
fn http(status: u16) -> HttpRecord<'static> {
    static URI: LazyLock<Uri> = LazyLock::new(|| "http://pay/charge?id=7".parse().unwrap());
    HttpRecord {
        method: &Method::GET,
        uri: &URI,
        version: Version::HTTP_11,
        host: Some("pay"),
        user_agent: None,
        request_id: None,
        traceparent: None,
        status,
        grpc_status: None,
    }
}

fn attribute(span: &Span, key: &str) -> Option<String> {
    let found = span.attributes.iter().find(|a| a.key == key)?;
    Some(format!("{:?}", found.value.as_ref()?.value.as_ref()?))
}

#[tokio::test]
async fn one_request_is_one_trace_across_two_proxies() {
    let (collector, address) = Collector::start().await;
    let (front, _) = proxy("front", address);
    let (back, _) = proxy("back", address);

    // The headers travel from the one to the other.
    let mut headers = HeaderMap::new();
    let outer = front.span(Direction::Outbound, &mut headers).unwrap();
    let inner = back.span(Direction::Inbound, &mut headers).unwrap();
    inner.finish(&record(Direction::Inbound, http(503)));
    outer.finish(&record(Direction::Outbound, http(200)));
    // A client that goes away leaves a span too.
    drop(
        front
            .span(Direction::Outbound, &mut HeaderMap::new())
            .unwrap(),
    );
    for telemetry in [front, back] {
        tokio::task::spawn_blocking(move || telemetry.flush())
            .await
            .unwrap();
    }

    let mut spans = collector.spans.subscribe();
    let all = timeout(PATIENCE, spans.wait_for(|spans| spans.len() == 3)).await;
    let all = all.expect("three spans").unwrap().clone();
    let one = |kind: SpanKind, workload: &str, name: &str| -> Span {
        let is = |span: &Span| span.kind == i32::from(kind) && span.name == name;
        let mut found = all
            .iter()
            .filter(|(from, span)| from.contains(workload) && is(span));
        found
            .next()
            .unwrap_or_else(|| panic!("no {name} in {all:#?}"))
            .1
            .clone()
    };
    let client = one(SpanKind::Client, "front", "GET");
    let server = one(SpanKind::Server, "back", "GET");
    let aborted = one(SpanKind::Client, "front", "request");
    assert_eq!(client.trace_id, server.trace_id, "one trace");
    assert_eq!(
        server.parent_span_id, client.span_id,
        "the callee's span is the caller's child"
    );
    assert!(client.parent_span_id.is_empty());
    assert_ne!(aborted.trace_id, client.trace_id);
    assert_eq!(
        attribute(&client, "http.request.method").unwrap(),
        "StringValue(\"GET\")"
    );
    assert_eq!(
        attribute(&client, "http.response.status_code").unwrap(),
        "IntValue(200)"
    );
    assert_eq!(
        attribute(&server, "url.path").unwrap(),
        "StringValue(\"/charge\")"
    );
    assert_eq!(
        attribute(&server, "error.type").unwrap(),
        "StringValue(\"503\")"
    );
    assert_eq!(attribute(&client, "error.type"), None);
    let last = headers["traceparent"].to_str().unwrap();
    let hex = |id: &[u8]| {
        id.iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let (trace, span) = (hex(&server.trace_id), hex(&server.span_id));
    assert_eq!(
        last,
        format!("00-{trace}-{span}-01"),
        "the application gets the callee's span"
    );
}

#[tokio::test]
async fn metrics_are_pushed() {
    let (collector, address) = Collector::start().await;
    let (telemetry, config) = proxy("front", address);
    let series = telemetry.http(&Labels {
        direction: Direction::Outbound,
        peer: Some(web()),
        names: None,
        service: Some(key("pay")),
        passthrough: false,
        grpc: false,
        mutual_tls: true,
    });
    series.finished(&HttpOutcome {
        status: 200,
        grpc_status: None,
        flags: Flags::NONE,
        duration: Duration::from_millis(7),
        request_bytes: 41,
        response_bytes: 317,
    });
    let pushing = tokio::spawn(otlp::push_metrics(config, telemetry));
    let mut metrics = collector.metrics.subscribe();
    let pushed = timeout(PATIENCE, metrics.wait_for(|all| !all.is_empty())).await;
    let pushed = pushed.expect("a push").unwrap()[0].clone();
    let metrics = &pushed.resource_metrics[0].scope_metrics[0].metrics;
    let names: Vec<_> = metrics.iter().map(|metric| metric.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "istio_requests_total",
            "istio_request_duration_milliseconds",
            "istio_request_bytes",
            "istio_response_bytes",
            "istio_tcp_sent_bytes_total",
            "istio_tcp_received_bytes_total",
            "istio_tcp_connections_opened_total",
            "istio_tcp_connections_closed_total",
        ]
    );
    let sum = |name: &str| {
        let metric = metrics.iter().find(|metric| metric.name == name).unwrap();
        match metric.data.as_ref().unwrap() {
            Data::Histogram(histogram) => histogram.data_points[0].sum.unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let sums = [
        "request_duration_milliseconds",
        "request_bytes",
        "response_bytes",
    ];
    let sums = sums.map(|name| sum(&format!("istio_{name}")));
    assert_eq!(sums, [7.0, 41.0, 317.0]);
    let text = format!("{metrics:?}");
    assert!(
        text.contains("AsInt(1)") && text.contains("\"pay.shop.svc.cluster.local\""),
        "{text}"
    );
    pushing.abort();
}

#[tokio::test]
async fn a_collector_that_is_away_costs_nothing_but_the_data() {
    let nowhere: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let (telemetry, config) = proxy("front", nowhere);
    let pushing = tokio::spawn(otlp::push_metrics(config, telemetry.clone()));
    for _ in 0..5000 {
        drop(
            telemetry
                .span(Direction::Outbound, &mut HeaderMap::new())
                .unwrap(),
        );
    }
    let flushed = tokio::task::spawn_blocking(move || telemetry.flush());
    timeout(PATIENCE, flushed)
        .await
        .expect("flushing ends")
        .unwrap();
    assert!(!pushing.is_finished(), "pushing goes on");
    pushing.abort();
}
