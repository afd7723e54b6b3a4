//! Istio's labels, so that its dashboards and Kiali read these metrics.

use std::{fmt, sync::Arc};

use http::StatusCode;
use turnpike_rules::{
    Identity, ServiceKey,
    workload::{Names, SelfConfig},
};

use crate::observe::{Direction, Flags, Labels};

const UNKNOWN: &str = "unknown";
const OTHER: &str = "other";

/// This side of every connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    pub names: Arc<Names>,
    pub principal: String,
    pub cluster: String,
}

impl Own {
    pub fn new(config: &SelfConfig, cluster: &str) -> Self {
        let mut names = config.names.clone();
        if names.workload.is_empty() {
            Arc::make_mut(&mut names).workload = config.name.clone();
        }
        Self {
            names,
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
        names,
        service,
        passthrough,
        grpc,
        mutual_tls,
    } = labels;
    let called = Called::new(service.as_ref(), *passthrough, *direction, own);
    let peer = Side::peer(own, peer.as_ref(), names.as_deref(), service.as_ref());
    let own = Side::own(own);
    let (source, destination, reporter) = match direction {
        Direction::Outbound => (own, peer, "source"),
        Direction::Inbound => (peer, own, "destination"),
    };
    let mut pairs = vec![("reporter", reporter.to_owned())];
    pairs.extend([
        ("source_workload", source.workload),
        ("source_canonical_service", source.service),
        ("source_canonical_revision", source.revision),
        ("source_workload_namespace", source.namespace),
        ("source_principal", source.principal),
        ("source_app", source.app),
        ("source_version", source.version),
        ("source_cluster", source.cluster),
        ("destination_workload", destination.workload),
        ("destination_workload_namespace", destination.namespace),
        ("destination_principal", destination.principal),
        ("destination_app", destination.app),
        ("destination_version", destination.version),
        ("destination_service", called.host),
        ("destination_canonical_service", destination.service),
        ("destination_canonical_revision", destination.revision),
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
    service: String,
    revision: String,
    app: String,
    version: String,
    principal: String,
    cluster: String,
}

impl Side {
    fn own(own: &Own) -> Self {
        Self {
            principal: own.principal.clone(),
            cluster: own.cluster.clone(),
            ..Self::named(&own.names)
        }
    }

    /// The other side. Of a workload that nobody knows, its certificate and the Service that was
    /// called say the namespace.
    fn peer(
        own: &Own,
        identity: Option<&Identity>,
        names: Option<&Names>,
        service: Option<&ServiceKey>,
    ) -> Self {
        let unknown = || UNKNOWN.to_owned();
        let principal = identity.map_or_else(unknown, ToString::to_string);
        if let Some(names) = names {
            return Self {
                principal,
                cluster: own.cluster.clone(),
                ..Self::named(names)
            };
        }
        let namespace = identity.map(Identity::namespace);
        let namespace = namespace.or(service.map(|service| &*service.namespace));
        Self {
            namespace: namespace.map_or_else(unknown, str::to_owned),
            principal,
            ..Self::named(&Names::default())
        }
    }

    fn named(names: &Names) -> Self {
        let or = |text: &str, default: &str| {
            let text = if text.is_empty() { default } else { text };
            text.to_owned()
        };
        let known = !names.workload.is_empty();
        Self {
            workload: or(&names.workload, UNKNOWN),
            namespace: or(&names.namespace, UNKNOWN),
            service: or(&names.service, or(&names.workload, UNKNOWN).as_str()),
            revision: or(&names.revision, if known { "latest" } else { UNKNOWN }),
            app: or(&names.app, UNKNOWN),
            version: or(&names.version, UNKNOWN),
            principal: UNKNOWN.to_owned(),
            cluster: UNKNOWN.to_owned(),
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
        own: &Own,
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
                    Direction::Inbound => own.names.namespace.to_string(),
                    Direction::Outbound => UNKNOWN.to_owned(),
                },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn own(workload: &str, app: &str, version: &str, account: &str) -> Own {
        let names = Names {
            workload: workload.into(),
            namespace: "shop".into(),
            service: app.into(),
            revision: version.into(),
            app: app.into(),
            version: version.into(),
        };
        let identity = Identity::new("cluster.local", "shop", account).unwrap();
        Own {
            names: names.into(),
            principal: identity.to_string(),
            cluster: "cluster".into(),
        }
    }

    fn told(
        own: &Own,
        peer: &Own,
        account: &str,
        direction: Direction,
    ) -> BTreeMap<&'static str, String> {
        let labels = Labels {
            direction,
            peer: Some(Identity::new("cluster.local", "shop", account).unwrap()),
            names: Some(peer.names.clone()),
            service: Some(ServiceKey::new("cluster", "shop", "web")),
            passthrough: false,
            grpc: false,
            mutual_tls: true,
        };
        let pairs = pairs(own, &labels, Kind::Tcp, Flags::NONE);
        pairs.into_iter().collect()
    }

    /// A canary: neither the Service nor the service account is named as the Deployment is.
    #[test]
    fn both_ends_of_a_hop_agree_on_everything_but_who_reports() {
        let caller = own("front-v1", "front", "v1", "front-account");
        let callee = own("web-canary", "web-app", "v2", "web-account");
        let mut source = told(&caller, &callee, "web-account", Direction::Outbound);
        let mut destination = told(&callee, &caller, "front-account", Direction::Inbound);
        for (label, expected) in [
            ("source_workload", "front-v1"),
            ("source_canonical_service", "front"),
            ("source_version", "v1"),
            ("destination_workload", "web-canary"),
            ("destination_app", "web-app"),
            ("destination_version", "v2"),
            ("destination_canonical_service", "web-app"),
            ("destination_canonical_revision", "v2"),
            ("destination_service_name", "web"),
            (
                "destination_principal",
                "spiffe://cluster.local/ns/shop/sa/web-account",
            ),
        ] {
            assert_eq!(source[label], expected, "{label}");
        }
        assert_eq!(source.remove("reporter").as_deref(), Some("source"));
        assert_eq!(
            destination.remove("reporter").as_deref(),
            Some("destination")
        );
        assert_eq!(source, destination);
    }

    #[test]
    fn a_workload_that_nobody_knows_is_not_guessed() {
        let callee = own("web-canary", "web-app", "v2", "web-account");
        let labels = Labels {
            direction: Direction::Inbound,
            peer: Some(Identity::new("cluster.local", "bank", "teller").unwrap()),
            names: None,
            service: None,
            passthrough: false,
            grpc: false,
            mutual_tls: true,
        };
        let pairs: BTreeMap<_, _> = pairs(&callee, &labels, Kind::Tcp, Flags::NONE)
            .into_iter()
            .collect();
        assert_eq!(pairs["source_workload"], "unknown");
        assert_eq!(pairs["source_canonical_revision"], "unknown");
        assert_eq!(pairs["source_workload_namespace"], "bank");
        assert_eq!(
            pairs["source_principal"],
            "spiffe://cluster.local/ns/bank/sa/teller"
        );
    }
}
