//! What the resources say, case by case.
#![allow(clippy::unwrap_used, reason = "what fails here ends the test")]

mod common;

use std::net::IpAddr;

use common::{load, model};
use turnpike_api::Kind;
use turnpike_model::{Condition, Model, ResourceType};
use turnpike_rules::{
    service::{EndpointState, Protocol, Service},
    workload::{Destination, MtlsMode},
};

const WEB: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: web}, {name: db, port: 5432, targetPort: 5432}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, uid: u1, labels: {app: web}}
spec:
  nodeName: node-a
  serviceAccountName: web
  initContainers: [{name: turnpike-proxy, restartPolicy: Always}]
  containers:
  - {name: app, ports: [{name: web, containerPort: 8080}], livenessProbe: {httpGet: {port: web}}}
status: {podIP: 10.0.0.1, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-2, namespace: shop, uid: u2, labels: {app: web}}
spec:
  nodeName: node-b
  containers: [{name: app, ports: [{name: web, containerPort: 9090}]}]
status: {podIP: 10.0.0.2, conditions: [{type: Ready, status: 'True'}]}
---
";

fn world(yaml: &str) -> Model {
    let mut model = model();
    load(&mut model, &format!("{WEB}{yaml}"));
    model
}

fn web(model: &Model) -> Service {
    model.service("cluster/shop/web").unwrap()
}

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
    model.delete(&common::key(Kind::EndpointSlice, "shop", "web-x"));
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
fn the_narrowest_peer_authentication_holds() {
    let policy = |namespace: &str, name: &str, spec: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: PeerAuthentication\n\
             metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n---\n"
        )
    };
    let mesh = policy("turnpike-system", "mesh", "{mtls: {mode: STRICT}}");
    let namespace = policy("shop", "all", "{mtls: {mode: PERMISSIVE}}");
    let workload = policy(
        "shop",
        "web",
        "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, \
         portLevelMtls: {'8080': {mode: PERMISSIVE}}}",
    );
    let ports_only = policy(
        "shop",
        "web",
        "{selector: {matchLabels: {app: web}}, portLevelMtls: {'8080': {mode: STRICT}}}",
    );
    let config = "apiVersion: turnpike.dev/v1alpha1\nkind: MeshConfig\n\
                  metadata: {name: default}\nspec: {mtls: {mode: STRICT}}\n---\n";
    let (strict, permissive) = (MtlsMode::Strict, MtlsMode::Permissive);
    for (yaml, mode, at_8080) in [
        (String::new(), permissive, permissive),
        (config.to_owned(), strict, strict),
        (mesh.clone(), strict, strict),
        (format!("{mesh}{namespace}"), permissive, permissive),
        (format!("{mesh}{namespace}{workload}"), strict, permissive),
        (format!("{mesh}{ports_only}"), strict, strict),
        (format!("{namespace}{ports_only}"), permissive, strict),
    ] {
        let own = world(&yaml).self_config("u1").unwrap();
        assert_eq!((own.mtls, own.mtls_for(8080)), (mode, at_8080), "{yaml}");
    }
}

#[test]
fn authorization_selects_by_label_namespace_and_mesh() {
    let policy = |namespace: &str, name: &str, action: &str, selector: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: AuthorizationPolicy\n\
             metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{action: {action}, \
             {selector} rules: [{{to: [{{operation: {{ports: [8080]}}}}]}}]}}\n---\n"
        )
    };
    let model = world(
        &[
            policy("shop", "all", "ALLOW", ""),
            policy(
                "shop",
                "web",
                "DENY",
                "selector: {matchLabels: {app: web}},",
            ),
            policy(
                "shop",
                "api",
                "DENY",
                "selector: {matchLabels: {app: api}},",
            ),
            policy("bank", "all", "DENY", ""),
            policy("turnpike-system", "mesh", "DENY", ""),
        ]
        .concat(),
    );
    let authorization = model.self_config("u1").unwrap().authorization;
    let names = |list: &[turnpike_rules::authz::Policy]| {
        list.iter()
            .map(|policy| policy.name.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&authorization.allow), ["shop/all"]);
    assert_eq!(
        names(&authorization.deny),
        ["shop/web", "turnpike-system/mesh"]
    );
}

#[test]
fn an_egress_policy_selects_for_the_gate_and_the_agent() {
    let model = world(
        "
apiVersion: turnpike.dev/v1alpha1
kind: EgressPolicy
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  allow: [{hosts: [api.payments.example], ports: [{port: 443, protocol: TLS}]}]
  inbound: [{ports: [{port: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: free, namespace: shop, uid: u3}
spec: {nodeName: node-a, containers: [{name: app}]}
status: {podIP: 10.0.0.3}
---
apiVersion: v1
kind: Pod
metadata: {name: host, namespace: shop, uid: u4, labels: {app: web}}
spec: {nodeName: node-a, hostNetwork: true, containers: [{name: app}]}
status: {podIP: 10.0.0.100}
",
    );
    let network = model.pod_network("cluster/shop/web-1").unwrap();
    assert!(network.selected && network.capture.is_some());
    assert_eq!(network.inbound.len(), 1);
    let egress = model.pod_egress("cluster/shop/web-1").unwrap();
    assert_eq!(&*egress.policies[0].name, "shop/web");
    assert!(!egress.policies[0].version.is_empty());
    let free = model.pod_network("cluster/shop/free").unwrap();
    assert!(!free.selected && free.capture.is_none());
    assert!(
        model
            .pod_egress("cluster/shop/free")
            .unwrap()
            .policies
            .is_empty()
    );
    assert!(
        model.pod_network("cluster/shop/host").is_none(),
        "its node's network is not ours"
    );
    let mut pods = model.pods_of("node-a");
    pods.sort();
    assert_eq!(
        pods,
        ["cluster/shop/free".into(), "cluster/shop/web-1".into()]
    );
    let members = model.members("cluster/node-a").unwrap().addresses;
    assert_eq!(
        members,
        ["10.0.0.1".parse::<IpAddr>().unwrap(), [10, 0, 0, 3].into()]
    );
}

#[test]
fn the_api_server_belongs_to_the_cluster_wherever_it_is() {
    let slice = |name: &str, address: &str| {
        format!(
            "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: default, labels: {{kubernetes.io/service-name: kubernetes}}}}
addressType: IPv4
ports: [{{name: https, port: 6443}}]
endpoints: [{{addresses: [{address}]}}]
"
        )
    };
    let mut model = model();
    let mesh = "{apiVersion: turnpike.dev/v1alpha1, kind: MeshConfig, metadata: {name: default}, spec: \
                {clusterAddresses: [10.0.0.7]}}";
    load(&mut model, mesh);
    let members = |model: &Model| model.members("cluster/static").unwrap().addresses;
    let at = |addresses: &[[u8; 4]]| -> Vec<IpAddr> {
        addresses.iter().map(|&address| address.into()).collect()
    };
    assert_eq!(members(&model), at(&[[10, 0, 0, 7]]));
    for (address, expected) in [("10.0.0.10", [10, 0, 0, 10]), ("10.0.0.11", [10, 0, 0, 11])] {
        let changes = load(&mut model, &slice("kubernetes", address));
        let told = changes
            .iter()
            .any(|(kind, name)| kind == ResourceType::Members && &**name == "cluster/static");
        assert!(told, "agents and gates hear of {address}");
        assert_eq!(members(&model), at(&[[10, 0, 0, 7], expected]));
    }
    model.delete(&common::key(Kind::EndpointSlice, "default", "kubernetes"));
    assert_eq!(members(&model), at(&[[10, 0, 0, 7]]));
}

#[test]
fn where_no_range_is_given_each_service_is_the_clusters_by_its_address() {
    let service = |name: &str, address: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: \
             kube-system}}\nspec: {{clusterIP: {address}, ports: [{{port: 53}}]}}\n"
        )
    };
    let mut model = model();
    let services = |model: &Model| -> Vec<String> {
        let members = model.members("cluster/static").unwrap();
        members.services.iter().map(ToString::to_string).collect()
    };
    let mesh = |ranges: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default}}\n\
             spec: {{serviceCidrs: [{ranges}]}}\n"
        )
    };
    load(&mut model, &mesh(""));
    let changes = load(&mut model, &service("kube-dns", "10.96.0.10"));
    assert!(changes.contains(ResourceType::Members, "cluster/static"));
    assert_eq!(services(&model), ["10.96.0.10/32"]);
    let changes = load(&mut model, &service("kube-dns", "10.96.0.11"));
    assert!(changes.contains(ResourceType::Members, "cluster/static"));
    load(&mut model, &service("headless", "None"));
    assert_eq!(services(&model), ["10.96.0.11/32"]);

    load(&mut model, &mesh("10.96.0.0/16"));
    assert_eq!(
        services(&model),
        ["10.96.0.0/16"],
        "what is given holds alone"
    );
    let changes = load(&mut model, &service("kube-dns", "10.96.0.12"));
    assert!(!changes.contains(ResourceType::Members, "cluster/static"));
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

const ROUTES: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: split, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web, port: 80}]
  rules:
  - backendRefs: [{name: web, port: 80, weight: 9}, {name: canary, port: 80, weight: 1}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: own, namespace: bank}
spec:
  parentRefs: [{group: '', kind: Service, name: web, namespace: shop}]
  rules:
  - timeouts: {request: 1s}
    backendRefs: [{name: web, namespace: shop, port: 80}]
---
";

#[test]
fn routes_of_a_consumer_hold_for_it_alone() {
    let model = world(ROUTES);
    let routes = |name: &str, port: usize| {
        let service = model.service(name).unwrap();
        let table = &service.ports[port].routes.routes;
        table
            .iter()
            .map(|route| route.name.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        routes("cluster/shop/web", 0),
        ["HTTPRoute shop/split rule 0"]
    );
    assert!(
        routes("cluster/shop/web", 1).is_empty(),
        "attached to one port"
    );
    assert_eq!(
        routes("cluster/shop/web@shop", 0),
        ["HTTPRoute shop/split rule 0"]
    );
    assert_eq!(
        routes("cluster/shop/web@bank", 0),
        ["HTTPRoute bank/own rule 0"]
    );
    let plain = model.service("cluster/shop/web@elsewhere").unwrap();
    assert_eq!(plain, model.service("cluster/shop/web").unwrap());
    let weights: Vec<u32> = plain.ports[0].routes.routes[0]
        .backends
        .iter()
        .map(|backend| backend.weight)
        .collect();
    assert_eq!(weights, [9, 1]);
    assert!(
        model
            .names(ResourceType::Service)
            .contains(&"cluster/shop/web@bank".into())
    );
}

fn problems(model: &Model, object: &str) -> Vec<(&'static str, String)> {
    let statuses = model
        .statuses()
        .into_iter()
        .filter(|s| s.object.to_string() == object);
    let conditions = statuses.flat_map(|status| status.conditions);
    let failing = conditions.filter(|condition| !condition.holds);
    failing
        .map(
            |Condition {
                 reason, message, ..
             }| (reason, message),
        )
        .collect()
}

#[test]
fn statuses_say_what_does_not_hold_and_why() {
    let mut model = world(ROUTES);
    let found = problems(&model, "HTTPRoute shop/split");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, "BackendNotFound");
    assert!(found[0].1.contains("shop/canary"), "{found:?}");
    assert!(problems(&model, "HTTPRoute bank/own").is_empty());
    let lost = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: lost, namespace: shop}
spec:
  parentRefs:
  - {group: '', kind: Service, name: nowhere}
  - {group: '', kind: Service, name: web, port: 81}
  rules: [{backendRefs: [{name: web, port: 80}]}]
";
    load(&mut model, lost);
    let found = problems(&model, "HTTPRoute shop/lost");
    let reasons: Vec<_> = found.iter().map(|(reason, _)| *reason).collect();
    assert_eq!(reasons, ["NoMatchingParent", "NoMatchingParent"]);
    assert!(found[1].1.contains("it has: 80 http, 5432 db"), "{found:?}");
}

#[test]
fn of_two_traffic_policies_the_older_holds_and_the_other_is_told() {
    let policy = |name: &str, born: &str, target: &str, attempts: u32| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: TrafficPolicy\n\
             metadata: {{name: {name}, namespace: shop, creationTimestamp: {born}}}\n\
             spec: {{targetRefs: [{{kind: Service, name: {target}}}], \
             retry: {{attempts: {attempts}}}}}\n---\n"
        )
    };
    let newer = policy("a", "'2026-02-01T00:00:00Z'", "web", 1);
    let older = policy("b", "'2026-01-01T00:00:00Z'", "web", 7);
    let mut model = world(&format!("{newer}{older}"));
    assert_eq!(web(&model).traffic.retry.attempts, 7);
    let found = problems(&model, "TrafficPolicy shop/a");
    assert_eq!(found[0].0, "Conflicted");
    assert!(found[0].1.contains("`shop/b` is older"), "{found:?}");
    assert!(problems(&model, "TrafficPolicy shop/b").is_empty());
    model.delete(&common::key(Kind::TrafficPolicy, "shop", "b"));
    assert_eq!(web(&model).traffic.retry.attempts, 1);
    assert!(problems(&model, "TrafficPolicy shop/a").is_empty());
    load(&mut model, &policy("c", "null", "nowhere", 1));
    assert_eq!(
        problems(&model, "TrafficPolicy shop/c")[0].0,
        "TargetNotFound"
    );
}

#[test]
fn of_policies_that_exclude_each_other_those_overruled_are_told() {
    let peer = |name: &str, selector: &str, mode: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: PeerAuthentication\n\
             metadata: {{name: {name}, namespace: shop}}\n\
             spec: {{{selector} mtls: {{mode: {mode}}}}}\n---\n"
        )
    };
    let web = "selector: {matchLabels: {app: web}},";
    let all = [
        peer("a-wide", "", "STRICT"),
        peer("b-wide", "", "PERMISSIVE"),
        peer("c-web", web, "STRICT"),
        // Other words, the same pods.
        peer(
            "d-web",
            "selector: {matchExpressions: [{key: app, operator: In, values: [web, cart]}]},",
            "PERMISSIVE",
        ),
        peer(
            "e-none",
            "selector: {matchLabels: {app: nobody}},",
            "STRICT",
        ),
    ];
    let mut model = world(&all.concat());
    let conflict = |model: &Model, name: &str| {
        let found = problems(model, &format!("PeerAuthentication shop/{name}"));
        found.into_iter().next()
    };
    for holding in ["a-wide", "c-web", "e-none"] {
        assert_eq!(conflict(&model, holding), None, "{holding}");
    }
    for (overruled, holding) in [("b-wide", "shop/a-wide"), ("d-web", "shop/c-web")] {
        let (reason, message) = conflict(&model, overruled).unwrap();
        assert_eq!(reason, "Conflicted");
        assert!(message.contains(holding), "{message}");
        // Neither says when it was made.
        assert!(message.contains("comes first by its name"), "{message}");
    }
    model.delete(&common::key(Kind::PeerAuthentication, "shop", "c-web"));
    assert_eq!(conflict(&model, "d-web"), None);
}

#[test]
fn what_is_invalid_keeps_what_was_in_force() {
    let policy = |port: u16| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: EgressPolicy\n\
             metadata: {{name: web, namespace: shop}}\nspec: {{allow: [{{cidrs: [192.0.2.0/24], \
             ports: [{{port: {port}, protocol: TCP}}]}}]}}\n"
        )
    };
    let mut model = world(&policy(443));
    let before = model.pod_egress("cluster/shop/web-1");
    assert!(load(&mut model, &policy(0)).is_empty());
    assert_eq!(model.pod_egress("cluster/shop/web-1"), before);
    assert_eq!(problems(&model, "EgressPolicy shop/web")[0].0, "Invalid");
    load(&mut model, &policy(443));
    assert!(problems(&model, "EgressPolicy shop/web").is_empty());
}
