//! Any resource.

mod traffic;

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use proptest::{collection::vec, option, prelude::*};
use turnpike_rules::{
    Identity, ServiceKey,
    authz::{Authorization, Operation, Policy, Rule, Source, TextPattern},
    egress::{EgressPolicy, EgressPort, EgressProtocol, EgressRule, HttpRules, Mode},
    pod::{Capture, InboundPort, PodEgress, PodNetwork, Transport},
    route::RouteTable,
    service::{
        Endpoint, EndpointShard, EndpointState, PortMapping, Protocol, Service, ServicePort,
    },
    workload::{BackedService, MtlsMode, Names, SelfConfig, Telemetry, Workload, WorkloadPort},
};
use turnpike_wire::names::{self, shard as shard_name};

use traffic::{host, method, path_match, route, traffic};

pub(super) fn label() -> impl Strategy<Value = Arc<str>> {
    "[a-z]([a-z0-9-]{0,6}[a-z0-9])?".prop_map(Into::into)
}

pub(super) fn text() -> impl Strategy<Value = Arc<str>> {
    ".{1,12}".prop_map(Into::into)
}

pub(super) fn any_text() -> impl Strategy<Value = Arc<str>> {
    ".{0,12}".prop_map(Into::into)
}

pub(super) fn port() -> impl Strategy<Value = u16> {
    1u16..
}

pub(super) fn ms() -> impl Strategy<Value = Duration> {
    (0u64..100_000_000).prop_map(Duration::from_millis)
}

pub(super) fn key() -> impl Strategy<Value = ServiceKey> {
    (label(), label(), label()).prop_map(|(cluster, namespace, name)| ServiceKey {
        cluster,
        namespace,
        name,
    })
}

pub(super) fn identity() -> impl Strategy<Value = Identity> {
    (label(), label(), label())
        .prop_map(|(domain, ns, sa)| Identity::new(&*domain, &*ns, &*sa).unwrap())
}

pub(super) fn net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<[u8; 4]>(), 0u8..=32).prop_map(|(a, n)| IpNet::new(a.into(), n).unwrap()),
        (any::<[u8; 16]>(), 0u8..=128).prop_map(|(a, n)| IpNet::new(a.into(), n).unwrap()),
    ]
}

pub(super) fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![
        Just(Protocol::Detect),
        Just(Protocol::Http1),
        Just(Protocol::Http2),
        Just(Protocol::Tls),
        Just(Protocol::Tcp),
    ]
}

pub(super) fn mapping() -> impl Strategy<Value = PortMapping> {
    (port(), port()).prop_map(|(service_port, target_port)| PortMapping {
        service_port,
        target_port,
    })
}

pub(super) fn service() -> impl Strategy<Value = Service> {
    let service_port = (port(), any_text(), protocol(), vec(route(), 0..3)).prop_map(
        |(port, name, protocol, routes)| ServicePort {
            port,
            name,
            protocol,
            routes: RouteTable { routes },
        },
    );
    (
        key(),
        option::of(label()),
        vec(any::<IpAddr>(), 0..3),
        vec(service_port, 0..3),
        traffic(),
        0u8..4,
    )
        .prop_map(|(key, consumer, vips, ports, traffic, shards)| {
            let shards = (0..shards)
                .map(|n| names::shard(&key, &n.to_string()).into())
                .collect();
            Service {
                key,
                consumer,
                vips,
                ports,
                traffic,
                shards,
            }
        })
}

pub(super) fn endpoint() -> impl Strategy<Value = Endpoint> {
    (
        text(),
        any::<IpAddr>(),
        option::of(identity()),
        any_text(),
        any::<bool>(),
        option::of(names()),
    )
        .prop_map(
            |(uid, address, identity, zone, terminating, names)| Endpoint {
                uid,
                address,
                identity,
                zone,
                names,
                state: if terminating {
                    EndpointState::Terminating
                } else {
                    EndpointState::Serving
                },
            },
        )
}

pub(super) fn shard() -> impl Strategy<Value = EndpointShard> {
    (key(), label(), vec(mapping(), 0..3), vec(endpoint(), 0..5)).prop_map(
        |(key, shard, ports, endpoints)| EndpointShard {
            name: shard_name(&key, &shard).into(),
            ports,
            endpoints,
        },
    )
}

/// Few, so that endpoints share them.
pub(super) fn names() -> impl Strategy<Value = Arc<Names>> {
    let version = prop_oneof![Just(""), Just("v1"), Just("v2")];
    (label(), version).prop_map(|(workload, version)| {
        Arc::new(Names {
            namespace: "shop".into(),
            service: workload.clone(),
            revision: version.into(),
            app: "".into(),
            version: version.into(),
            workload,
        })
    })
}

pub(super) fn workload_port() -> impl Strategy<Value = WorkloadPort> {
    (port(), protocol()).prop_map(|(port, protocol)| WorkloadPort { port, protocol })
}

pub(super) fn workload() -> impl Strategy<Value = Workload> {
    let ports = vec(workload_port(), 0..3);
    (
        text(),
        text(),
        text(),
        any::<[u8; 4]>(),
        option::of(identity()),
        option::of(key()),
        ports,
        option::of(names()),
    )
        .prop_map(
            |(uid, namespace, name, address, identity, service, ports, names)| Workload {
                names,
                uid,
                namespace,
                name,
                address: address.into(),
                identity,
                service,
                ports,
            },
        )
}

pub(super) fn patterns() -> impl Strategy<Value = Vec<TextPattern>> {
    let pattern = prop_oneof![
        any_text().prop_map(TextPattern::Exact),
        any_text().prop_map(TextPattern::Prefix),
        any_text().prop_map(TextPattern::Suffix),
        Just(TextPattern::Any),
    ];
    vec(pattern, 0..3)
}

pub(super) fn authorization() -> impl Strategy<Value = Authorization> {
    let nets = || vec(net(), 0..2);
    let source = (
        (patterns(), patterns(), patterns(), patterns()),
        (nets(), nets()),
    )
        .prop_map(
            |(
                (principals, not_principals, namespaces, not_namespaces),
                (ip_blocks, not_ip_blocks),
            )| {
                Source {
                    principals,
                    not_principals,
                    namespaces,
                    not_namespaces,
                    ip_blocks,
                    not_ip_blocks,
                }
            },
        );
    let ports = || vec(port(), 0..2);
    let operation = (
        (patterns(), patterns(), patterns(), patterns()),
        (patterns(), patterns(), ports(), ports()),
    )
        .prop_map(
            |((hosts, not_hosts, methods, not_methods), (paths, not_paths, ports, not_ports))| {
                Operation {
                    hosts,
                    not_hosts,
                    methods,
                    not_methods,
                    paths,
                    not_paths,
                    ports,
                    not_ports,
                }
            },
        );
    let rule = (vec(source, 0..2), vec(operation, 0..2)).prop_map(|(from, to)| Rule { from, to });
    let policy = (text(), vec(rule, 0..2)).prop_map(|(name, rules)| Policy { name, rules });
    let policy = policy.boxed();
    (vec(policy.clone(), 0..2), vec(policy, 0..2))
        .prop_map(|(deny, allow)| Authorization { deny, allow })
}

pub(super) fn mode() -> impl Strategy<Value = MtlsMode> {
    prop_oneof![Just(MtlsMode::Permissive), Just(MtlsMode::Strict)]
}

pub(super) fn self_config() -> impl Strategy<Value = SelfConfig> {
    let backed =
        (key(), vec(mapping(), 0..3)).prop_map(|(key, ports)| BackedService { key, ports });
    let telemetry = (0.0f64..=1.0, any::<bool>()).prop_map(|(sampling, access_log)| Telemetry {
        sampling,
        access_log,
    });
    (
        (
            text(),
            text(),
            text(),
            identity(),
            names(),
            any_text(),
            vec(workload_port(), 0..3),
        ),
        (
            vec(port(), 0..3),
            mode(),
            vec((port(), mode()), 0..3),
            authorization(),
        ),
        (vec(backed, 0..2), telemetry, vec(net(), 0..3)),
    )
        .prop_map(
            |(
                (uid, namespace, name, identity, names, zone, ports),
                (probe_ports, mtls, port_mtls, authorization),
                (backs, telemetry, mesh_prefixes),
            )| SelfConfig {
                uid,
                namespace,
                name,
                identity,
                names,
                zone,
                ports,
                probe_ports,
                mtls,
                port_mtls,
                authorization,
                backs,
                telemetry,
                mesh_prefixes,
            },
        )
}

pub(super) fn pod_network() -> impl Strategy<Value = PodNetwork> {
    let capture = (any::<u32>(), port(), port(), vec(port(), 0..3)).prop_map(
        |(proxy_uid, outbound_port, inbound_port, probe_ports)| Capture {
            proxy_uid,
            outbound_port,
            inbound_port,
            probe_ports,
        },
    );
    let inbound = (any::<bool>(), port()).prop_map(|(udp, port)| InboundPort {
        transport: if udp { Transport::Udp } else { Transport::Tcp },
        port,
    });
    (
        text(),
        label(),
        label(),
        identity(),
        option::of(capture),
        any::<bool>(),
        vec(inbound, 0..3),
    )
        .prop_map(
            |(uid, namespace, name, identity, capture, selected, inbound)| PodNetwork {
                uid,
                namespace,
                name,
                identity,
                capture,
                selected,
                inbound,
            },
        )
}

pub(super) fn pod_egress() -> impl Strategy<Value = PodEgress> {
    let protocol = prop_oneof![
        Just(EgressProtocol::Tls),
        Just(EgressProtocol::Http),
        Just(EgressProtocol::Tcp),
        Just(EgressProtocol::Udp),
    ];
    let ports = (port(), port(), protocol).prop_map(|(a, b, protocol)| EgressPort {
        port: a.min(b),
        end_port: a.max(b),
        protocol,
    });
    let http = (vec(method(), 0..2), vec(path_match(), 0..2))
        .prop_map(|(methods, paths)| HttpRules { methods, paths });
    let rule = (
        text(),
        vec(host(), 0..3),
        vec(net(), 1..3),
        vec(ports, 1..3),
        option::of(http),
        any::<bool>(),
    )
        .prop_map(
            |(id, hosts, cidrs, ports, http, originate_tls)| EgressRule {
                id,
                hosts,
                cidrs,
                ports,
                http,
                originate_tls,
            },
        );
    let policy = (text(), text(), any::<bool>(), vec(rule, 0..3)).prop_map(
        |(name, version, audit, rules)| EgressPolicy {
            name,
            version,
            mode: if audit { Mode::Audit } else { Mode::Enforce },
            rules,
        },
    );
    (text(), label(), label(), identity(), vec(policy, 0..3)).prop_map(
        |(uid, namespace, name, identity, policies)| PodEgress {
            uid,
            namespace,
            name,
            identity,
            policies,
        },
    )
}
