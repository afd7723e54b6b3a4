//! Spans of sampled requests, and the trace context that goes on with every request.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context, KeyValue, SpanId, TraceFlags, TraceId,
    trace::{
        Span as _, SpanContext, SpanKind, Status, TraceContextExt, TraceState, Tracer,
        TracerProvider,
    },
};
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span as SdkSpan};

use crate::observe::{AccessRecord, Direction, Flags, Span};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

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

/// The context that a request came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parent {
    trace: TraceId,
    span: SpanId,
    sampled: bool,
    /// What else than `traceparent` the caller uses; it is kept in step.
    b3: B3Form,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum B3Form {
    None,
    Single,
    Multi,
}

impl Parent {
    fn new(trace: TraceId, span: SpanId, sampled: bool) -> Self {
        Self {
            trace,
            span,
            sampled,
            b3: B3Form::None,
        }
    }

    /// W3C first, then B3. A malformed context is as good as none.
    fn read(headers: &HeaderMap) -> Option<Self> {
        let b3_single = text(headers, &B3).and_then(read_b3);
        let b3 = b3_single.or_else(|| read_b3_multi(headers));
        let w3c = text(headers, &TRACEPARENT).and_then(read_w3c);
        match (w3c, b3) {
            (Some(w3c), Some(b3)) => Some(Self { b3: b3.b3, ..w3c }),
            (w3c, b3) => w3c.or(b3),
        }
    }

    fn context(&self) -> Context {
        let flags = if self.sampled {
            TraceFlags::SAMPLED
        } else {
            TraceFlags::default()
        };
        // `tracestate` stays in the headers as it is: nothing here adds to it.
        let parent = SpanContext::new(self.trace, self.span, flags, true, TraceState::default());
        Context::new().with_remote_span_context(parent)
    }

    fn write(&self, headers: &mut HeaderMap) {
        self.write_w3c(headers);
        let Self {
            trace,
            span,
            sampled,
            b3,
        } = self;
        let sampled = if *sampled { "1" } else { "0" };
        match b3 {
            B3Form::None => {}
            B3Form::Single => set(headers, B3, &format!("{trace:032x}-{span:016x}-{sampled}")),
            B3Form::Multi => {
                set(headers, B3_TRACE_ID, &format!("{trace:032x}"));
                set(headers, B3_SPAN_ID, &format!("{span:016x}"));
                set(headers, B3_SAMPLED, sampled);
                headers.remove(B3_PARENT);
            }
        }
    }

    fn write_w3c(&self, headers: &mut HeaderMap) {
        let Self {
            trace,
            span,
            sampled,
            b3: _,
        } = self;
        let flags = u8::from(*sampled);
        set(
            headers,
            TRACEPARENT,
            &format!("00-{trace:032x}-{span:016x}-{flags:02x}"),
        );
    }
}

/// The header's value, if there is exactly one.
fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    if values.next().is_some() {
        None
    } else {
        value.to_str().ok()
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// The trace's and the span's number in a `traceparent` that is as it should be.
pub(super) fn trace_ids(traceparent: &str) -> Option<(&str, &str)> {
    read_w3c(traceparent)?;
    let mut parts = traceparent.split('-').skip(1);
    Some((parts.next()?, parts.next()?))
}

/// Source: <https://www.w3.org/TR/trace-context/#traceparent-header>.
fn read_w3c(value: &str) -> Option<Parent> {
    let mut parts = value.split('-');
    let (version, trace, span, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let version = lower_hex(version, 2).and_then(|hex| u8::from_str_radix(hex, 16).ok())?;
    if version == 0xff || (version == 0 && parts.next().is_some()) {
        return None;
    }
    let flags = lower_hex(flags, 2).and_then(|hex| u8::from_str_radix(hex, 16).ok())?;
    ids(lower_hex(trace, 32)?, lower_hex(span, 16)?, flags & 1 == 1)
}

/// Source: <https://github.com/openzipkin/b3-propagation#single-header>.
fn read_b3(value: &str) -> Option<Parent> {
    let mut parts = value.split('-');
    let (trace, span) = (parts.next()?, parts.next()?);
    // Left out, the decision is deferred: to sample, then, since nobody has decided against it.
    let sampled = !matches!(parts.next(), Some("0"));
    let parent = b3_ids(trace, span, sampled)?;
    Some(Parent {
        b3: B3Form::Single,
        ..parent
    })
}

fn read_b3_multi(headers: &HeaderMap) -> Option<Parent> {
    let (trace, span) = (text(headers, &B3_TRACE_ID)?, text(headers, &B3_SPAN_ID)?);
    let debug = text(headers, &B3_FLAGS) == Some("1");
    let sampled = debug || !matches!(text(headers, &B3_SAMPLED), Some("0" | "false"));
    let parent = b3_ids(trace, span, sampled)?;
    Some(Parent {
        b3: B3Form::Multi,
        ..parent
    })
}

fn b3_ids(trace: &str, span: &str, sampled: bool) -> Option<Parent> {
    let trace = lower_hex(trace, 32).or_else(|| lower_hex(trace, 16))?;
    ids(trace, lower_hex(span, 16)?, sampled)
}

fn ids(trace: &str, span: &str, sampled: bool) -> Option<Parent> {
    let trace = TraceId::from_hex(trace).ok()?;
    let span = SpanId::from_hex(span).ok()?;
    let valid = trace != TraceId::INVALID && span != SpanId::INVALID;
    valid.then(|| Parent::new(trace, span, sampled))
}

fn lower_hex(text: &str, length: usize) -> Option<&str> {
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (text.len() == length && text.bytes().all(hex)).then_some(text)
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
        set(
            "http.request.method",
            http.method.as_str().to_owned().into(),
        );
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

fn finish_status(
    span: &mut SdkSpan,
    record: &AccessRecord<'_>,
    server: bool,
    attributes: &mut Vec<KeyValue>,
) {
    let status = record.http.as_ref().map_or(0, |http| http.status);
    if let Some(http) = &record.http {
        span.update_name(http.method.as_str().to_owned());
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

    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_str(value).unwrap(),
            )
        });
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, value);
        }
        headers
    }

    fn tracing() -> Tracing {
        Tracing::new(SdkTracerProvider::builder().build())
    }

    fn w3c(flags: &str) -> String {
        format!("00-{TRACE}-{SPAN}-{flags}")
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
        assert!(read_w3c(decided).is_some());
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

    #[test]
    fn malformed_contexts_are_as_good_as_none() {
        let zero = "0".repeat(32);
        for bad in [
            String::new(),
            "00".to_owned(),
            format!("00-{TRACE}-{SPAN}"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("00-{zero}-{SPAN}-01"),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{TRACE}-{SPAN}-1"),
        ] {
            assert_eq!(read_w3c(&bad), None, "{bad}");
        }
        // A later version may say more.
        assert!(read_w3c(&format!("01-{TRACE}-{SPAN}-01-more")).is_some());
        let twice = headers(&[("traceparent", &w3c("01")), ("traceparent", &w3c("01"))]);
        assert_eq!(Parent::read(&twice), None);
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_a_panic(value in "[ -~]{0,80}") {
            let mut headers = headers(&[("traceparent", &value), ("b3", &value)]);
            let _ = tracing().begin(Direction::Inbound, &mut headers, 0.5);
        }
    }
}
