//! How things are named on the wire: resources, mesh TLS server names, ALPN.

use std::{net::IpAddr, sync::Arc};

use turnpike_rules::ServiceKey;

/// HTTP/2 inside mesh TLS.
pub const ALPN_HTTP2: &str = "turnpike/h2";
/// HTTP/1.1 inside mesh TLS.
pub const ALPN_HTTP1: &str = "turnpike/http1.1";
/// Opaque bytes inside mesh TLS.
pub const ALPN_TCP: &str = "turnpike/tcp";
/// gRPC to the control plane.
pub const ALPN_GRPC: &str = "h2";

/// Subscribes to everything that the subscriber may see.
pub const WILDCARD: &str = "*";
/// The [`members`] that the mesh's configuration adds.
pub const STATIC_MEMBERS: &str = "static";
/// The network of a mesh that has only one.
pub const DEFAULT_NETWORK: &str = "default";

/// Address: `network/ip`.
pub fn address(network: &str, ip: IpAddr) -> String {
    format!("{network}/{}", ip.to_canonical())
}

/// Reads what [`address`] writes, and nothing else.
pub fn parse_address(name: &str) -> Option<(&str, IpAddr)> {
    let (network, text) = name.split_once('/')?;
    let ip: IpAddr = text.parse().ok()?;
    (!network.is_empty() && ip.to_canonical().to_string() == text).then_some((network, ip))
}

/// Service: `cluster/ns/name`, or `cluster/ns/name@consumer` as callers of that namespace see it.
pub fn service(key: &ServiceKey, consumer: Option<&str>) -> String {
    match consumer {
        Some(consumer) => format!("{key}@{consumer}"),
        None => key.to_string(),
    }
}

/// Reads what [`service`] writes.
pub fn parse_service(name: &str) -> Option<(ServiceKey, Option<&str>)> {
    let (key, consumer) = match name.split_once('@') {
        Some((_, "")) => return None,
        Some((key, consumer)) => (key, Some(consumer)),
        None => (name, None),
    };
    Some((key.parse().ok()?, consumer))
}

/// Endpoints: `cluster/ns/name/shard`.
pub fn shard(key: &ServiceKey, shard: &str) -> String {
    format!("{key}/{shard}")
}

/// Reads what [`shard`] writes.
pub fn parse_shard(name: &str) -> Option<(ServiceKey, &str)> {
    let (key, shard) = name.rsplit_once('/')?;
    (!shard.is_empty()).then_some((key.parse().ok()?, shard))
}

/// PodNetwork and PodEgress: `cluster/ns/pod`.
pub fn pod(cluster: &str, namespace: &str, pod: &str) -> String {
    format!("{cluster}/{namespace}/{pod}")
}

/// Members: `cluster/node`, or `cluster/static` ([`STATIC_MEMBERS`]).
pub fn members(cluster: &str, node: &str) -> String {
    format!("{cluster}/{node}")
}

/// What the SNI of mesh TLS names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ServerName {
    /// A Service's port; the server checks that it backs it.
    Service { key: ServiceKey, port: u16 },
    /// A pod's own port, called by the pod's address.
    Workload { uid: Arc<str>, port: u16 },
}

/// SNI of a Service's port: `p<port>.<service>.<namespace>.<cluster>.svc.turnpike`.
pub fn service_sni(key: &ServiceKey, port: u16) -> String {
    let ServiceKey {
        cluster,
        namespace,
        name,
    } = key;
    format!("p{port}.{name}.{namespace}.{cluster}.svc.turnpike")
}

/// SNI of a pod's port: `p<port>.<uid>.pod.turnpike`.
pub fn workload_sni(uid: &str, port: u16) -> String {
    format!("p{port}.{uid}.pod.turnpike")
}

/// Reads what [`service_sni`] and [`workload_sni`] write, in any case.
pub fn parse_sni(sni: &str) -> Option<ServerName> {
    let sni = sni.to_ascii_lowercase();
    let labels: Vec<&str> = sni.split('.').collect();
    if labels.iter().any(|label| label.is_empty()) {
        return None;
    }
    match labels[..] {
        [port, name, namespace, cluster, "svc", "turnpike"] => {
            let key = ServiceKey::new(cluster, namespace, name);
            Some(ServerName::Service {
                key,
                port: parse_port(port)?,
            })
        }
        [port, uid, "pod", "turnpike"] => Some(ServerName::Workload {
            uid: uid.into(),
            port: parse_port(port)?,
        }),
        _ => None,
    }
}

fn parse_port(label: &str) -> Option<u16> {
    let digits = label.strip_prefix('p')?;
    let port: u16 = digits.parse().ok()?;
    (port != 0 && port.to_string() == digits).then_some(port)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LABEL: &str = "[a-z]([a-z0-9-]{0,10}[a-z0-9])?";

    proptest! {
        #[test]
        fn names_round_trip(c in LABEL, ns in LABEL, n in LABEL, view in LABEL, port in 1u16..) {
            let key = ServiceKey::new(&c, &ns, &n);
            let named = service(&key, None);
            prop_assert_eq!(parse_service(&named), Some((key.clone(), None)));
            let named = service(&key, Some(&view));
            prop_assert_eq!(parse_service(&named), Some((key.clone(), Some(&*view))));
            let named = shard(&key, "7");
            prop_assert_eq!(parse_shard(&named), Some((key.clone(), "7")));
            let sni = service_sni(&key, port);
            prop_assert_eq!(parse_sni(&sni), Some(ServerName::Service { key, port }));
            let sni = workload_sni("0a1b-2c", port).to_ascii_uppercase();
            prop_assert_eq!(parse_sni(&sni), Some(ServerName::Workload { uid: "0a1b-2c".into(), port }));
        }

        #[test]
        fn addresses_round_trip(ip: IpAddr) {
            let name = address("default", ip);
            prop_assert_eq!(parse_address(&name), Some(("default", ip.to_canonical())));
        }

        #[test]
        fn nothing_panics(text: String) {
            parse_address(&text);
            parse_service(&text);
            parse_shard(&text);
            parse_sni(&text);
        }
    }

    #[test]
    fn lookalikes_are_refused() {
        for sni in [
            "",
            "turnpike",
            "p0.web.shop.cluster.svc.turnpike",
            "p080.web.shop.cluster.svc.turnpike",
            "p+80.web.shop.cluster.svc.turnpike",
            "80.web.shop.cluster.svc.turnpike",
            "p80..shop.cluster.svc.turnpike",
            "p80.web.shop.cluster.svc.turnpike.",
            "p80.web.shop.cluster.svc.turnpike.example",
            "p80.x.p80.uid.pod.turnpike",
        ] {
            assert_eq!(parse_sni(sni), None, "{sni}");
        }
        assert_eq!(parse_service("cluster/shop/web@"), None);
        assert_eq!(parse_address("default/10.0.0.01"), None);
        assert_eq!(parse_address("default/::ffff:10.0.0.1"), None);
    }
}
