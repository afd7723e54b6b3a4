//! What the source remembers for others than the model: labels of namespaces for injection, what
//! policies and routes say of themselves for their status, and pods that run outside the mesh.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use parking_lot::RwLock;
use serde_json::Value;
use tokio::sync::watch;
use turnpike_api::{Kind, Object, ObjectKey};

use crate::{inject, status::has_status};

/// An object as it came, and what became of it.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) key: ObjectKey,
    pub(super) metadata: ObjectMeta,
    pub(super) status: Option<Value>,
    /// As typed; of routes alone.
    pub(super) parents: Vec<Value>,
    /// Why it is refused.
    pub(super) refused: Option<String>,
    pub(super) object: Option<Object>,
}

/// Clones share what is kept.
#[derive(Clone, Debug, Default)]
pub struct Stores {
    pub namespaces: Namespaces,
    pub policies: PolicyStore,
    pub outsiders: Outsiders,
}

impl Stores {
    pub(super) fn put(&self, judged: &Judged) {
        let Self {
            namespaces,
            policies,
            outsiders,
        } = self;
        match judged.key.kind {
            Kind::Namespace => namespaces.0.set(&judged.key.name, Some(namespace(judged))),
            Kind::Pod => {
                let outsider = judged.object.as_ref().and_then(outsider);
                outsiders.0.set(&judged.key, outsider);
            }
            kind if has_status(kind) => policies.0.set(&judged.key, Some(policy(judged))),
            _ => {}
        }
    }

    pub(super) fn remove(&self, key: &ObjectKey) {
        match key.kind {
            Kind::Namespace => self.namespaces.0.set(&key.name, None),
            Kind::Pod => self.outsiders.0.set(key, None),
            kind if has_status(kind) => self.policies.0.set(key, None),
            _ => {}
        }
    }
}

/// A map that tells when it changes.
#[derive(Debug)]
struct Shared<K, V> {
    map: RwLock<HashMap<K, V>>,
    changed: watch::Sender<()>,
}

impl<K, V> Default for Shared<K, V> {
    fn default() -> Self {
        Self {
            map: RwLock::default(),
            changed: watch::Sender::new(()),
        }
    }
}

impl<K: Clone + Eq + std::hash::Hash, V: Clone + PartialEq> Shared<K, V> {
    fn set(&self, key: &K, value: Option<V>) {
        let mut map = self.map.write();
        let before = map.get(key);
        if before == value.as_ref() {
            return;
        }
        match value {
            Some(value) => map.insert(key.clone(), value),
            None => map.remove(key),
        };
        drop(map);
        self.changed.send_replace(());
    }

    fn get(&self, key: &K) -> Option<V> {
        self.map.read().get(key).cloned()
    }

    fn all(&self) -> Vec<(K, V)> {
        let map = self.map.read();
        map.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

/// The namespaces that there are.
#[derive(Clone, Debug, Default)]
pub struct Namespaces(Arc<Shared<Arc<str>, Namespace>>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    pub labels: Arc<BTreeMap<String, String>>,
    /// It is being deleted: nothing can be made in it.
    pub terminating: bool,
}

impl Namespaces {
    pub fn labels(&self, name: &str) -> Option<Arc<BTreeMap<String, String>>> {
        self.0.get(&name.into()).map(|namespace| namespace.labels)
    }

    /// Those in which something can be made.
    pub fn living(&self) -> Vec<Arc<str>> {
        let all = self.0.all().into_iter();
        all.filter(|(_, namespace)| !namespace.terminating)
            .map(|(name, _)| name)
            .collect()
    }

    /// Wakes when any of them changes.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }
}

fn namespace(judged: &Judged) -> Namespace {
    Namespace {
        labels: Arc::new(judged.metadata.labels.clone().unwrap_or_default()),
        terminating: judged.metadata.deletion_timestamp.is_some(),
    }
}

/// Policies and routes, as far as their status is concerned.
#[derive(Clone, Debug, Default)]
pub struct PolicyStore(Arc<Shared<ObjectKey, Arc<PolicyObject>>>);

#[derive(Clone, Debug, PartialEq)]
pub struct PolicyObject {
    pub uid: String,
    pub generation: Option<i64>,
    pub resource_version: String,
    /// As it stands in the API.
    pub status: Value,
    /// A route's `parentRefs`, as typed.
    pub parents: Vec<Value>,
    /// Why this generation of it is refused.
    pub refused: Option<String>,
}

impl PolicyStore {
    pub fn get(&self, key: &ObjectKey) -> Option<Arc<PolicyObject>> {
        self.0.get(key)
    }

    pub fn all(&self) -> Vec<(ObjectKey, Arc<PolicyObject>)> {
        self.0.all()
    }

    pub fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }
}

fn policy(judged: &Judged) -> Arc<PolicyObject> {
    let metadata = &judged.metadata;
    Arc::new(PolicyObject {
        uid: metadata.uid.clone().unwrap_or_default(),
        generation: metadata.generation,
        resource_version: metadata.resource_version.clone().unwrap_or_default(),
        status: judged.status.clone().unwrap_or_default(),
        parents: judged.parents.clone(),
        refused: judged.refused.clone(),
    })
}

/// Running pods that could have a sidecar and have none.
#[derive(Clone, Debug, Default)]
pub struct Outsiders(Arc<Shared<ObjectKey, Outsider>>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outsider {
    pub uid: String,
    /// Kind and name of what made it.
    pub owner: Option<(String, String)>,
    pub template_hash: Option<String>,
}

impl Outsiders {
    pub fn all(&self) -> Vec<(ObjectKey, Outsider)> {
        self.0.all()
    }

    pub fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }
}

fn outsider(object: &Object) -> Option<Outsider> {
    let Object::Pod(pod) = object else {
        return None;
    };
    let Pod {
        metadata,
        spec,
        status,
    } = &**pod;
    let spec = spec.as_ref()?;
    let phase = status.as_ref().and_then(|status| status.phase.as_deref());
    let over = matches!(phase, Some("Succeeded" | "Failed"));
    let label = |name: &str| metadata.labels.as_ref().and_then(|labels| labels.get(name));
    let opted_out = label(inject::LABEL).is_some_and(|value| value == "disabled");
    if over || opted_out || metadata.deletion_timestamp.is_some() || !inject::can_be_injected(spec)
    {
        return None;
    }
    let mut containers = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers);
    if containers.any(|container| container.name == inject::CONTAINER) {
        return None;
    }
    let owners = metadata.owner_references.iter().flatten();
    let owner = owners.clone().find(|owner| owner.controller == Some(true));
    Some(Outsider {
        uid: metadata.uid.clone().unwrap_or_default(),
        owner: owner.map(|owner| (owner.kind.clone(), owner.name.clone())),
        template_hash: label("pod-template-hash").cloned(),
    })
}
