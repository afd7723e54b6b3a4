//! The access log: one JSON object a line, with Envoy's field names.
//!
//! A worker formats its line and appends it to a buffer; one thread writes the buffer out, a few
//! times a second or when it has grown, so that a request costs neither a system call nor a wait.

use std::{
    fmt,
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, SystemTime},
};

use parking_lot::{Condvar, Mutex};
use serde::{Serialize, Serializer};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

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
        self.append(&Line::new(record, SystemTime::now()));
    }

    pub(super) fn refused(&self, refusal: &Refusal<'_>) {
        self.append(&RefusedLine::new(refusal, SystemTime::now()));
    }

    fn append(&self, line: &impl Serialize) {
        let mut bytes = Vec::with_capacity(1024);
        if serde_json::to_writer(&mut bytes, line).is_err() {
            // No value here can fail to be serialised; if one did, the log would say so by count.
            self.0.dropped.fetch_add(1, Relaxed);
            return;
        }
        bytes.push(b'\n');
        let mut buffer = self.0.buffer.lock();
        if buffer.bytes.len() + bytes.len() > MAX_BUFFERED {
            drop(buffer);
            self.0.dropped.fetch_add(1, Relaxed);
            return;
        }
        let before = buffer.bytes.len();
        buffer.bytes.extend_from_slice(&bytes);
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
#[derive(Serialize)]
struct Line<'a> {
    start_time: String,
    direction: &'static str,
    method: Option<&'a str>,
    path: Option<&'a str>,
    protocol: Option<&'static str>,
    response_code: u16,
    #[serde(serialize_with = "shown")]
    response_flags: crate::observe::Flags,
    response_code_details: Option<&'a str>,
    grpc_status: Option<u32>,
    bytes_received: u64,
    bytes_sent: u64,
    /// Milliseconds.
    duration: u64,
    attempts: u32,
    user_agent: Option<String>,
    request_id: Option<String>,
    trace_id: Option<&'a str>,
    span_id: Option<&'a str>,
    authority: Option<&'a str>,
    #[serde(serialize_with = "shown_option")]
    upstream_host: Option<std::net::SocketAddr>,
    upstream_cluster: String,
    route_name: Option<&'a str>,
    #[serde(serialize_with = "shown")]
    downstream_remote_address: std::net::SocketAddr,
    #[serde(serialize_with = "shown")]
    downstream_local_address: std::net::SocketAddr,
    requested_server_name: Option<&'a str>,
    #[serde(serialize_with = "shown_option")]
    peer_principal: Option<&'a turnpike_rules::Identity>,
}

impl<'a> Line<'a> {
    fn new(record: &AccessRecord<'a>, now: SystemTime) -> Self {
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
        let trace = http
            .and_then(|http| http.traceparent)
            .and_then(|value| value.to_str().ok());
        let trace = trace.and_then(trace_ids);
        let port = original.port();
        let upstream_cluster = match (direction, service) {
            (Direction::Inbound, _) => format!("inbound|{port}||"),
            (Direction::Outbound, Some(service)) => {
                format!(
                    "outbound|{port}||{}.{}.svc.cluster.local",
                    service.name, service.namespace
                )
            }
            (Direction::Outbound, None) => "PassthroughCluster".to_owned(),
        };
        Self {
            start_time: timestamp(now - *duration),
            direction: direction_name(*direction),
            method: http.map(|http| http.method.as_str()),
            path: http.map(path),
            protocol: http.map(|http| protocol(http.version)),
            response_code: http.map_or(0, |http| http.status),
            response_flags: *flags,
            response_code_details: *details,
            grpc_status: http.and_then(|http| http.grpc_status),
            bytes_received: *received,
            bytes_sent: *sent,
            duration: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            attempts: *attempts,
            user_agent: http.and_then(|http| http.user_agent).map(lossy),
            request_id: http.and_then(|http| http.request_id).map(lossy),
            trace_id: trace.map(|(trace, _)| trace),
            span_id: trace.map(|(_, span)| span),
            authority: http.and_then(|http| http.host),
            upstream_host: *upstream,
            upstream_cluster,
            route_name: *route,
            downstream_remote_address: *downstream,
            downstream_local_address: *original,
            requested_server_name: *sni,
            peer_principal: *peer,
        }
    }
}

/// Something refused at the door.
#[derive(Serialize)]
struct RefusedLine<'a> {
    start_time: String,
    direction: &'static str,
    refused: &'static str,
    response_code_details: &'a str,
    #[serde(serialize_with = "shown_option")]
    downstream_remote_address: Option<std::net::SocketAddr>,
    #[serde(serialize_with = "shown_option")]
    downstream_local_address: Option<std::net::SocketAddr>,
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
            start_time: timestamp(now),
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

fn timestamp(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time);
    let time = time.replace_millisecond(time.millisecond()).unwrap_or(time);
    time.format(&Rfc3339).unwrap_or_default()
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

fn lossy(value: &http::HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
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
            serde_json::to_writer(
                &mut line,
                &Line::new(&record(None, None), SystemTime::now()),
            )
            .unwrap();
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
