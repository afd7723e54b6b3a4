//! Every type there and back, and what no consumer must ever see.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use proptest::{collection::vec, option, prelude::*};
use prost::Message;
use turnpike_rules::{
    Identity, ServiceKey,
    authz::{Authorization, Operation, Policy, Rule, Source, TextPattern},
    egress::{EgressPolicy, EgressPort, EgressProtocol, EgressRule, HttpRules, Mode},
    host::HostPattern,
    pod::{Capture, InboundPort, Members, PodEgress, PodNetwork, Transport},
    route::{
        Backend, Filter, HeaderEdit, PathEdit, PathMatch, Redirect, Rewrite, Route, RouteMatch,
        RouteRetry, RouteTable, RouteTimeouts, ValueMatch,
    },
    service::{
        Endpoint, EndpointShard, EndpointState, PortMapping, Protocol, Service, ServicePort,
    },
    traffic::{
        Backoff, CircuitBreaker, OutlierEjection, Retry, RetryBudget, RetryConditions, Timeouts,
        TrafficPolicy,
    },
    workload::{
        BackedService, Destination, MtlsMode, SelfConfig, Telemetry, Workload, WorkloadPort,
    },
};
use turnpike_wire::{
    mesh as pb, names,
    resource::{InvalidResource, Resource},
};

fn label() -> impl Strategy<Value = Arc<str>> {
    "[a-z]([a-z0-9-]{0,6}[a-z0-9])?".prop_map(Into::into)
}
fn text() -> impl Strategy<Value = Arc<str>> {
    ".{1,12}".prop_map(Into::into)
}
fn any_text() -> impl Strategy<Value = Arc<str>> {
    ".{0,12}".prop_map(Into::into)
}
fn port() -> impl Strategy<Value = u16> {
    1u16..
}
fn ms() -> impl Strategy<Value = Duration> {
    (0u64..100_000_000).prop_map(Duration::from_millis)
}
fn key() -> impl Strategy<Value = ServiceKey> {
    (label(), label(), label()).prop_map(|(cluster, namespace, name)| ServiceKey {
        cluster,
        namespace,
        name,
    })
}
fn identity() -> impl Strategy<Value = Identity> {
    (label(), label(), label())
        .prop_map(|(domain, ns, sa)| Identity::new(&*domain, &*ns, &*sa).unwrap())
}
fn net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<[u8; 4]>(), 0u8..=32).prop_map(|(a, n)| IpNet::new(a.into(), n).unwrap()),
        (any::<[u8; 16]>(), 0u8..=128).prop_map(|(a, n)| IpNet::new(a.into(), n).unwrap()),
    ]
}
fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![
        Just(Protocol::Detect),
        Just(Protocol::Http1),
        Just(Protocol::Http2),
        Just(Protocol::Tls),
        Just(Protocol::Tcp),
    ]
}
fn mapping() -> impl Strategy<Value = PortMapping> {
    (port(), port()).prop_map(|(service_port, target_port)| PortMapping {
        service_port,
        target_port,
    })
}
fn host() -> impl Strategy<Value = HostPattern> {
    "(\\*\\.)?[a-z]{1,5}\\.[a-z]{2,4}".prop_map(|text| HostPattern::parse(&text).unwrap())
}
fn header() -> impl Strategy<Value = Arc<str>> {
    "[a-z][a-z0-9-]{0,8}".prop_map(Into::into)
}
fn header_value() -> impl Strategy<Value = Arc<str>> {
    "[ -~]{0,8}".prop_map(Into::into)
}
fn method() -> impl Strategy<Value = Arc<str>> {
    "[A-Z]{1,7}".prop_map(Into::into)
}
fn path_match() -> impl Strategy<Value = PathMatch> {
    prop_oneof![
        "/[a-z/]{0,8}".prop_map(|path| PathMatch::Exact(path.into())),
        "/[a-z]{1,4}(/[a-z]{1,3})?".prop_map(|path| PathMatch::Prefix(path.into())),
        Just(PathMatch::default()),
    ]
}
fn value_match() -> impl Strategy<Value = ValueMatch> {
    (header(), any_text()).prop_map(|(name, value)| ValueMatch { name, value })
}
fn header_edit() -> impl Strategy<Value = HeaderEdit> {
    let pairs = || vec((header(), header_value()), 0..3);
    (pairs(), pairs(), vec(header(), 0..3)).prop_map(|(set, add, remove)| HeaderEdit {
        set,
        add,
        remove,
    })
}
fn path_edit() -> impl Strategy<Value = PathEdit> {
    prop_oneof![
        any_text().prop_map(PathEdit::ReplaceFull),
        any_text().prop_map(PathEdit::ReplacePrefix)
    ]
}
fn filter() -> impl Strategy<Value = Filter> {
    let scheme = prop_oneof![Just("http".into()), Just("https".into())];
    let status = prop_oneof![Just(301u16), Just(302), Just(303), Just(307), Just(308)];
    prop_oneof![
        header_edit().prop_map(Filter::RequestHeaders),
        header_edit().prop_map(Filter::ResponseHeaders),
        (
            option::of(scheme),
            option::of(text()),
            option::of(port()),
            option::of(path_edit()),
            status
        )
            .prop_map(|(scheme, host, port, path, status)| {
                Filter::Redirect(Redirect {
                    scheme,
                    host,
                    port,
                    path,
                    status,
                })
            }),
        (option::of(text()), option::of(path_edit()))
            .prop_map(|(host, path)| Filter::Rewrite(Rewrite { host, path })),
        (key(), port(), 0u32..=100).prop_map(|(service, port, percent)| Filter::Mirror {
            service,
            port,
            percent
        }),
    ]
}
fn conditions() -> impl Strategy<Value = RetryConditions> {
    (
        vec(100u16..600, 0..3),
        any::<bool>(),
        vec(any::<u32>(), 0..3),
        any::<bool>(),
    )
        .prop_map(|(statuses, reset, grpc, non_idempotent)| RetryConditions {
            statuses,
            reset,
            grpc,
            non_idempotent,
        })
}
fn backoff() -> impl Strategy<Value = Backoff> {
    (ms(), ms()).prop_map(|(a, b)| Backoff {
        base: a.min(b),
        max: a.max(b),
    })
}
fn backend() -> impl Strategy<Value = Backend> {
    (key(), port(), any::<u32>(), vec(filter(), 0..2)).prop_map(
        |(service, port, weight, filters)| Backend {
            service,
            port,
            weight,
            filters,
        },
    )
}
fn route() -> impl Strategy<Value = Arc<Route>> {
    let matches = (
        path_match(),
        option::of(method()),
        vec(value_match(), 0..2),
        vec(
            (text(), any_text()).prop_map(|(name, value)| ValueMatch { name, value }),
            0..2,
        ),
    )
        .prop_map(|(path, method, headers, query)| RouteMatch {
            path,
            method,
            headers,
            query,
        });
    let retry = (any::<u32>(), conditions(), option::of(backoff())).prop_map(
        |(attempts, conditions, backoff)| RouteRetry {
            attempts,
            conditions,
            backoff,
        },
    );
    (
        (
            text(),
            vec(host(), 0..2),
            matches,
            vec(filter(), 0..3),
            vec(backend(), 0..3),
        ),
        (option::of(ms()), option::of(ms()), option::of(retry)),
    )
        .prop_map(
            |((name, hosts, matches, filters, backends), (request, backend_request, retry))| {
                let timeouts = RouteTimeouts {
                    request,
                    backend_request,
                };
                Arc::new(Route {
                    name,
                    hosts,
                    matches,
                    filters,
                    backends,
                    timeouts,
                    retry,
                })
            },
        )
}
fn traffic() -> impl Strategy<Value = TrafficPolicy> {
    let retry = (
        any::<u32>(),
        conditions(),
        0.0f64..=1000.0,
        any::<u32>(),
        backoff(),
    )
        .prop_map(
            |(attempts, conditions, percent, min_per_second, backoff)| Retry {
                attempts,
                conditions,
                budget: RetryBudget {
                    percent,
                    min_per_second,
                },
                backoff,
            },
        );
    let connect = (1u64..100_000).prop_map(Duration::from_millis);
    let timeouts = (
        connect,
        option::of(ms()),
        option::of(ms()),
        option::of(ms()),
    )
        .prop_map(|(connect, request, per_try, idle)| Timeouts {
            connect,
            request,
            per_try,
            idle,
        });
    let circuit =
        any::<[u32; 3]>().prop_map(
            |[max_connections, max_pending, max_requests]| CircuitBreaker {
                max_connections,
                max_pending,
                max_requests,
            },
        );
    let outlier = (1u32.., backoff(), 0u32..=100).prop_map(|(consecutive_failures, times, max)| {
        OutlierEjection {
            consecutive_failures,
            base_ejection: times.base,
            max_ejection: times.max,
            max_percent: max,
        }
    });
    (retry, timeouts, circuit, option::of(outlier)).prop_map(
        |(retry, timeouts, circuit, outlier)| TrafficPolicy {
            retry,
            timeouts,
            circuit,
            outlier,
        },
    )
}
fn service() -> impl Strategy<Value = Service> {
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
fn endpoint() -> impl Strategy<Value = Endpoint> {
    (
        text(),
        any::<IpAddr>(),
        option::of(identity()),
        any_text(),
        any::<bool>(),
    )
        .prop_map(|(uid, address, identity, zone, terminating)| Endpoint {
            uid,
            address,
            identity,
            zone,
            state: if terminating {
                EndpointState::Terminating
            } else {
                EndpointState::Serving
            },
        })
}
fn shard() -> impl Strategy<Value = EndpointShard> {
    (key(), label(), vec(mapping(), 0..3), vec(endpoint(), 0..5)).prop_map(
        |(key, shard, ports, endpoints)| EndpointShard {
            name: names::shard(&key, &shard).into(),
            ports,
            endpoints,
        },
    )
}
fn workload_port() -> impl Strategy<Value = WorkloadPort> {
    (port(), protocol()).prop_map(|(port, protocol)| WorkloadPort { port, protocol })
}
fn workload() -> impl Strategy<Value = Workload> {
    let ports = vec(workload_port(), 0..3);
    (
        text(),
        text(),
        text(),
        any::<[u8; 4]>(),
        option::of(identity()),
        option::of(key()),
        ports,
    )
        .prop_map(
            |(uid, namespace, name, address, identity, service, ports)| Workload {
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
fn patterns() -> impl Strategy<Value = Vec<TextPattern>> {
    let pattern = prop_oneof![
        any_text().prop_map(TextPattern::Exact),
        any_text().prop_map(TextPattern::Prefix),
        any_text().prop_map(TextPattern::Suffix),
        Just(TextPattern::Any),
    ];
    vec(pattern, 0..3)
}
fn authorization() -> impl Strategy<Value = Authorization> {
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
fn mode() -> impl Strategy<Value = MtlsMode> {
    prop_oneof![Just(MtlsMode::Permissive), Just(MtlsMode::Strict)]
}
fn self_config() -> impl Strategy<Value = SelfConfig> {
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
            any_text(),
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
                (uid, namespace, name, identity, workload, zone, ports),
                (probe_ports, mtls, port_mtls, authorization),
                (backs, telemetry, mesh_prefixes),
            )| SelfConfig {
                uid,
                namespace,
                name,
                identity,
                workload,
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
fn pod_network() -> impl Strategy<Value = PodNetwork> {
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
fn pod_egress() -> impl Strategy<Value = PodEgress> {
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

#[track_caller]
fn there_and_back<R: Resource + PartialEq + std::fmt::Debug>(name: &str, resource: &R) {
    assert_eq!(R::decode(name, &resource.encode()).as_ref(), Ok(resource));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_service(service in service()) {
        there_and_back(&names::service(&service.key, service.consumer.as_deref()), &service);
        if service.consumer.is_none() {
            // The plain Service also answers for the view of a namespace that has none.
            there_and_back(&names::service(&service.key, Some("shop")), &service);
        }
    }

    #[test]
    fn a_shard(shard in shard()) {
        there_and_back(&shard.name.clone(), &shard);
    }

    #[test]
    fn an_address(workload in workload(), key in key()) {
        let name = names::address("default", workload.address);
        there_and_back(&name, &Destination::Workload(workload));
        there_and_back(&name, &Destination::Service(key));
    }

    #[test]
    fn a_self(own in self_config()) {
        there_and_back(&own.uid.clone(), &own);
    }

    #[test]
    fn a_pod_network(pod in pod_network()) {
        there_and_back(&names::pod("cluster", &pod.namespace, &pod.name), &pod);
    }

    #[test]
    fn a_pod_egress(pod in pod_egress()) {
        there_and_back(&names::pod("cluster", &pod.namespace, &pod.name), &pod);
    }

    #[test]
    fn members(addresses in vec(any::<IpAddr>(), 0..4), services in vec(net(), 0..4)) {
        let name = names::members("cluster", "node-a");
        there_and_back(&name, &Members { name: name.clone().into(), addresses, services });
    }

    /// Bytes of a stranger, and our own with one bit turned: no panic.
    #[test]
    fn damage(own in self_config(), at in any::<prop::sample::Index>(), bit in 0u8..8, noise in vec(any::<u8>(), 0..64)) {
        let mut bytes = own.encode();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = SelfConfig::decode(&own.uid, &bytes);
        let _ = Service::decode("a/b/c", &noise);
        let _ = PodEgress::decode("a/b/c", &noise);
    }
}

#[track_caller]
fn refused<R: Resource + std::fmt::Debug>(name: &str, message: &impl Message, field: &str) {
    match R::decode(name, &message.encode_to_vec()) {
        Err(InvalidResource {
            field: found,
            reason,
            ..
        }) => {
            assert_eq!(found, field, "{reason}");
        }
        Ok(resource) => panic!("must be refused at {field}: {resource:?}"),
    }
}

fn pb_key() -> pb::ServiceKey {
    pb::ServiceKey {
        cluster: "cluster".into(),
        namespace: "shop".into(),
        name: "web".into(),
    }
}

fn pb_identity() -> pb::Identity {
    pb::Identity {
        trust_domain: "cluster.local".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
    }
}

fn pb_self() -> pb::Self_ {
    pb::Self_ {
        uid: "u".into(),
        namespace: "shop".into(),
        name: "web-1".into(),
        identity: Some(pb_identity()),
        authorization: Some(pb::Authorization::default()),
        ..Default::default()
    }
}

#[test]
fn what_a_self_must_not_say() {
    SelfConfig::decode("u", &pb_self().encode_to_vec()).unwrap();
    let with = |change: fn(&mut pb::Self_)| {
        let mut own = pb_self();
        change(&mut own);
        own
    };
    refused::<SelfConfig>("v", &pb_self(), "uid");
    refused::<SelfConfig>("u", &with(|own| own.identity = None), "identity");
    // Without it everybody would be let in.
    refused::<SelfConfig>("u", &with(|own| own.authorization = None), "authorization");
    refused::<SelfConfig>("u", &with(|own| own.mtls = 7), "mtls");
    refused::<SelfConfig>(
        "u",
        &with(|own| own.must_understand = vec!["jwt".into()]),
        "must_understand",
    );
    refused::<SelfConfig>(
        "u",
        &with(|own| own.probe_ports = vec![80, 70_000]),
        "probe_ports[1]",
    );
    let unknown_pattern = |own: &mut pb::Self_| {
        let source = pb::Source {
            principals: vec![pb::TextPattern { kind: None }],
            ..Default::default()
        };
        let rule = pb::Rule {
            from: vec![source],
            to: vec![],
        };
        let deny = pb::Policy {
            name: "shop/deny".into(),
            rules: vec![rule],
        };
        own.authorization = Some(pb::Authorization {
            deny: vec![deny],
            allow: vec![],
        });
    };
    let place = "authorization.deny[0].rules[0].from[0].principals[0]";
    refused::<SelfConfig>("u", &with(unknown_pattern), place);
    let long_prefix = |own: &mut pb::Self_| {
        own.mesh_prefixes = vec![pb::Prefix {
            address: vec![10, 0, 0, 0],
            length: 33,
        }];
    };
    refused::<SelfConfig>("u", &with(long_prefix), "mesh_prefixes[0].length");
    let sampling = |own: &mut pb::Self_| {
        own.telemetry = Some(pb::Telemetry {
            sampling: f64::NAN,
            access_log: true,
        });
    };
    refused::<SelfConfig>("u", &with(sampling), "telemetry.sampling");
}

#[test]
fn what_a_service_must_not_say() {
    let name = "cluster/shop/web@front";
    let service = || pb::Service {
        key: Some(pb_key()),
        ..Default::default()
    };
    Service::decode(name, &service().encode_to_vec()).unwrap();
    refused::<Service>("cluster/shop/other", &service(), "key");
    refused::<Service>("cluster/shop", &service(), "message");
    let view = pb::Service {
        consumer: "other".into(),
        ..service()
    };
    refused::<Service>(name, &view, "consumer");
    let foreign = pb::Service {
        shards: vec!["cluster/shop/pay/0".into()],
        ..service()
    };
    refused::<Service>(name, &foreign, "shards[0]");
    let filter = pb::Filter { kind: None };
    let route = pb::Route {
        name: "r".into(),
        filters: vec![filter],
        ..Default::default()
    };
    let port = pb::ServicePort {
        port: 80,
        routes: vec![route],
        ..Default::default()
    };
    let unknown = pb::Service {
        ports: vec![port],
        ..service()
    };
    refused::<Service>(name, &unknown, "ports[0].routes[0].filters[0]");
    let traffic = pb::TrafficPolicy {
        timeouts: Some(pb::Timeouts {
            connect_ms: 0,
            ..Default::default()
        }),
        ..Default::default()
    };
    let never = pb::Service {
        traffic: Some(traffic),
        ..service()
    };
    refused::<Service>(name, &never, "traffic.timeouts.connect_ms");
}

#[test]
fn what_others_must_not_say() {
    let endpoint = || pb::Endpoint {
        uid: "u".into(),
        address: vec![10, 0, 0, 1],
        ..Default::default()
    };
    let many = pb::Endpoints {
        endpoints: vec![endpoint(); 101],
        ..Default::default()
    };
    refused::<EndpointShard>("cluster/shop/web/0", &many, "endpoints");
    let short = pb::Endpoint {
        address: vec![10, 0, 0],
        ..endpoint()
    };
    let short = pb::Endpoints {
        endpoints: vec![endpoint(), short],
        ..Default::default()
    };
    refused::<EndpointShard>("cluster/shop/web/0", &short, "endpoints[1].address");

    let workload = pb::Workload {
        uid: "u".into(),
        namespace: "shop".into(),
        name: "web-1".into(),
        address: vec![10, 0, 0, 1],
        ..Default::default()
    };
    let elsewhere = pb::Address {
        kind: Some(pb::address::Kind::Workload(workload)),
    };
    refused::<Destination>("default/10.0.0.2", &elsewhere, "workload.address");
    refused::<Destination>("default/10.0.0.2", &pb::Address { kind: None }, "kind");

    let rule = |protocol: pb::EgressProtocol| pb::EgressRule {
        id: "allow[0]".into(),
        hosts: vec!["api.example".into()],
        ports: vec![pb::EgressPort {
            port: 443,
            end_port: 443,
            protocol: protocol.into(),
        }],
        ..Default::default()
    };
    let egress = |rule: pb::EgressRule| pb::PodEgress {
        uid: "u".into(),
        namespace: "shop".into(),
        name: "web-1".into(),
        identity: Some(pb_identity()),
        policies: vec![pb::EgressPolicy {
            name: "shop/p".into(),
            version: "1".into(),
            rules: vec![rule],
            ..Default::default()
        }],
        must_understand: vec![],
    };
    let name = "cluster/shop/web-1";
    PodEgress::decode(
        name,
        &egress(rule(pb::EgressProtocol::EgressTls)).encode_to_vec(),
    )
    .unwrap();
    let unknown = egress(rule(pb::EgressProtocol::EgressUnknown));
    refused::<PodEgress>(name, &unknown, "policies[0].rules[0].ports[0].protocol");
    let nameless = egress(rule(pb::EgressProtocol::EgressTcp));
    refused::<PodEgress>(name, &nameless, "policies[0].rules[0].ports");
    refused::<PodEgress>("cluster/shop/other", &unknown, "name");
}

#[test]
fn the_message_says_where_and_why() {
    let mut own = pb_self();
    own.probe_ports = vec![0];
    let error = SelfConfig::decode("u", &own.encode_to_vec()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Self `u`: probe_ports[0]: 0 is no port; allowed are 1 to 65535"
    );
}
