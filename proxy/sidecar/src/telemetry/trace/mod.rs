//! Spans of sampled requests, under the trace context that requests carry ([`context`]).

mod context;

use std::time::Duration;

use http::{HeaderMap, Method};
use opentelemetry::{
    Context, KeyValue, SpanId, TraceId,
    trace::{Span as _, SpanKind, Status, Tracer, TracerProvider},
};
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span as SdkSpan};

pub(super) use self::context::trace_ids;
use self::context::{B3Form, Parent};
use crate::observe::{AccessRecord, Direction, Flags, Span};

#[derive(Debug)]
pub(super) struct Tracing {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Tracing {
    pub(super) fn new(provider: SdkTracerProvider) -> Self {
        Self {
            tracer: provider.tracer("turnpike"),
            provider,
        }
    }

    /// Begins the span of a request, if it is sampled, and writes the context that goes on.
    pub(super) fn begin(
        &self,
        direction: Direction,
        headers: &mut HeaderMap,
        sampling: f64,
    ) -> Option<Box<dyn Span>> {
        let parent = Parent::read(headers);
        let sampled = match &parent {
            Some(parent) => parent.sampled,
            None => fastrand::f64() < sampling,
        };
        if !sampled {
            if parent.is_none() {
                // The decision holds for the whole trace.
                let (trace, span) = (nonzero_u128(), nonzero_u64());
                let unsampled = Parent::new(TraceId::from(trace), SpanId::from(span), false);
                unsampled.write_w3c(headers);
            }
            return None;
        }
        let kind = match direction {
            Direction::Inbound => SpanKind::Server,
            Direction::Outbound => SpanKind::Client,
        };
        let context = parent.as_ref().map_or_else(Context::new, Parent::context);
        let span = self.tracer.span_builder("request").with_kind(kind);
        let span = self.tracer.build_with_context(span, &context);
        let own = span.span_context();
        let mut next = Parent::new(own.trace_id(), own.span_id(), true);
        next.b3 = parent.map_or(B3Form::None, |parent| parent.b3);
        next.write(headers);
        Some(Box::new(RequestSpan { span: Some(span) }))
    }

    pub(super) fn shutdown(&self, timeout: Duration) {
        if let Err(error) = self.provider.shutdown_with_timeout(timeout) {
            tracing::warn!(%error, "the last spans could not be exported");
        }
    }
}

fn nonzero_u128() -> u128 {
    fastrand::u128(1..)
}

fn nonzero_u64() -> u64 {
    fastrand::u64(1..)
}

/// `None` once it has ended.
#[derive(Debug)]
struct RequestSpan {
    span: Option<SdkSpan>,
}

impl Span for RequestSpan {
    fn finish(mut self: Box<Self>, record: &AccessRecord<'_>) {
        if let Some(mut span) = self.span.take() {
            describe(&mut span, record);
            span.end();
        }
    }
}

impl Drop for RequestSpan {
    fn drop(&mut self) {
        if let Some(mut span) = self.span.take() {
            span.set_attribute(KeyValue::new("error.type", "aborted"));
            span.set_status(Status::error("the client went away"));
            span.end();
        }
    }
}

/// Source: <https://opentelemetry.io/docs/specs/semconv/http/http-spans/>.
fn describe(span: &mut SdkSpan, record: &AccessRecord<'_>) {
    let mut attributes = Vec::with_capacity(20);
    let mut set = |key: &'static str, value: opentelemetry::Value| {
        attributes.push(KeyValue::new(key, value));
    };
    let server = record.direction == Direction::Inbound;
    if let Some(http) = &record.http {
        set("http.request.method", method_name(http.method).into());
        if method_name(http.method) == OTHER_METHOD {
            let original = http.method.as_str().to_owned();
            set("http.request.method_original", original.into());
        }
        set("http.response.status_code", i64::from(http.status).into());
        set(
            "url.scheme",
            http.uri.scheme_str().unwrap_or("http").to_owned().into(),
        );
        set("url.path", http.uri.path().to_owned().into());
        if let Some(query) = http.uri.query().filter(|_| server) {
            set("url.query", query.to_owned().into());
        }
        if let Some(host) = http.host {
            set("server.address", host.to_owned().into());
        }
        if let Some(agent) = http.user_agent.and_then(|agent| agent.to_str().ok()) {
            set("user_agent.original", agent.to_owned().into());
        }
        if let Some(id) = http.request_id.and_then(|id| id.to_str().ok()) {
            set("guid:x-request-id", id.to_owned().into());
        }
        if let Some(status) = http.grpc_status {
            set("rpc.system", "grpc".into());
            set("rpc.grpc.status_code", i64::from(status).into());
        }
        let version = match http.version {
            http::Version::HTTP_10 => "1.0",
            http::Version::HTTP_2 => "2",
            _ => "1.1",
        };
        set("network.protocol.version", version.into());
    }
    set("server.port", i64::from(record.original.port()).into());
    if server {
        set("client.address", record.downstream.ip().to_string().into());
    }
    let peer = if server {
        Some(record.downstream)
    } else {
        record.upstream
    };
    if let Some(peer) = peer {
        set("network.peer.address", peer.ip().to_string().into());
        set("network.peer.port", i64::from(peer.port()).into());
    }
    if let Some(identity) = record.peer {
        set("turnpike.peer.identity", identity.to_string().into());
    }
    if let Some(service) = record.service {
        set("turnpike.service", service.to_string().into());
    }
    if let Some(route) = record.route {
        set("turnpike.route", route.to_owned().into());
    }
    if record.attempts > 1 {
        set(
            "http.request.resend_count",
            i64::from(record.attempts - 1).into(),
        );
    }
    if record.flags != Flags::NONE {
        set("response_flags", record.flags.to_string().into());
    }
    finish_status(span, record, server, &mut attributes);
    span.set_attributes(attributes);
}

const OTHER_METHOD: &str = "_OTHER";

/// The known methods by name. Spans are grouped by it, and clients may send any.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::CONNECT => "CONNECT",
        Method::OPTIONS => "OPTIONS",
        Method::TRACE => "TRACE",
        Method::PATCH => "PATCH",
        _ => OTHER_METHOD,
    }
}

fn finish_status(
    span: &mut SdkSpan,
    record: &AccessRecord<'_>,
    server: bool,
    attributes: &mut Vec<KeyValue>,
) {
    let status = record.http.as_ref().map_or(0, |http| http.status);
    if let Some(http) = &record.http {
        let method = method_name(http.method);
        let name = if method == OTHER_METHOD {
            "HTTP"
        } else {
            method
        };
        span.update_name(name);
    }
    let error = match status {
        0 => true,
        // A client's mistake is no error of the server.
        400..=499 => !server,
        other => other >= 500,
    };
    if error {
        let kind = if status == 0 {
            "no_response".to_owned()
        } else {
            status.to_string()
        };
        attributes.push(KeyValue::new("error.type", kind));
        span.set_status(Status::error(record.details.unwrap_or_default().to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        context::tests::{SPAN, TRACE, headers, w3c},
        *,
    };

    fn tracing() -> Tracing {
        Tracing::new(SdkTracerProvider::builder().build())
    }

    #[test]
    fn the_callers_decision_is_kept() {
        let tracing = tracing();
        let mut sampled = headers(&[("traceparent", &w3c("01"))]);
        assert!(
            tracing
                .begin(Direction::Inbound, &mut sampled, 0.0)
                .is_some()
        );
        let next = sampled["traceparent"].to_str().unwrap();
        assert!(
            next.starts_with(&format!("00-{TRACE}-")) && next.ends_with("-01"),
            "{next}"
        );
        assert!(!next.contains(SPAN), "the next one's parent is our span");

        let mut not = headers(&[("traceparent", &w3c("00"))]);
        assert!(tracing.begin(Direction::Inbound, &mut not, 1.0).is_none());
        assert_eq!(
            not["traceparent"],
            w3c("00").as_str(),
            "and its headers are as they were"
        );
    }

    #[test]
    fn without_a_caller_the_share_decides_for_the_whole_trace() {
        let tracing = tracing();
        let mut none = HeaderMap::new();
        assert!(tracing.begin(Direction::Outbound, &mut none, 0.0).is_none());
        let decided = none["traceparent"].to_str().unwrap();
        assert!(decided.ends_with("-00"), "{decided}");
        assert!(trace_ids(decided).is_some());
        assert!(
            tracing
                .begin(Direction::Outbound, &mut HeaderMap::new(), 1.0)
                .is_some()
        );
    }

    #[test]
    fn b3_is_understood_and_kept_in_step() {
        let tracing = tracing();
        let mut single = headers(&[("b3", &format!("{TRACE}-{SPAN}-1"))]);
        assert!(
            tracing
                .begin(Direction::Inbound, &mut single, 0.0)
                .is_some()
        );
        let next = single["b3"].to_str().unwrap();
        assert!(
            next.starts_with(TRACE) && next.ends_with("-1") && !next.contains(SPAN),
            "{next}"
        );
        assert!(single["traceparent"].to_str().unwrap().contains(TRACE));

        let short = "8448eb211c80319c";
        let mut multi = headers(&[
            ("x-b3-traceid", short),
            ("x-b3-spanid", SPAN),
            ("x-b3-sampled", "1"),
        ]);
        assert!(tracing.begin(Direction::Inbound, &mut multi, 0.0).is_some());
        assert_eq!(multi["x-b3-traceid"], format!("{short:0>32}").as_str());
        assert_ne!(multi["x-b3-spanid"], SPAN);

        let mut not = headers(&[("b3", &format!("{TRACE}-{SPAN}-0"))]);
        assert!(tracing.begin(Direction::Inbound, &mut not, 1.0).is_none());

        // Both: W3C decides.
        let other = "11111111111111111111111111111111";
        let mut both = headers(&[
            ("traceparent", &w3c("01")),
            ("b3", &format!("{other}-{SPAN}-0")),
        ]);
        assert!(tracing.begin(Direction::Inbound, &mut both, 0.0).is_some());
        assert!(both["b3"].to_str().unwrap().starts_with(TRACE));
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_a_panic(value in "[ -~]{0,80}") {
            let mut headers = headers(&[("traceparent", &value), ("b3", &value)]);
            let _ = tracing().begin(Direction::Inbound, &mut headers, 0.5);
        }
    }
}
