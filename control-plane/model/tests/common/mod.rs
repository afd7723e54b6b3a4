//! Worlds of objects for tests.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;

use serde_json::{Value, json};
use turnpike_api::{Kind, Object, ObjectKey};
use turnpike_model::{Changes, Model, ResourceType, Settings};

pub(crate) fn model() -> Model {
    Model::new(Settings {
        cluster: "cluster".into(),
        trust_domain: "cluster.local".into(),
        network: "default".into(),
    })
}

pub(crate) fn object(kind: Kind, value: Value) -> Object {
    Object::deserialize(kind, value).unwrap()
}

/// Objects from YAML documents, their kinds as they say.
pub(crate) fn objects(yaml: &str) -> Vec<Object> {
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

pub(crate) fn load(model: &mut Model, yaml: &str) -> Changes {
    let mut changes = Changes::default();
    for object in objects(yaml) {
        changes.merge(model.apply(object));
    }
    changes
}

pub(crate) fn key(kind: Kind, namespace: &str, name: &str) -> ObjectKey {
    ObjectKey::new(kind, namespace, name)
}

/// A resource in a form that can be compared, and read when it differs.
pub(crate) fn resource(model: &Model, kind: ResourceType, name: &str) -> Option<String> {
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

pub(crate) type World = BTreeMap<(ResourceType, String), String>;

pub(crate) fn everything(model: &Model) -> World {
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
pub(crate) fn follow(model: &Model, world: &mut World, changes: &Changes) {
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
pub(crate) struct PodSpec {
    pub(crate) namespace: &'static str,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) labels: Value,
    pub(crate) node: Option<String>,
    pub(crate) address: Option<String>,
    pub(crate) ready: bool,
    pub(crate) terminating: bool,
    pub(crate) meshed: bool,
    pub(crate) host_network: bool,
    pub(crate) phase: &'static str,
    pub(crate) zone: Option<&'static str>,
    pub(crate) port: u16,
}

impl PodSpec {
    pub(crate) fn new(namespace: &'static str, name: &str, app: &str, address: &str) -> Self {
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

    pub(crate) fn object(&self) -> Object {
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
