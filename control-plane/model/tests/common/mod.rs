//! Worlds of objects for tests.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use turnpike_api::{Kind, Object, ObjectKey};
use turnpike_model::{Changes, Model, ResourceType, Settings};

pub fn model() -> Model {
    Model::new(Settings {
        cluster: "cluster".into(),
        trust_domain: "cluster.local".into(),
        network: "default".into(),
    })
}

pub fn object(kind: Kind, value: Value) -> Object {
    Object::deserialize(kind, value).unwrap()
}

/// Objects from YAML documents, their kinds as they say.
#[allow(dead_code, reason = "not every test file writes YAML")]
pub fn objects(yaml: &str) -> Vec<Object> {
    let documents = yaml
        .split("\n---\n")
        .filter(|document| !document.trim().is_empty());
    documents
        .map(|document| {
            let value: Value = serde_saphyr::from_str(document).unwrap();
            let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
            let kind = Kind::parse(&text("apiVersion"), &text("kind"));
            object(kind.unwrap_or_else(|| panic!("no kind: {document}")), value)
        })
        .collect()
}

#[allow(dead_code, reason = "not every test file writes YAML")]
pub fn load(model: &mut Model, yaml: &str) -> Changes {
    let mut changes = Changes::default();
    for object in objects(yaml) {
        changes.merge(model.apply(object));
    }
    changes
}

pub fn key(kind: Kind, namespace: &str, name: &str) -> ObjectKey {
    ObjectKey::new(kind, namespace, name)
}

/// A resource in a form that can be compared, and read when it differs.
pub fn resource(model: &Model, kind: ResourceType, name: &str) -> Option<String> {
    Some(match kind {
        ResourceType::SelfConfig => format!("{:#?}", model.self_config(name)?),
        ResourceType::Address => format!("{:#?}", model.destination(name)?),
        ResourceType::Service => format!("{:#?}", model.service(name)?),
        ResourceType::Endpoints => format!("{:#?}", model.endpoints(name)?),
        ResourceType::PodNetwork => {
            format!("{:#?} {:?}", model.pod_network(name)?, model.node_of(name))
        }
        ResourceType::PodEgress => format!("{:#?}", model.pod_egress(name)?),
        ResourceType::Members => format!("{:#?}", model.members(name)?),
    })
}

pub type World = BTreeMap<(ResourceType, String), String>;

pub fn everything(model: &Model) -> World {
    let mut world = World::new();
    for kind in ResourceType::ALL {
        for name in model.names(kind) {
            let content = resource(model, kind, &name);
            let content = content.unwrap_or_else(|| panic!("{kind} {name} is listed, not there"));
            world.insert((kind, name.to_string()), content);
        }
    }
    world
}

/// What a subscriber to everything would hold after being told of `changes` alone. A consumer's
/// view that is the plain Service's is none.
pub fn follow(model: &Model, world: &mut World, changes: &Changes) {
    for (kind, name) in changes.iter() {
        let view = name.contains('@');
        let content = resource(model, kind, name)
            .filter(|_| !view || model.service(name).is_some_and(|s| s.consumer.is_some()));
        match content {
            Some(content) => world.insert((kind, name.to_string()), content),
            None => world.remove(&(kind, name.to_string())),
        };
    }
}

/// A pod with the fields that the model reads.
#[derive(Clone, Debug)]
pub struct PodSpec {
    pub namespace: &'static str,
    pub name: String,
    pub uid: String,
    pub labels: Value,
    pub node: Option<String>,
    pub address: Option<String>,
    pub ready: bool,
    pub terminating: bool,
    pub meshed: bool,
    pub host_network: bool,
    pub phase: &'static str,
    pub zone: Option<&'static str>,
    pub port: u16,
}

impl PodSpec {
    pub fn new(namespace: &'static str, name: &str, app: &str, address: &str) -> Self {
        Self {
            namespace,
            name: name.into(),
            uid: format!("uid-{namespace}-{name}"),
            labels: json!({ "app": app }),
            node: Some("node-a".into()),
            address: Some(address.into()),
            ready: true,
            terminating: false,
            meshed: true,
            host_network: false,
            phase: "Running",
            zone: None,
            port: 8080,
        }
    }

    pub fn object(&self) -> Object {
        let init = if self.meshed {
            json!([{"name": "turnpike-proxy", "restartPolicy": "Always"}])
        } else {
            json!([])
        };
        let mut metadata = json!({
            "name": self.name, "namespace": self.namespace, "uid": self.uid, "labels": self.labels,
        });
        if self.terminating {
            metadata["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        if let Some(zone) = self.zone {
            metadata["annotations"] = json!({"topology.kubernetes.io/zone": zone});
        }
        let ready = if self.ready { "True" } else { "False" };
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {
                "nodeName": self.node,
                "serviceAccountName": "web",
                "hostNetwork": self.host_network,
                "initContainers": init,
                "containers": [{
                    "name": "app",
                    "ports": [{"name": "web", "containerPort": self.port}],
                    "readinessProbe": {"httpGet": {"port": "web"}},
                }],
            },
            "status": {
                "phase": self.phase,
                "podIP": self.address,
                "conditions": [{"type": "Ready", "status": ready}],
            },
        });
        object(Kind::Pod, pod)
    }
}
