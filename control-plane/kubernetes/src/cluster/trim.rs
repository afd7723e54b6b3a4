//! What of an object is kept.
//!
//! The API server sends far more than the model reads: who managed which field, what kubectl last
//! applied, volumes and environments of pods. It is dropped before an object is typed, so that
//! memory follows what matters of the mesh.

use kube::core::DynamicObject;
use serde_json::{Map, Value};
use turnpike_api::Kind;

/// Of a pod's annotations; what the model reads as its zone.
const ZONE: &str = "topology.kubernetes.io/zone";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Of a pod, what `facts/pod.rs` of the model reads; a test of the model's views below holds the two
/// together.
const POD_SPEC: [&str; 7] = [
    "containers",
    "hostNetwork",
    "initContainers",
    "nodeName",
    "os",
    "securityContext",
    "serviceAccountName",
];
const CONTAINER: [&str; 8] = [
    "lifecycle",
    "livenessProbe",
    "name",
    "ports",
    "readinessProbe",
    "restartPolicy",
    "securityContext",
    "startupProbe",
];
const POD_STATUS: [&str; 4] = ["conditions", "phase", "podIP", "podIPs"];

/// Drops what nothing reads; of our kinds and routes also the status, which is what we write.
pub(super) fn trim(kind: Kind, object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
    if let Some(annotations) = &mut object.metadata.annotations {
        match kind {
            Kind::Pod => annotations.retain(|name, _| name == ZONE),
            _ => {
                annotations.remove(LAST_APPLIED);
            }
        }
    }
    let Some(data) = object.data.as_object_mut() else {
        return;
    };
    if kind == Kind::Pod {
        trim_pod(data);
    } else if !kind.is_kubernetes() {
        data.remove("status");
    }
}

fn trim_pod(data: &mut Map<String, Value>) {
    keep(data, &["spec", "status"]);
    if let Some(spec) = data.get_mut("spec").and_then(Value::as_object_mut) {
        keep(spec, &POD_SPEC);
        for list in ["containers", "initContainers"] {
            let list = spec.get_mut(list).and_then(Value::as_array_mut);
            let containers = list.into_iter().flatten().filter_map(Value::as_object_mut);
            containers.for_each(|container| keep(container, &CONTAINER));
        }
    }
    if let Some(status) = data.get_mut("status").and_then(Value::as_object_mut) {
        keep(status, &POD_STATUS);
    }
}

fn keep(map: &mut Map<String, Value>, fields: &[&str]) {
    map.retain(|field, _| fields.contains(&field.as_str()));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn trimmed(kind: Kind, value: Value) -> Value {
        let mut object: DynamicObject = serde_json::from_value(value).unwrap();
        trim(kind, &mut object);
        serde_json::to_value(object).unwrap()
    }

    #[test]
    fn a_pod_keeps_what_the_model_reads() {
        let pod = json!({
            "metadata": {
                "name": "a", "labels": {"x": "y"}, "annotations": {"big": "text", ZONE: "a"},
                "managedFields": [{"manager": "kubectl"}],
            },
            "spec": {
                "nodeName": "n", "volumes": [{"name": "v"}], "tolerations": [],
                "containers": [{"name": "a", "image": "i", "env": [], "ports": []}],
            },
            "status": {"podIP": "10.0.0.1", "containerStatuses": []},
        });
        assert_eq!(
            trimmed(Kind::Pod, pod),
            json!({
                "metadata": {"name": "a", "labels": {"x": "y"}, "annotations": {ZONE: "a"}},
                "spec": {"nodeName": "n", "containers": [{"name": "a", "ports": []}]},
                "status": {"podIP": "10.0.0.1"},
            })
        );
    }

    /// All views of a pod that uses every field are the same without what is dropped.
    #[test]
    fn the_model_misses_nothing() {
        use turnpike_api::Object;
        use turnpike_model::{Model, Settings};
        let probe = |port: u16| json!({"httpGet": {"port": port}, "periodSeconds": 5});
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "web-5d4-x", "namespace": "shop", "uid": "u1", "generation": 1,
                "labels": {"app": "web", "version": "v2", "pod-template-hash": "5d4"},
                "annotations": {ZONE: "a", "other": "x"}, "managedFields": [],
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet",
                    "name": "web-5d4", "uid": "r", "controller": true}],
            },
            "spec": {
                "nodeName": "node-a", "serviceAccountName": "web", "restartPolicy": "Always",
                "securityContext": {"runAsUser": 1400}, "volumes": [{"name": "v"}],
                "initContainers": [{"name": "turnpike-proxy", "restartPolicy": "Always",
                    "image": "p", "ports": [{"containerPort": 15020}]}],
                "containers": [{
                    "name": "app", "image": "app", "env": [{"name": "A", "value": "b"}],
                    "ports": [{"name": "web", "containerPort": 8080}],
                    "livenessProbe": probe(9000), "readinessProbe": probe(9001),
                    "startupProbe": probe(9002),
                    "lifecycle": {"preStop": {"httpGet": {"port": 9003}}},
                }],
            },
            "status": {
                "phase": "Running", "podIP": "10.0.0.7", "podIPs": [{"ip": "10.0.0.7"}],
                "conditions": [{"type": "Ready", "status": "True"}], "hostIP": "10.0.0.1",
            },
        });
        let service = json!({
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.1", "selector": {"app": "web"},
                "ports": [{"port": 80, "targetPort": "web"}]},
        });
        let views = |pod: Value| {
            let settings = Settings {
                cluster: "cluster".into(),
                trust_domain: "cluster.local".into(),
                network: "default".into(),
            };
            let mut model = Model::new(settings);
            for (kind, value) in [(Kind::Service, service.clone()), (Kind::Pod, pod)] {
                model.apply(Object::deserialize(kind, value).unwrap());
            }
            let own = model.self_config("u1").unwrap();
            assert_eq!(own.probe_ports, [9000, 9001, 9002, 9003]);
            format!(
                "{own:?} {:?} {:?} {:?} {:?}",
                model.destination("default/10.0.0.7").unwrap(),
                model.pod_network("cluster/shop/web-5d4-x").unwrap(),
                model.members("cluster/node-a").unwrap(),
                model.names(turnpike_model::ResourceType::Endpoints),
            )
        };
        assert_eq!(views(trimmed(Kind::Pod, pod.clone())), views(pod));
    }

    #[test]
    fn others_keep_what_they_say() {
        let service = json!({
            "metadata": {"name": "a", "annotations": {LAST_APPLIED: "{}", "mine": "kept"}},
            "spec": {"clusterIP": "10.96.0.1"}, "status": {"loadBalancer": {}},
        });
        let mut kept = service.clone();
        kept["metadata"]["annotations"] = json!({"mine": "kept"});
        assert_eq!(trimmed(Kind::Service, service), kept);
        let route = json!({"metadata": {"name": "a"}, "spec": {}, "status": {"parents": []}});
        let kept = json!({"metadata": {"name": "a"}, "spec": {}});
        assert_eq!(trimmed(Kind::HttpRoute, route), kept);
    }
}
