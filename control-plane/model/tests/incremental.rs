//! What the model holds depends on the objects present alone, and every change is announced.
#![allow(clippy::unwrap_used, reason = "what fails here ends the test")]

mod common;

use std::collections::BTreeMap;

use common::{PodSpec, everything, follow, key, model, object};
use proptest::{prelude::*, sample::select};
use serde_json::{Value, json};
use turnpike_api::{Kind, Object, ObjectKey};
use turnpike_model::ResourceType;

const NAMESPACES: [&str; 3] = ["shop", "bank", "turnpike-system"];

fn namespace() -> impl Strategy<Value = &'static str> {
    select(&NAMESPACES[..])
}

fn labels() -> impl Strategy<Value = Value> {
    select(vec![
        json!({}),
        json!({"app": "web"}),
        json!({"app": "api"}),
        json!({"app": "web", "tier": "front"}),
    ])
}

fn selector() -> impl Strategy<Value = Value> {
    select(vec![
        json!({}),
        json!({"matchLabels": {"app": "web"}}),
        json!({"matchLabels": {"app": "web", "tier": "front"}}),
        json!({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}),
    ])
}

fn birth() -> impl Strategy<Value = Value> {
    select(vec![
        json!(null),
        json!("2026-01-01T00:00:00Z"),
        json!("2026-01-02T00:00:00Z"),
    ])
}

fn zone() -> impl Strategy<Value = Option<&'static str>> {
    select(vec![None, None, Some("a"), Some("b")])
}

fn pod() -> impl Strategy<Value = Object> {
    let place = (
        namespace(),
        0..5u8,
        0..3u8,
        labels(),
        select(vec![None, Some("n1"), Some("n2")]),
    );
    let state = (any::<[bool; 4]>(), 0..12u8, zone(), any::<bool>());
    (place, state).prop_map(
        |((namespace, name, uid, labels, node), (flags, ip, zone, odd_port))| {
            let [ready, terminating, meshed, rare] = flags;
            PodSpec {
                uid: format!("u-{namespace}-{name}-{uid}"),
                labels,
                node: node.map(str::to_owned),
                address: (ip > 0).then(|| format!("10.0.0.{ip}")),
                ready,
                terminating,
                meshed,
                host_network: rare && ip % 5 == 0,
                phase: if rare && ip % 5 == 1 {
                    "Succeeded"
                } else {
                    "Running"
                },
                zone,
                port: if odd_port { 9090 } else { 8080 },
                ..PodSpec::new(namespace, &format!("p{name}"), "", "")
            }
            .object()
        },
    )
}

fn service() -> impl Strategy<Value = Object> {
    let ports = select(vec![
        json!([{"port": 80, "targetPort": 8080}]),
        json!([{"name": "http", "port": 80, "targetPort": "web"}]),
        json!([{"name": "http", "port": 80, "targetPort": "web"}, {"name": "x", "port": 81}]),
    ]);
    let fields = (
        namespace(),
        select(vec!["web", "api"]),
        labels(),
        ports,
        0..4u8,
    );
    (fields, birth(), any::<bool>(), any::<bool>()).prop_map(
        |((namespace, name, selector, ports, vip), birth, unready, external)| {
            let vip = if vip == 0 {
                "None".into()
            } else {
                format!("10.96.0.{vip}")
            };
            let kind = if external && vip == "None" {
                "ExternalName"
            } else {
                "ClusterIP"
            };
            object(
                Kind::Service,
                json!({
                    "metadata": {"name": name, "namespace": namespace, "creationTimestamp": birth},
                    "spec": {
                        "type": kind, "clusterIP": vip, "selector": selector, "ports": ports,
                        "publishNotReadyAddresses": unready,
                    },
                }),
            )
        },
    )
}

fn slice() -> impl Strategy<Value = Object> {
    let entry = (
        1..12u8,
        0..5u8,
        any::<[bool; 3]>(),
        zone(),
        select(vec![None, Some("n1")]),
    );
    let entry = entry.prop_map(|(ip, pod, [named, ready, terminating], zone, node)| {
        let mut entry = json!({
            "addresses": [format!("10.0.0.{ip}")],
            "conditions": {"ready": ready, "serving": true, "terminating": terminating},
            "zone": zone,
            "nodeName": node,
        });
        if named {
            entry["targetRef"] = json!({"kind": "Pod", "name": format!("p{pod}")});
        }
        entry
    });
    let fields = (namespace(), 0..3u8, select(vec!["web", "api", "absent"]));
    (
        fields,
        proptest::collection::vec(entry, 0..4),
        select(vec!["", "http"]),
    )
        .prop_map(|((namespace, name, service), endpoints, port)| {
            object(
                Kind::EndpointSlice,
                json!({
                    "metadata": {
                        "name": format!("s{name}"), "namespace": namespace,
                        "labels": {"kubernetes.io/service-name": service},
                    },
                    "addressType": "IPv4",
                    "ports": [{"name": port, "port": 8080}],
                    "endpoints": endpoints,
                }),
            )
        })
}

fn route() -> impl Strategy<Value = Object> {
    let port = select(vec![json!(null), json!(80), json!(81)]);
    let fields = (
        namespace(),
        0..2u8,
        namespace(),
        select(vec!["web", "api"]),
        port,
    );
    (fields, birth(), 1..5i32).prop_map(|((namespace, name, of, service, port), birth, weight)| {
        object(
            Kind::HttpRoute,
            json!({
                "metadata": {
                    "name": format!("r{name}"), "namespace": namespace, "creationTimestamp": birth,
                },
                "spec": {
                    "parentRefs": [{
                        "group": "", "kind": "Service", "name": service, "namespace": of,
                        "port": port,
                    }],
                    "rules": [{"backendRefs": [
                        {"name": service, "namespace": of, "port": 80, "weight": weight},
                    ]}],
                },
            }),
        )
    })
}

fn policy() -> impl Strategy<Value = Object> {
    let kind = select(vec![
        Kind::TrafficPolicy,
        Kind::AuthorizationPolicy,
        Kind::PeerAuthentication,
        Kind::Telemetry,
        Kind::EgressPolicy,
        Kind::MeshConfig,
    ]);
    let fields = (namespace(), 0..2u8, selector(), birth(), 1..4u8);
    (kind, fields).prop_map(|(kind, (namespace, name, selector, birth, n))| {
        let flip = n % 2 == 0;
        let mode = if flip { "STRICT" } else { "PERMISSIVE" };
        let spec = match kind {
            Kind::TrafficPolicy => json!({
                "targetRefs": [{"kind": "Service", "name": if flip { "web" } else { "api" }}],
                "retry": {"attempts": n},
            }),
            Kind::AuthorizationPolicy => json!({
                "selector": selector, "action": if flip { "ALLOW" } else { "DENY" },
                "rules": [{"to": [{"operation": {"ports": [n]}}]}],
            }),
            Kind::PeerAuthentication if selector == json!({}) => json!({"mtls": {"mode": mode}}),
            Kind::PeerAuthentication => json!({
                "selector": selector, "mtls": {"mode": mode},
                "portLevelMtls": {"8080": {"mode": mode}},
            }),
            Kind::Telemetry => json!({"selector": selector, "accessLog": flip}),
            Kind::EgressPolicy => json!({
                "selector": selector,
                "allow": [{"cidrs": ["192.0.2.0/24"], "ports": [{"port": n, "protocol": "TCP"}]}],
                "inbound": [{"ports": [{"port": n}]}],
            }),
            _ => json!({"meshPrefixes": [format!("10.{n}.0.0/16")], "mtls": {"mode": mode}}),
        };
        let mut metadata = json!({"name": format!("x{name}"), "creationTimestamp": birth});
        match kind {
            Kind::MeshConfig => metadata["name"] = json!("default"),
            _ => metadata["namespace"] = json!(namespace),
        }
        let mut value = json!({"metadata": metadata, "spec": spec});
        value["apiVersion"] = json!(kind.api_version());
        value["kind"] = json!(kind.as_str());
        object(kind, value)
    })
}

#[derive(Clone, Debug)]
enum Step {
    Apply(Box<Object>),
    /// Of what is there, the one at this place.
    Delete(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    let object = prop_oneof![
        5 => pod(), 2 => service(), 2 => slice(), 1 => route(), 2 => policy(),
    ];
    prop_oneof![
        4 => object.prop_map(|object| Step::Apply(Box::new(object))),
        1 => any::<prop::sample::Index>().prop_map(Step::Delete),
    ]
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_history_leads_to_the_same_model_and_every_change_is_announced(
        steps in proptest::collection::vec(step(), 1..60),
        order in any::<u64>(),
    ) {
        let mut present: BTreeMap<ObjectKey, Object> = BTreeMap::new();
        let mut incremental = model();
        let mut told = everything(&incremental);
        for step in steps {
            let changes = match step {
                Step::Apply(object) => {
                    present.insert(object.key(), (*object).clone());
                    incremental.apply(*object)
                }
                Step::Delete(_) if present.is_empty() => continue,
                Step::Delete(index) => {
                    let key = index.get(&present.keys().cloned().collect::<Vec<_>>()).clone();
                    present.remove(&key);
                    incremental.delete(&key)
                }
            };
            follow(&incremental, &mut told, &changes);
            prop_assert_eq!(&told, &everything(&incremental), "a change was not announced");
        }
        let mut objects: Vec<&Object> = present.values().collect();
        objects.sort_by_key(|object| shuffled(&object.key().to_string(), order));
        let mut fresh = model();
        for object in objects {
            fresh.apply(object.clone());
        }
        prop_assert_eq!(everything(&incremental), everything(&fresh), "history matters");
        prop_assert_eq!(incremental.statuses(), fresh.statuses());
    }
}

fn shuffled(key: &str, order: u64) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (key, order).hash(&mut hasher);
    hasher.finish()
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 384,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// 10,000 Services and pods: what one of them touches does not depend on the others.
#[test]
fn one_pod_touches_a_handful_of_ten_thousand() {
    let mut model = model();
    let mesh = json!({
        "metadata": {"name": "default"}, "spec": {"serviceCidrs": ["10.96.0.0/16"]},
    });
    model.apply(object(Kind::MeshConfig, mesh));
    for n in 0..10_000u32 {
        let app = format!("app-{n}");
        let service = json!({
            "metadata": {"name": app, "namespace": "shop"},
            "spec": {
                "clusterIP": format!("10.96.{}.{}", n / 250, n % 250 + 1),
                "selector": {"app": app}, "ports": [{"port": 80, "targetPort": 8080}],
            },
        });
        model.apply(object(Kind::Service, service));
        let address = format!("10.1.{}.{}", n / 250, n % 250 + 1);
        let mut pod = PodSpec::new("shop", &app, &app, &address);
        pod.node = Some(format!("node-{}", n / 50));
        model.apply(pod.object());
    }
    let mut pod = PodSpec::new("shop", "app-77", "app-77", "10.1.0.78");
    pod.node = Some("node-1".into());
    assert!(
        model.apply(pod.object()).is_empty(),
        "the same again changes nothing"
    );
    pod.ready = false;
    let changes = model.apply(pod.object());
    let names: Vec<String> = changes
        .iter()
        .map(|(kind, name)| format!("{kind} {name}"))
        .collect();
    assert_eq!(
        names,
        [
            "Self uid-shop-app-77",
            "Address default/10.1.0.78",
            "Service cluster/shop/app-77",
            "Endpoints cluster/shop/app-77/80-8080",
            "PodNetwork cluster/shop/app-77",
            "PodEgress cluster/shop/app-77",
        ]
    );
    let changes = model.delete(&key(Kind::Pod, "shop", "app-78"));
    assert!(changes.contains(ResourceType::Members, "cluster/node-1"));
    assert_eq!(changes.len(), 7);
    let changes = model.delete(&key(Kind::Service, "shop", "app-79"));
    assert_eq!(changes.len(), 5, "{changes:?}");
}
