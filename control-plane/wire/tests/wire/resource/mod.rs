//! Every type there and back, and what no consumer must ever see.

mod strategies;

use std::{net::IpAddr, sync::Arc};

use proptest::{collection::vec, prelude::*};
use prost::Message;
use turnpike_rules::{
    pod::{Members, PodEgress},
    service::{Endpoint, EndpointShard, EndpointState, Service},
    workload::{Destination, Names, SelfConfig},
};
use turnpike_wire::{
    mesh as pb, names,
    resource::{InvalidResource, Resource},
};

use strategies::{key, net, pod_egress, pod_network, self_config, service, shard, workload};

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

fn of(workload: &str, version: &str) -> Arc<Names> {
    Arc::new(Names {
        workload: workload.into(),
        version: version.into(),
        ..Names::default()
    })
}

/// A canary of one among the others, as many as a shard holds.
fn canary() -> EndpointShard {
    let endpoint = |n: u8| Endpoint {
        uid: format!("u{n}").into(),
        address: [10, 0, 0, n].into(),
        identity: None,
        zone: "a".into(),
        state: EndpointState::Serving,
        names: Some(of("web", if n == 1 { "v2" } else { "v1" })),
    };
    EndpointShard {
        name: "cluster/shop/web/0".into(),
        ports: vec![],
        endpoints: (1..=100).map(endpoint).collect(),
    }
}

#[test]
fn names_travel_and_are_held_once_for_all_who_share_them() {
    let shard = canary();
    let bytes = shard.encode();
    let mut bare = shard.clone();
    bare.endpoints.iter_mut().for_each(|e| e.names = None);
    let cost = bytes.len() - bare.encode().len();
    assert!(
        cost < 100 * 2 + 40,
        "{cost} bytes for 100 endpoints of two versions"
    );
    let read = EndpointShard::decode("cluster/shop/web/0", &bytes).unwrap();
    assert_eq!(read, shard);
    let distinct: std::collections::BTreeSet<_> = read
        .endpoints
        .iter()
        .map(|e| Arc::as_ptr(e.names.as_ref().unwrap()))
        .collect();
    assert_eq!(distinct.len(), 2);
}

#[test]
fn older_and_newer_sides_understand_each_other() {
    // What an older control plane says.
    let mut older = pb::Endpoints::from(&canary());
    older.names.clear();
    older.endpoints.iter_mut().for_each(|e| e.names = 0);
    let read = EndpointShard::decode("cluster/shop/web/0", &older.encode_to_vec()).unwrap();
    assert!(read.endpoints.iter().all(|e| e.names.is_none()));
    let older = pb::Self_ {
        workload: "web".into(),
        names: None,
        ..pb_self()
    };
    let read = SelfConfig::decode(&older.uid, &older.encode_to_vec()).unwrap();
    assert_eq!(
        (&*read.names.workload, &*read.names.namespace),
        ("web", &*read.namespace)
    );
    // What an older proxy reads.
    let read = pb::Self_::decode(&*read.encode()).unwrap();
    assert_eq!(read.workload, "web");

    // A number that points nowhere is no reason to guess.
    let mut wrong = pb::Endpoints::from(&canary());
    wrong.endpoints[7].names = 3;
    refused::<EndpointShard>("cluster/shop/web/0", &wrong, "endpoints[7].names");
}
