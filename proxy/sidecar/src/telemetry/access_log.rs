//! The access log: one JSON object a line, with Envoy's field names.
//!
//! A worker formats its line and appends it to a buffer; one thread writes the buffer out, a few
//! times a second or when it has grown, so that a request costs neither a system call nor a wait.

use std::{
    borrow::Cow,
    cell::RefCell,
    fmt,
    io::Write,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::{Condvar, Mutex};
use serde::{Serialize, Serializer};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use turnpike_rules::ServiceKey;

use super::trace::trace_ids;
use crate::observe::{AccessRecord, Direction, HttpRecord, Refusal};

/// Lines that wait to be written. Full (the reader of stdout is slow): new lines are dropped and
/// counted.
const MAX_BUFFERED: usize = 1024 * 1024;
/// With this much the writer is woken at once.
const WRITE_AT: usize = 64 * 1024;
/// A line waits at most this long.
const WRITE_EVERY: Duration = Duration::from_millis(100);

/// The log; cheap to clone.
#[derive(Clone)]
pub struct AccessLog(Arc<Shared>);

struct Shared {
    buffer: Mutex<Buffer>,
    wake: Condvar,
    written: Condvar,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    flush: bool,
    writing: bool,
}

impl AccessLog {
    /// Starts the thread that writes to `output`; it lives as long as the process.
    pub fn start(output: impl Write + Send + 'static) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            buffer: Mutex::default(),
            wake: Condvar::new(),
            written: Condvar::new(),
            dropped: AtomicU64::new(0),
        });
        let log = Self(shared.clone());
        thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write(&shared, output))?;
        Ok(log)
    }

    /// Lines that found no room.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Relaxed)
    }

    /// Returns when what was logged before is written, or after a second.
    pub fn flush(&self) {
        let mut buffer = self.0.buffer.lock();
        buffer.flush = true;
        self.0.wake.notify_one();
        let done = |buffer: &mut Buffer| !buffer.bytes.is_empty() || buffer.writing;
        self.0
            .written
            .wait_while_for(&mut buffer, done, Duration::from_secs(1));
    }

    pub(super) fn record(&self, record: &AccessRecord<'_>) {
        let now = SystemTime::now();
        self.append(|out| write_line(out, record, now));
    }

    pub(super) fn refused(&self, refusal: &Refusal<'_>) {
        let line = RefusedLine::new(refusal, SystemTime::now());
        self.append(|out| {
            // A vector takes everything, and the line has nothing that is no JSON.
            let _ = serde_json::to_writer(&mut *out, &line);
            out.push(b'\n');
        });
    }

    fn append(&self, write: impl FnOnce(&mut Vec<u8>)) {
        // Written where it waits, under the lock: workers meet there for a microsecond at most.
        let mut buffer = self.0.buffer.lock();
        let before = buffer.bytes.len();
        write(&mut buffer.bytes);
        if buffer.bytes.len() > MAX_BUFFERED {
            buffer.bytes.truncate(before);
            drop(buffer);
            self.0.dropped.fetch_add(1, Relaxed);
            return;
        }
        // The first line of a batch, and the one that fills it.
        let wake = before == 0 || (before < WRITE_AT && buffer.bytes.len() >= WRITE_AT);
        drop(buffer);
        if wake {
            self.0.wake.notify_one();
        }
    }
}

impl fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AccessLog({} dropped)", self.dropped())
    }
}

fn write(shared: &Shared, mut output: impl Write) {
    let mut lines = Vec::new();
    loop {
        {
            let mut buffer = shared.buffer.lock();
            while buffer.bytes.is_empty() && !buffer.flush {
                shared.wake.wait(&mut buffer);
            }
            let more = |buffer: &mut Buffer| buffer.bytes.len() < WRITE_AT && !buffer.flush;
            shared.wake.wait_while_for(&mut buffer, more, WRITE_EVERY);
            buffer.flush = false;
            buffer.writing = true;
            std::mem::swap(&mut buffer.bytes, &mut lines);
        }
        if !lines.is_empty() {
            // Nobody reads: there is no better place to complain to.
            let _ = output.write_all(&lines).and_then(|()| output.flush());
            lines.clear();
            lines.shrink_to(WRITE_AT);
        }
        shared.buffer.lock().writing = false;
        shared.written.notify_all();
    }
}

/// One request or connection. Fields that do not apply are null, as Envoy writes them.
fn write_line(out: &mut Vec<u8>, record: &AccessRecord<'_>, now: SystemTime) {
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
mod tests {
    use std::sync::mpsc;

    use http::{HeaderValue, Method, Uri, Version};
    use serde_json::Value;
    use turnpike_rules::{Identity, ServiceKey};

    use super::*;
    use crate::observe::{Flags, RefusalReason};

    /// Output that the test reads, or holds up.
    struct Pipe {
        written: Arc<Mutex<Vec<u8>>>,
        gate: Option<mpsc::Receiver<()>>,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if let Some(gate) = &self.gate {
                let _ = gate.recv();
            }
            self.written.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn log(gate: Option<mpsc::Receiver<()>>) -> (AccessLog, Arc<Mutex<Vec<u8>>>) {
        let written = Arc::new(Mutex::new(Vec::new()));
        let log = AccessLog::start(Pipe {
            written: written.clone(),
            gate,
        })
        .unwrap();
        (log, written)
    }

    fn lines(written: &Mutex<Vec<u8>>) -> Vec<Value> {
        let bytes = written.lock();
        let text = std::str::from_utf8(&bytes).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn record<'a>(
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
        let (log, written) = log(None);
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
        log.record(&AccessRecord {
            peer,
            ..record(Some(http), Some(&service))
        });
        log.flush();
        let lines = lines(&written);
        assert_eq!(lines.len(), 1, "CR and LF from a peer do not end the line");
        let line = &lines[0];
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
        let (log, written) = log(None);
        log.record(&record(None, None));
        log.refused(&Refusal {
            direction: Direction::Inbound,
            reason: RefusalReason::Strict,
            downstream: None,
            original: None,
            details: "plaintext to a STRICT port",
        });
        log.flush();
        let lines = lines(&written);
        assert_eq!(lines[0]["method"], Value::Null);
        assert_eq!(lines[0]["upstream_cluster"], "PassthroughCluster");
        assert_eq!(lines[1]["refused"], "strict");
        assert_eq!(
            lines[1]["response_code_details"],
            "plaintext to a STRICT port"
        );
    }

    #[test]
    fn a_reader_that_stalls_costs_lines_not_memory() {
        let (release, gate) = mpsc::channel();
        let (log, written) = log(Some(gate));
        let each = {
            let mut line = Vec::new();
            write_line(&mut line, &record(None, None), SystemTime::now());
            line.len()
        };
        // Twice what the buffer and the batch in the writer's hands can take.
        let logged = 4 * MAX_BUFFERED / each;
        for _ in 0..logged {
            log.record(&record(None, None));
        }
        assert!(log.dropped() > 0);
        assert!(log.0.buffer.lock().bytes.len() <= MAX_BUFFERED);
        drop(release);
        log.flush();
        log.flush();
        let kept = lines(&written).len() as u64;
        assert_eq!(
            kept + log.dropped(),
            logged as u64,
            "each line is written or counted"
        );
    }
}
