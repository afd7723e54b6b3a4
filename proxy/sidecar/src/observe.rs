//! What the data plane reports: metrics, access log and spans.
//!
//! Handles are resolved once, when a route and an endpoint are chosen for the first time or an
//! inbound connection is identified; per request there is one call on a handle, with numbers. No
//! call may block, and none may fail: what cannot be exported is dropped and counted by the
//! observer.

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Method, Uri, Version};
use turnpike_rules::{Identity, ServiceKey, workload::Names};

/// Receives what happened. Calls may come from any worker thread.
pub trait Observer: Send + Sync + fmt::Debug + 'static {
    /// The series of HTTP requests between these two. Kept by the caller for as long as it has
    /// such requests.
    fn http(&self, labels: &Labels) -> Arc<dyn HttpSeries>;

    /// The series of TCP connections between these two.
    fn tcp(&self, labels: &Labels) -> Arc<dyn TcpSeries>;

    /// Begins a span for a request, if it is to be sampled: the caller's decision in `traceparent`
    /// (or B3 headers) is kept, else the configured share decides. Writes the context that goes
    /// on into `headers`. `None`: not sampled; `headers` as they were, or with a decision not to
    /// sample.
    fn span(&self, direction: Direction, headers: &mut HeaderMap) -> Option<Box<dyn Span>>;

    /// Whether [`Observer::log`] does anything: a record that nobody reads is not put together.
    fn logs(&self) -> bool;

    /// One line of the access log.
    fn log(&self, record: &AccessRecord<'_>);

    /// A request's failure took an endpoint of this Service out.
    fn ejected(&self, service: &ServiceKey);

    /// How many endpoints of this Service are out now; told when it changes.
    fn out(&self, service: &ServiceKey, endpoints: usize);

    /// What became of the copy of a request to this Service.
    fn mirrored(&self, service: &ServiceKey, copy: Mirrored);

    /// Something refused before it was a request or a forwarded connection.
    fn refused(&self, refusal: &Refusal<'_>);
}

/// Counters and histograms of one pair of workloads.
pub trait HttpSeries: Send + Sync + fmt::Debug {
    fn finished(&self, outcome: &HttpOutcome);
}

pub trait TcpSeries: Send + Sync + fmt::Debug {
    fn opened(&self);
    /// Bytes since the last call; called at intervals and at the end.
    fn transferred(&self, received: u64, sent: u64);
    fn closed(&self, flags: Flags);
}

/// A sampled request. Dropped without `finish`: reported as aborted by the client.
pub trait Span: Send + fmt::Debug {
    fn finish(self: Box<Self>, record: &AccessRecord<'_>);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Reported by the callee.
    Inbound,
    /// Reported by the caller.
    Outbound,
}

/// Who speaks with whom; Istio's labels are made of this.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Labels {
    pub direction: Direction,
    /// The other side as its certificate names it. `None`: plaintext.
    pub peer: Option<Identity>,
    /// The other side's workload; `None`: nobody knows.
    pub names: Option<Arc<Names>>,
    /// The Service called. Inbound: from the mesh's server name; else the one that this pod backs,
    /// where it is one alone, as callers take it too.
    pub service: Option<ServiceKey>,
    /// Outbound: no destination of the mesh was known.
    pub passthrough: bool,
    pub grpc: bool,
    /// `mutual_tls` or `none`.
    pub mutual_tls: bool,
}

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub struct HttpOutcome {
    /// As the caller of this proxy saw it; 0 where no response was begun.
    pub status: u16,
    pub grpc_status: Option<u32>,
    pub flags: Flags,
    pub duration: Duration,
    pub request_bytes: u64,
    pub response_bytes: u64,
}

/// One request or connection, as the access log and spans tell it.
///
/// What came from a peer is as it came: the writer escapes it.
#[derive(Debug)]
pub struct AccessRecord<'a> {
    pub direction: Direction,
    /// `None`: a TCP connection.
    pub http: Option<HttpRecord<'a>>,
    pub flags: Flags,
    /// Why, where this proxy refused or gave up; names the rule.
    pub details: Option<&'a str>,
    pub duration: Duration,
    /// From the client.
    pub received: u64,
    /// To the client.
    pub sent: u64,
    /// The peer that connected.
    pub downstream: SocketAddr,
    /// Where the connection was going before it was captured.
    pub original: SocketAddr,
    /// The address that was connected to.
    pub upstream: Option<SocketAddr>,
    pub peer: Option<&'a Identity>,
    pub service: Option<&'a ServiceKey>,
    /// Name of the route taken.
    pub route: Option<&'a str>,
    /// Tries made upstream.
    pub attempts: u32,
    pub sni: Option<&'a str>,
}

#[derive(Debug)]
pub struct HttpRecord<'a> {
    pub method: &'a Method,
    pub uri: &'a Uri,
    pub version: Version,
    pub host: Option<&'a str>,
    pub user_agent: Option<&'a HeaderValue>,
    pub request_id: Option<&'a HeaderValue>,
    /// The trace context that went on with the request.
    pub traceparent: Option<&'a HeaderValue>,
    /// 0 where no response was begun.
    pub status: u16,
    pub grpc_status: Option<u32>,
}

/// What became of the copy of a request. Nobody waits for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mirrored {
    /// With whatever status.
    Answered,
    Failed,
    /// Not sent: too many are under way, or the body was too large or not read to its end.
    Dropped,
}

impl Mirrored {
    /// As it stands in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
        }
    }
}

/// Something refused at the door, for a counter by reason and a log line.
#[derive(Debug)]
pub struct Refusal<'a> {
    pub direction: Direction,
    pub reason: RefusalReason,
    pub downstream: Option<SocketAddr>,
    pub original: Option<SocketAddr>,
    /// What was refused, by which rule, what to do.
    pub details: &'a str,
}

/// Few and fixed, so that the counter's series are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// Plaintext, or TLS of the app's own, to a STRICT port.
    Strict,
    /// The TLS handshake failed: no certificate, wrong root, expired.
    Handshake,
    /// The server name of mesh TLS names nothing that this pod backs.
    ServerName,
    /// Authorization of a TCP connection.
    Authorization,
    /// A connection to one of the proxy's own listeners.
    Loop,
    /// Malformed or ambiguous HTTP.
    Malformed,
    /// A client that takes too long over its request head or TLS handshake.
    Slow,
    /// Connections at their limit, or out of file descriptors.
    Overload,
    /// A Service address and port that nothing serves.
    NoRoute,
    /// The original destination is not known to the kernel.
    NotCaptured,
}

impl RefusalReason {
    /// As it stands in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Handshake => "handshake",
            Self::ServerName => "server_name",
            Self::Authorization => "authorization",
            Self::Loop => "loop",
            Self::Malformed => "malformed",
            Self::Slow => "slow",
            Self::Overload => "overload",
            Self::NoRoute => "no_route",
            Self::NotCaptured => "not_captured",
        }
    }
}

/// Envoy's response flags, and one of our own; several may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Flags(u16);

impl Flags {
    pub const NONE: Self = Self(0);
    /// UH: no healthy endpoint.
    pub const NO_HEALTHY_UPSTREAM: Self = Self(1);
    /// UF: connecting failed, the TLS handshake included.
    pub const CONNECT_FAILED: Self = Self(1 << 1);
    /// UO: a circuit limit.
    pub const OVERFLOW: Self = Self(1 << 2);
    /// UT: a timeout of the request or the try.
    pub const TIMEOUT: Self = Self(1 << 3);
    /// URX: retries were used up.
    pub const RETRY_LIMIT: Self = Self(1 << 4);
    /// NR: no route, or a route without backends.
    pub const NO_ROUTE: Self = Self(1 << 5);
    /// DC: the client went away.
    pub const CLIENT_GONE: Self = Self(1 << 6);
    /// UC: the upstream ended the connection.
    pub const UPSTREAM_CLOSED: Self = Self(1 << 7);
    /// UR: the upstream reset the stream.
    pub const UPSTREAM_RESET: Self = Self(1 << 8);
    /// UAEX: authorization.
    pub const UNAUTHORIZED: Self = Self(1 << 9);
    /// DPE: malformed from the client.
    pub const CLIENT_PROTOCOL: Self = Self(1 << 10);
    /// UPE: malformed from the upstream.
    pub const UPSTREAM_PROTOCOL: Self = Self(1 << 11);
    /// SI: idle for too long.
    pub const IDLE: Self = Self(1 << 12);
    /// NC: no such Service.
    pub const NO_CLUSTER: Self = Self(1 << 13);

    /// EJ: a try of this request took its endpoint out. Ours: Envoy has none for it.
    pub const EJECTED: Self = Self(1 << 14);

    const NAMES: [&'static str; 15] = [
        "UH", "UF", "UO", "UT", "URX", "NR", "DC", "UC", "UR", "UAEX", "DPE", "UPE", "SI", "NC",
        "EJ",
    ];

    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// For tables indexed by flags; below `1 << 15`.
    pub const fn bits(self) -> u16 {
        self.0
    }
}

/// Envoy's short forms with commas between them, `-` for none.
impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::NONE {
            return f.write_str("-");
        }
        let mut separator = "";
        for (bit, name) in Self::NAMES.iter().enumerate() {
            if self.0 & (1 << bit) != 0 {
                write!(f, "{separator}{name}")?;
                separator = ",";
            }
        }
        Ok(())
    }
}

/// Reports to nobody: for tests of what is not about reports.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn http(&self, _: &Labels) -> Arc<dyn HttpSeries> {
        Arc::new(Self)
    }
    fn tcp(&self, _: &Labels) -> Arc<dyn TcpSeries> {
        Arc::new(Self)
    }
    fn span(&self, _: Direction, _: &mut HeaderMap) -> Option<Box<dyn Span>> {
        None
    }
    fn logs(&self) -> bool {
        false
    }
    fn log(&self, _: &AccessRecord<'_>) {}
    fn ejected(&self, _: &ServiceKey) {}
    fn out(&self, _: &ServiceKey, _: usize) {}
    fn mirrored(&self, _: &ServiceKey, _: Mirrored) {}
    fn refused(&self, _: &Refusal<'_>) {}
}

impl HttpSeries for Silent {
    fn finished(&self, _: &HttpOutcome) {}
}

impl TcpSeries for Silent {
    fn opened(&self) {}
    fn transferred(&self, _: u64, _: u64) {}
    fn closed(&self, _: Flags) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_written_as_envoy_writes_them() {
        assert_eq!(Flags::NONE.to_string(), "-");
        assert_eq!(
            Flags::CONNECT_FAILED.with(Flags::RETRY_LIMIT).to_string(),
            "UF,URX"
        );
        assert_eq!(Flags::NO_CLUSTER.to_string(), "NC");
    }
}
