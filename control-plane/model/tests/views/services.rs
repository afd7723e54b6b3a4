//! Services, endpoints, and who has an address.

use turnpike_api::Kind;
use turnpike_model::Model;
use turnpike_rules::{
    service::{EndpointState, Protocol},
    workload::{Destination, MtlsMode},
};

use super::{common::key, web, world};

fn endpoints(model: &Model) -> Vec<(String, String, bool, EndpointState)> {
    let mut found = Vec::new();
    for name in web(model).shards {
        let shard = model.endpoints(&name).unwrap();
        let ports: Vec<String> = shard
            .ports
            .iter()
            .map(|p| format!("{}-{}", p.service_port, p.target_port))
            .collect();
        for endpoint in shard.endpoints {
            let meshed = endpoint.identity.is_some();
            found.push((
                endpoint.uid.to_string(),
                ports.join(","),
                meshed,
                endpoint.state,
            ));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

fn entry(
    uid: &str,
    ports: &str,
    meshed: bool,
    state: EndpointState,
) -> (String, String, bool, EndpointState) {
    (uid.into(), ports.into(), meshed, state)
}

#[test]
fn pods_become_endpoints_by_the_ports_they_have() {
    let model = world("");
    let service = web(&model);
    let protocols: Vec<Protocol> = service.ports.iter().map(|port| port.protocol).collect();
    assert_eq!(protocols, [Protocol::Http1, Protocol::Tcp]);
    assert_eq!(
        service.shards.len(),
        2,
        "two mappings of ports are two shards"
    );
    let serving = EndpointState::Serving;
    let expected = [
        entry("u1", "80-8080,5432-5432", true, serving),
        entry("u2", "80-9090,5432-5432", false, serving),
    ];
    assert_eq!(endpoints(&model), expected);
}

#[test]
fn slices_speak_for_a_service_where_there_are_any() {
    let slice = "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.0.0.1], targetRef: {kind: Pod, name: web-1}, zone: b}
- {addresses: [192.0.2.7], conditions: {ready: false, serving: true, terminating: true}}
- {addresses: [192.0.2.8], conditions: {ready: false}}
";
    let mut model = world(slice);
    let expected = [
        entry("192.0.2.7", "80-8080", false, EndpointState::Terminating),
        entry("u1", "80-8080", true, EndpointState::Serving),
    ];
    assert_eq!(endpoints(&model), expected);
    assert_eq!(&*model.self_config("u1").unwrap().backs[0].key.name, "web");
    model.delete(&key(Kind::EndpointSlice, "shop", "web-x"));
    assert_eq!(endpoints(&model).len(), 2, "then its pods again");
}

#[test]
fn a_slice_that_still_names_a_finished_pod_means_whoever_has_its_address_now() {
    let late = "
apiVersion: v1
kind: Pod
metadata: {name: job, namespace: shop, uid: u8}
spec: {containers: []}
status: {phase: Succeeded, podIP: 10.0.0.1}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: job}}]
";
    let expected = [entry("u1", "80-8080", true, EndpointState::Serving)];
    assert_eq!(endpoints(&world(late)), expected, "never in plaintext");
}

#[test]
fn a_pod_knows_what_it_serves() {
    let own = world("").self_config("u1").unwrap();
    assert_eq!(
        own.identity.to_string(),
        "spiffe://cluster.local/ns/shop/sa/web"
    );
    let ports: Vec<_> = own
        .ports
        .iter()
        .map(|port| (port.port, port.protocol))
        .collect();
    assert_eq!(ports, [(5432, Protocol::Tcp), (8080, Protocol::Http1)]);
    assert_eq!(own.probe_ports, [8080]);
    assert_eq!(own.backs.len(), 1);
    assert_eq!(own.mtls, MtlsMode::Permissive);
}

#[test]
fn addresses_stand_for_services_or_workloads() {
    let model = world("");
    let service = model.destination("default/10.96.0.1").unwrap();
    assert!(matches!(service, Destination::Service(key) if &*key.name == "web"));
    let Some(Destination::Workload(pod)) = model.destination("default/10.0.0.2") else {
        panic!("a pod's address is a workload")
    };
    assert_eq!((&*pod.uid, pod.identity), ("u2", None));
    assert_eq!(&*pod.service.unwrap().name, "web");
    for unknown in [
        "default/10.0.0.9",
        "other/10.0.0.1",
        "default/010.0.0.1",
        "nonsense",
        "",
    ] {
        assert!(model.destination(unknown).is_none(), "{unknown}");
    }
    for unknown in [
        "cluster/shop",
        "other/shop/web",
        "cluster/shop/web/80",
        "",
        "@",
        "cluster//",
    ] {
        assert!(model.service(unknown).is_none(), "{unknown}");
        assert!(model.endpoints(unknown).is_none(), "{unknown}");
        assert!(model.pod_network(unknown).is_none(), "{unknown}");
    }
}

#[test]
fn an_address_goes_to_its_new_owner() {
    let model = world(
        "
apiVersion: v1
kind: Pod
metadata: {name: a-old, namespace: shop, uid: old, deletionTimestamp: '2026-01-01T00:00:00Z'}
spec: {nodeName: node-a, containers: []}
status: {podIP: 10.0.0.9}
---
apiVersion: v1
kind: Pod
metadata: {name: new, namespace: shop, uid: new}
spec: {nodeName: node-a, containers: []}
status: {podIP: 10.0.0.9}
",
    );
    let destination = model.destination("default/10.0.0.9");
    assert!(matches!(destination, Some(Destination::Workload(pod)) if &*pod.uid == "new"));
}

#[test]
fn zones_come_from_the_pod_its_node_or_its_slice() {
    let model = world(
        "
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: bank, uid: u5, annotations: {topology.kubernetes.io/zone: a}}
spec: {nodeName: node-a, containers: []}
",
    );
    assert_eq!(
        &*model.self_config("u1").unwrap().zone,
        "a",
        "learned from another pod there"
    );
    assert_eq!(&*model.self_config("u2").unwrap().zone, "");
}
