//! One line of the access log: a JSON object with Envoy's field names.

use std::{
    borrow::Cow,
    cell::RefCell,
    fmt,
    io::Write,
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Serialize, Serializer};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use turnpike_rules::ServiceKey;

use crate::{
    observe::{AccessRecord, Direction, HttpRecord, Refusal},
    telemetry::trace::trace_ids,
};

/// One request or connection. Fields that do not apply are null, as Envoy writes them.
pub(super) fn write_line(out: &mut Vec<u8>, record: &AccessRecord<'_>, now: SystemTime) {
    let AccessRecord {
        direction,
        http,
        flags,
        details,
        duration,
        received,
        sent,
        downstream,
        original,
        upstream,
        peer,
        service,
        route,
        attempts,
        sni,
    } = record;
    let http = http.as_ref();
    let traceparent = http.and_then(|http| http.traceparent);
    let trace = traceparent.and_then(|value| trace_ids(value.to_str().ok()?));
    let cluster = Cluster {
        direction: *direction,
        service: *service,
        port: original.port(),
    };
    let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut line = Line::begin(out);
    line.plain("start_time", &Timestamp(now - *duration));
    line.text("direction", Some(direction_name(*direction)));
    line.text("method", http.map(|http| http.method.as_str()));
    line.text("path", http.map(path));
    line.text("protocol", http.map(|http| protocol(http.version)));
    line.number(
        "response_code",
        http.map_or(0, |http| u64::from(http.status)),
    );
    line.plain("response_flags", flags);
    line.text("response_code_details", *details);
    let grpc_status = http.and_then(|http| http.grpc_status);
    line.number_or_null("grpc_status", grpc_status.map(u64::from));
    line.number("bytes_received", *received);
    line.number("bytes_sent", *sent);
    // Milliseconds.
    line.number("duration", duration_ms);
    line.number("attempts", u64::from(*attempts));
    let lossy = |value: Option<_>| value.map(lossy);
    line.text(
        "user_agent",
        lossy(http.and_then(|http| http.user_agent)).as_deref(),
    );
    line.text(
        "request_id",
        lossy(http.and_then(|http| http.request_id)).as_deref(),
    );
    line.text("trace_id", trace.map(|(trace, _)| trace));
    line.text("span_id", trace.map(|(_, span)| span));
    line.text("authority", http.and_then(|http| http.host));
    line.address("upstream_host", *upstream);
    line.shown("upstream_cluster", &cluster);
    line.text("route_name", *route);
    line.address("downstream_remote_address", Some(*downstream));
    line.address("downstream_local_address", Some(*original));
    line.text("requested_server_name", *sni);
    match peer {
        Some(peer) => line.shown("peer_principal", peer),
        None => line.text("peer_principal", None),
    }
    line.end();
}

/// A JSON object under way. Written field by field, since every request pays for it: names are
/// not looked at for what must be escaped, and numbers and addresses go through no formatter.
struct Line<'a> {
    out: &'a mut Vec<u8>,
    separator: u8,
}

impl<'a> Line<'a> {
    fn begin(out: &'a mut Vec<u8>) -> Self {
        Self {
            out,
            separator: b'{',
        }
    }

    fn name(&mut self, name: &'static str) {
        self.out.extend_from_slice(&[self.separator, b'"']);
        self.separator = b',';
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b"\":");
    }

    /// From anywhere: escaped.
    fn text(&mut self, name: &'static str, value: Option<&str>) {
        self.name(name);
        match value {
            // A vector takes everything.
            Some(value) => drop(serde_json::to_writer(&mut *self.out, value)),
            None => self.out.extend_from_slice(b"null"),
        }
    }

    /// Of our own making, without anything to escape.
    fn plain(&mut self, name: &'static str, value: &impl fmt::Display) {
        self.name(name);
        // Writing to a vector does not fail.
        let _ = write!(self.out, "\"{value}\"");
    }

    /// Made of names from elsewhere: escaped.
    fn shown(&mut self, name: &'static str, value: &impl fmt::Display) {
        self.name(name);
        // A vector takes everything.
        let _ = serde_json::Serializer::new(&mut *self.out).collect_str(value);
    }

    fn number(&mut self, name: &'static str, value: u64) {
        self.name(name);
        decimal(self.out, value);
    }

    fn number_or_null(&mut self, name: &'static str, value: Option<u64>) {
        match value {
            Some(value) => self.number(name, value),
            None => self.text(name, None),
        }
    }

    fn address(&mut self, name: &'static str, value: Option<SocketAddr>) {
        match value {
            Some(SocketAddr::V4(address)) => {
                self.name(name);
                let mut separator = b'"';
                for octet in address.ip().octets() {
                    self.out.push(separator);
                    decimal(self.out, u64::from(octet));
                    separator = b'.';
                }
                self.out.push(b':');
                decimal(self.out, u64::from(address.port()));
                self.out.push(b'"');
            }
            Some(address) => self.plain(name, &address),
            None => self.text(name, None),
        }
    }

    fn end(self) {
        self.out.extend_from_slice(b"}\n");
    }
}

fn decimal(out: &mut Vec<u8>, value: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = value;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

/// Something refused at the door.
pub(super) fn write_refusal(out: &mut Vec<u8>, refusal: &Refusal<'_>, now: SystemTime) {
    // A vector takes everything, and the line has nothing that is no JSON.
    let _ = serde_json::to_writer(&mut *out, &RefusedLine::new(refusal, now));
    out.push(b'\n');
}

#[derive(Serialize)]
struct RefusedLine<'a> {
    #[serde(serialize_with = "shown")]
    start_time: Timestamp,
    direction: &'static str,
    refused: &'static str,
    response_code_details: &'a str,
    #[serde(serialize_with = "shown_option")]
    downstream_remote_address: Option<SocketAddr>,
    #[serde(serialize_with = "shown_option")]
    downstream_local_address: Option<SocketAddr>,
}

impl<'a> RefusedLine<'a> {
    fn new(refusal: &Refusal<'a>, now: SystemTime) -> Self {
        let Refusal {
            direction,
            reason,
            downstream,
            original,
            details,
        } = refusal;
        Self {
            start_time: Timestamp(now),
            direction: direction_name(*direction),
            refused: reason.as_str(),
            response_code_details: details,
            downstream_remote_address: *downstream,
            downstream_local_address: *original,
        }
    }
}

fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "inbound",
        Direction::Outbound => "outbound",
    }
}

/// Envoy's name of where it went, as Istio makes it.
struct Cluster<'a> {
    direction: Direction,
    service: Option<&'a ServiceKey>,
    port: u16,
}

impl fmt::Display for Cluster<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = self.port;
        match (self.direction, self.service) {
            (Direction::Inbound, _) => write!(f, "inbound|{port}||"),
            (Direction::Outbound, Some(service)) => {
                let ServiceKey {
                    namespace, name, ..
                } = service;
                write!(f, "outbound|{port}||{name}.{namespace}.svc.cluster.local")
            }
            (Direction::Outbound, None) => f.write_str("PassthroughCluster"),
        }
    }
}

/// RFC 3339 with milliseconds.
struct Timestamp(SystemTime);

thread_local! {
    /// A second since the epoch and its text, which holds for thousands of lines.
    static SECOND: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or_default();
        SECOND.with_borrow_mut(|(second, text)| {
            if *second != since.as_secs() {
                let time = OffsetDateTime::from(UNIX_EPOCH + Duration::from_secs(since.as_secs()));
                *text = time.format(&Rfc3339).map_err(|_| fmt::Error)?;
                // The zone is written behind the milliseconds.
                text.pop();
                *second = since.as_secs();
            }
            write!(f, "{text}.{:03}Z", since.subsec_millis())
        })
    }
}

fn path<'a>(http: &HttpRecord<'a>) -> &'a str {
    http.uri.path_and_query().map_or("", |path| path.as_str())
}

fn protocol(version: http::Version) -> &'static str {
    match version {
        http::Version::HTTP_10 => "HTTP/1.0",
        http::Version::HTTP_11 => "HTTP/1.1",
        http::Version::HTTP_2 => "HTTP/2",
        _ => "HTTP",
    }
}

fn lossy(value: &http::HeaderValue) -> Cow<'_, str> {
    String::from_utf8_lossy(value.as_bytes())
}

fn shown<S: Serializer>(value: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn shown_option<S: Serializer>(
    value: &Option<impl fmt::Display>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.collect_str(value),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use http::{HeaderValue, Method, Uri, Version};
    use serde_json::Value;
    use turnpike_rules::Identity;

    use super::*;
    use crate::observe::{Flags, RefusalReason};

    fn parsed(write: impl FnOnce(&mut Vec<u8>)) -> Value {
        let mut line = Vec::new();
        write(&mut line);
        assert_eq!(line.pop(), Some(b'\n'));
        assert!(
            !line.contains(&b'\n'),
            "LF from a peer does not end the line"
        );
        serde_json::from_slice(&line).unwrap()
    }

    pub(in super::super) fn record<'a>(
        http: Option<HttpRecord<'a>>,
        service: Option<&'a ServiceKey>,
    ) -> AccessRecord<'a> {
        AccessRecord {
            direction: Direction::Outbound,
            http,
            flags: Flags::CONNECT_FAILED,
            details: Some("connect failed\r\n: \"refused\""),
            duration: Duration::from_millis(12),
            received: 5,
            sent: 9,
            downstream: "10.0.0.1:40000".parse().unwrap(),
            original: "10.96.0.1:80".parse().unwrap(),
            upstream: Some("10.0.0.2:8080".parse().unwrap()),
            peer: None,
            service,
            route: Some("HTTPRoute shop/web rule 0"),
            attempts: 2,
            sni: None,
        }
    }

    #[test]
    fn a_request_is_one_line_with_envoys_names() {
        let (method, uri) = (
            Method::POST,
            "http://pay/charge?x=1".parse::<Uri>().unwrap(),
        );
        let agent = HeaderValue::from_bytes(b"curl\xff\t{\"a\":1}").unwrap();
        let id = HeaderValue::from_static("3f1c");
        let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
        let traceparent = HeaderValue::from_str(&format!("00-{trace}-{span}-01")).unwrap();
        let service = ServiceKey::new("cluster", "bank", "pay");
        let identity = Identity::new("cluster.local", "bank", "pay").unwrap();
        let http = HttpRecord {
            method: &method,
            uri: &uri,
            version: Version::HTTP_11,
            host: Some("pay\r\nx: y"),
            user_agent: Some(&agent),
            request_id: Some(&id),
            traceparent: Some(&traceparent),
            status: 503,
            grpc_status: None,
        };
        let peer = Some(&identity);
        let record = AccessRecord {
            peer,
            ..record(Some(http), Some(&service))
        };
        let line = parsed(|out| write_line(out, &record, SystemTime::now()));
        for (field, value) in [
            ("method", "POST"),
            ("path", "/charge?x=1"),
            ("protocol", "HTTP/1.1"),
            ("response_flags", "UF"),
            ("response_code_details", "connect failed\r\n: \"refused\""),
            ("authority", "pay\r\nx: y"),
            ("request_id", "3f1c"),
            ("trace_id", trace),
            ("span_id", span),
            ("upstream_host", "10.0.0.2:8080"),
            (
                "upstream_cluster",
                "outbound|80||pay.bank.svc.cluster.local",
            ),
            ("downstream_remote_address", "10.0.0.1:40000"),
            ("downstream_local_address", "10.96.0.1:80"),
            ("route_name", "HTTPRoute shop/web rule 0"),
            ("peer_principal", "spiffe://cluster.local/ns/bank/sa/pay"),
            ("direction", "outbound"),
        ] {
            assert_eq!(line[field], value, "{field}");
        }
        assert_eq!(line["response_code"], 503);
        assert_eq!(
            (&line["bytes_received"], &line["bytes_sent"]),
            (&5.into(), &9.into())
        );
        assert_eq!(
            (&line["duration"], &line["attempts"]),
            (&12.into(), &2.into())
        );
        let started = line["start_time"].as_str().unwrap();
        OffsetDateTime::parse(started, &Rfc3339).unwrap();
    }

    #[test]
    fn connections_and_refusals_have_lines_too() {
        let now = SystemTime::now();
        let connection = parsed(|out| write_line(out, &record(None, None), now));
        assert_eq!(connection["method"], Value::Null);
        assert_eq!(connection["upstream_cluster"], "PassthroughCluster");
        let refusal = Refusal {
            direction: Direction::Inbound,
            reason: RefusalReason::Strict,
            downstream: None,
            original: None,
            details: "plaintext to a STRICT port",
        };
        let refused = parsed(|out| write_refusal(out, &refusal, now));
        assert_eq!(refused["refused"], "strict");
        assert_eq!(
            refused["response_code_details"],
            "plaintext to a STRICT port"
        );
    }
}
