//! Istio's labels, so that its dashboards and Kiali read these metrics.

use std::fmt;

use http::StatusCode;
use turnpike_rules::{Identity, ServiceKey, workload::SelfConfig};

use crate::observe::{Direction, Flags, Labels};

const UNKNOWN: &str = "unknown";
const OTHER: &str = "other";

/// This side of every connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    pub workload: String,
    pub namespace: String,
    pub principal: String,
    pub cluster: String,
}

impl Own {
    pub fn new(config: &SelfConfig, cluster: &str) -> Self {
        let workload = if config.workload.is_empty() {
            &config.name
        } else {
            &config.workload
        };
        Self {
            workload: workload.to_string(),
            namespace: config.namespace.to_string(),
            principal: config.identity.to_string(),
            cluster: cluster.to_owned(),
        }
    }
}

/// A label with its value.
pub(super) type Pair = (&'static str, String);

/// What the labels of a series are made of beside the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Http {
        code: Code,
        grpc_code: Option<GrpcCode>,
    },
    Tcp,
}

/// A status as a label: servers may answer any number, and must not make as many series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Code {
    /// Registered with IANA, or 0 where no response was begun.
    Known(u16),
    /// `4xx`: dashboards match on the first digit.
    Class(u8),
    Other,
}

impl Code {
    pub(super) fn of(status: u16) -> Self {
        let registered = |code: StatusCode| code.canonical_reason().is_some();
        match status {
            0 => Self::Known(0),
            _ if StatusCode::from_u16(status).is_ok_and(registered) => Self::Known(status),
            100..600 => Self::Class((status / 100) as u8),
            _ => Self::Other,
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(status) => status.fmt(f),
            Self::Class(class) => write!(f, "{class}xx"),
            Self::Other => f.write_str(OTHER),
        }
    }
}

/// One of gRPC's statuses, or something that a server made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum GrpcCode {
    Known(u32),
    Other,
}

impl GrpcCode {
    /// The highest (UNAUTHENTICATED):
    /// <https://github.com/grpc/grpc/blob/master/doc/statuscodes.md>.
    const LAST: u32 = 16;

    pub(super) fn of(status: u32) -> Self {
        match status {
            0..=Self::LAST => Self::Known(status),
            _ => Self::Other,
        }
    }
}

impl fmt::Display for GrpcCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(status) => status.fmt(f),
            Self::Other => f.write_str(OTHER),
        }
    }
}

/// Istio's labels of one series, in Istio's order.
pub(super) fn pairs(own: &Own, labels: &Labels, kind: Kind, flags: Flags) -> Vec<Pair> {
    let Labels {
        direction,
        peer,
        service,
        passthrough,
        grpc,
        mutual_tls,
    } = labels;
    let own = Side {
        workload: own.workload.clone(),
        namespace: own.namespace.clone(),
        principal: own.principal.clone(),
        cluster: own.cluster.clone(),
    };
    let called = Called::new(service.as_ref(), *passthrough, *direction, &own);
    let peer = Side::peer(peer.as_ref(), service.as_ref(), *direction);
    let (source, destination, reporter) = match direction {
        Direction::Outbound => (own, peer, "source"),
        Direction::Inbound => (peer, own, "destination"),
    };
    let mut pairs = vec![("reporter", reporter.to_owned())];
    pairs.extend([
        ("source_workload", source.workload.clone()),
        ("source_canonical_service", source.workload.clone()),
        ("source_canonical_revision", "latest".to_owned()),
        ("source_workload_namespace", source.namespace),
        ("source_principal", source.principal),
        ("source_app", source.workload),
        ("source_version", UNKNOWN.to_owned()),
        ("source_cluster", source.cluster),
        ("destination_workload", destination.workload.clone()),
        ("destination_workload_namespace", destination.namespace),
        ("destination_principal", destination.principal),
        ("destination_app", destination.workload.clone()),
        ("destination_version", UNKNOWN.to_owned()),
        ("destination_service", called.host),
        ("destination_canonical_service", destination.workload),
        ("destination_canonical_revision", "latest".to_owned()),
        ("destination_service_name", called.name),
        ("destination_service_namespace", called.namespace),
        ("destination_cluster", destination.cluster),
    ]);
    let protocol = match kind {
        Kind::Http { .. } if *grpc => "grpc",
        Kind::Http { .. } => "http",
        Kind::Tcp => "tcp",
    };
    pairs.push(("request_protocol", protocol.to_owned()));
    if let Kind::Http { code, grpc_code } = kind {
        pairs.push(("response_code", code.to_string()));
        let grpc_code = grpc_code.map(|code| code.to_string()).unwrap_or_default();
        pairs.push(("grpc_response_status", grpc_code));
    }
    pairs.push(("response_flags", flags.to_string()));
    // Istio's callers say "unknown", since they cannot tell; ours made the connection and can.
    let security = if *mutual_tls { "mutual_tls" } else { "none" };
    pairs.push(("connection_security_policy", security.to_owned()));
    pairs
}

/// The one series that takes what would be too many.
pub(super) fn overflow(reporter: Direction) -> Vec<Pair> {
    let reporter = match reporter {
        Direction::Outbound => "source",
        Direction::Inbound => "destination",
    };
    vec![
        ("reporter", reporter.to_owned()),
        ("overflow", "true".to_owned()),
    ]
}

struct Side {
    workload: String,
    namespace: String,
    principal: String,
    cluster: String,
}

impl Side {
    /// The other side, by its certificate. What a certificate does not say stays unknown, but for
    /// a callee, whose Service stands for its workload.
    fn peer(
        identity: Option<&Identity>,
        service: Option<&ServiceKey>,
        direction: Direction,
    ) -> Self {
        let service = service.filter(|_| direction == Direction::Outbound);
        let unknown = || UNKNOWN.to_owned();
        let namespace = identity
            .map(Identity::namespace)
            .or(service.map(|service| &*service.namespace))
            .map_or_else(unknown, str::to_owned);
        Self {
            workload: match (service, identity) {
                (Some(service), _) => service.name.to_string(),
                (None, Some(identity)) => identity.service_account().to_owned(),
                (None, None) => unknown(),
            },
            namespace,
            principal: identity.map_or_else(unknown, ToString::to_string),
            cluster: service.map_or_else(unknown, |service| service.cluster.to_string()),
        }
    }
}

/// The Service that was called.
struct Called {
    host: String,
    name: String,
    namespace: String,
}

impl Called {
    fn new(
        service: Option<&ServiceKey>,
        passthrough: bool,
        direction: Direction,
        own: &Side,
    ) -> Self {
        match service {
            Some(ServiceKey {
                namespace, name, ..
            }) => Self {
                host: format!("{name}.{namespace}.svc.cluster.local"),
                name: name.to_string(),
                namespace: namespace.to_string(),
            },
            None if passthrough => Self {
                host: UNKNOWN.to_owned(),
                name: "PassthroughCluster".to_owned(),
                namespace: UNKNOWN.to_owned(),
            },
            None => Self {
                host: UNKNOWN.to_owned(),
                name: UNKNOWN.to_owned(),
                namespace: match direction {
                    Direction::Inbound => own.namespace.clone(),
                    Direction::Outbound => UNKNOWN.to_owned(),
                },
            },
        }
    }
}
