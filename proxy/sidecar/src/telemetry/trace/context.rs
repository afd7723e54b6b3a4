//! The trace context that goes on with every request: W3C's, and B3 where the caller uses it.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context, SpanId, TraceFlags, TraceId,
    trace::{SpanContext, TraceContextExt, TraceState},
};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// The context that a request came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parent {
    trace: TraceId,
    span: SpanId,
    pub(super) sampled: bool,
    /// What else than `traceparent` the caller uses; it is kept in step.
    pub(super) b3: B3Form,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum B3Form {
    None,
    Single,
    Multi,
}

impl Parent {
    pub(super) fn new(trace: TraceId, span: SpanId, sampled: bool) -> Self {
        Self {
            trace,
            span,
            sampled,
            b3: B3Form::None,
        }
    }

    /// W3C first, then B3. A malformed context is as good as none.
    pub(super) fn read(headers: &HeaderMap) -> Option<Self> {
        let b3_single = text(headers, &B3).and_then(read_b3);
        let b3 = b3_single.or_else(|| read_b3_multi(headers));
        let w3c = text(headers, &TRACEPARENT).and_then(read_w3c);
        match (w3c, b3) {
            (Some(w3c), Some(b3)) => Some(Self { b3: b3.b3, ..w3c }),
            (w3c, b3) => w3c.or(b3),
        }
    }

    pub(super) fn context(&self) -> Context {
        let flags = if self.sampled {
            TraceFlags::SAMPLED
        } else {
            TraceFlags::default()
        };
        // `tracestate` stays in the headers as it is: nothing here adds to it.
        let parent = SpanContext::new(self.trace, self.span, flags, true, TraceState::default());
        Context::new().with_remote_span_context(parent)
    }

    pub(super) fn write(&self, headers: &mut HeaderMap) {
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

    pub(super) fn write_w3c(&self, headers: &mut HeaderMap) {
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
pub(in super::super) fn trace_ids(traceparent: &str) -> Option<(&str, &str)> {
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    pub(in super::super) const SPAN: &str = "b7ad6b7169203331";

    pub(in super::super) fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
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

    pub(in super::super) fn w3c(flags: &str) -> String {
        format!("00-{TRACE}-{SPAN}-{flags}")
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
}
