//! What is said on an object about itself.
//!
//! Pure: what should be said and what stands there go in, the status to write comes out, or none
//! where it says so already. [`write()`] sends it, against the very version that it was made for:
//! one who changed the object or its status meanwhile is never overwritten.

use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::DynamicObject,
};
use serde_json::{Map, Value, json};
use turnpike_api::{Kind, ObjectKey};

use crate::cluster::PolicyObject;

/// Under this name we write into the status of routes, and nothing else there is ours.
pub const CONTROLLER: &str = "turnpike.dev/controller";
const MANAGER: &str = "turnpike-controller";
/// The API takes 32 KiB.
const MAX_MESSAGE: usize = 8192;

/// What should be said of an object's generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Policy {
        conditions: Vec<Said>,
        /// `3/4`.
        proxies: String,
    },
    /// Of each parent that is a Service, as typed.
    Route(Vec<(Value, Vec<Said>)>),
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub kind: &'static str,
    pub holds: bool,
    /// One word.
    pub reason: String,
    pub message: String,
}

impl Verdict {
    /// The status that says so; `None`: what stands there does. A condition that holds as before
    /// keeps the time since which it does.
    pub fn status(&self, object: &PolicyObject, now: &str) -> Option<Value> {
        let status = match self {
            Self::Policy {
                conditions,
                proxies,
            } => policy(conditions, proxies, object, now),
            Self::Route(parents) => route(parents, object, now),
        };
        (status != object.status).then_some(status)
    }
}

fn policy(said: &[Said], proxies: &str, object: &PolicyObject, now: &str) -> Value {
    let mut status = match &object.status {
        Value::Object(status) => status.clone(),
        _ => Map::new(),
    };
    let before = stood(object, None);
    // Conditions of others stay where they are.
    let others = before.iter().filter(|condition| {
        let kind = condition.get("type").and_then(Value::as_str);
        said.iter().all(|said| Some(said.kind) != kind)
    });
    let ours = said
        .iter()
        .map(|said| said.condition(before, object.generation, now));
    let conditions: Vec<Value> = ours.chain(others.cloned()).collect();
    status.insert("conditions".to_owned(), conditions.into());
    status.insert("proxies".to_owned(), proxies.into());
    if let Some(generation) = object.generation {
        status.insert("observedGeneration".to_owned(), generation.into());
    }
    Value::Object(status)
}

fn route(parents: &[(Value, Vec<Said>)], object: &PolicyObject, now: &str) -> Value {
    let before = list(object.status.get("parents"));
    let of_others = before.iter().filter(|entry| !is_ours(entry)).cloned();
    let ours = parents.iter().map(|(parent, said)| {
        let stood = stood(object, Some(parent));
        let conditions = said
            .iter()
            .map(|said| said.condition(stood, object.generation, now));
        json!({
            "parentRef": parent,
            "controllerName": CONTROLLER,
            "conditions": conditions.collect::<Vec<_>>(),
        })
    });
    let all: Vec<Value> = of_others.chain(ours).collect();
    if all.is_empty() && before.is_empty() {
        // Nothing to say, and nothing said.
        return object.status.clone();
    }
    let mut status = match &object.status {
        Value::Object(status) => status.clone(),
        _ => Map::new(),
    };
    status.insert("parents".to_owned(), all.into());
    Value::Object(status)
}

impl Said {
    fn condition(&self, before: &[Value], generation: Option<i64>, now: &str) -> Value {
        let status = if self.holds { "True" } else { "False" };
        let stood = before
            .iter()
            .find(|condition| condition["type"] == self.kind);
        let since = stood
            .filter(|condition| condition["status"] == status)
            .and_then(|condition| condition["lastTransitionTime"].as_str());
        let message: String = self.message.chars().take(MAX_MESSAGE).collect();
        let mut condition = json!({
            "type": self.kind,
            "status": status,
            "reason": self.reason,
            "message": message,
            "lastTransitionTime": since.unwrap_or(now),
        });
        if let Some(generation) = generation {
            condition["observedGeneration"] = generation.into();
        }
        condition
    }
}

/// The conditions that stand on an object; of a route, those that we set on one of its parents.
pub fn stood<'a>(object: &'a PolicyObject, parent: Option<&Value>) -> &'a [Value] {
    let on = match parent {
        None => Some(&object.status),
        Some(parent) => list(object.status.get("parents"))
            .iter()
            .find(|entry| is_ours(entry) && entry["parentRef"] == *parent),
    };
    list(on.and_then(|on| on.get("conditions")))
}

fn is_ours(entry: &Value) -> bool {
    entry.get("controllerName").and_then(Value::as_str) == Some(CONTROLLER)
}

fn list(value: Option<&Value>) -> &[Value] {
    let list = value.and_then(Value::as_array);
    list.map(Vec::as_slice).unwrap_or_default()
}

/// Writes a status that was made for this version of the object. A conflict says that there is a
/// newer one, which comes by the watch and is judged anew.
pub async fn write(
    client: &Client,
    key: &ObjectKey,
    object: &PolicyObject,
    status: &Value,
) -> Result<(), kube::Error> {
    let resource = key.kind.resource();
    let api: Api<DynamicObject> = match &*key.namespace {
        "" => Api::all_with(client.clone(), &resource),
        namespace => Api::namespaced_with(client.clone(), namespace, &resource),
    };
    let patch = json!({
        "metadata": {"uid": object.uid, "resourceVersion": object.resource_version},
        "status": status,
    });
    let params = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    api.patch_status(&key.name, &params, &Patch::Merge(patch))
        .await
        .map(drop)
}

/// Whether the parent of a route is a Service, and which one: `namespace/name`.
pub fn service_parent(parent: &Value, namespace: &str) -> Option<String> {
    let text = |field: &str| parent.get(field).and_then(Value::as_str);
    let group = text("group").unwrap_or("gateway.networking.k8s.io");
    let is_service = matches!(group, "" | "core") && text("kind") == Some("Service");
    let name = text("name").filter(|_| is_service)?;
    Some(format!("{}/{name}", text("namespace").unwrap_or(namespace)))
}

/// Whether a status is written on its objects.
pub fn has_status(kind: Kind) -> bool {
    !kind.is_kubernetes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn object(generation: i64, status: Value) -> PolicyObject {
        PolicyObject {
            uid: "u".into(),
            generation: Some(generation),
            resource_version: "7".into(),
            status,
            parents: Vec::new(),
            refused: None,
        }
    }

    fn said(kind: &'static str, holds: bool) -> Said {
        Said {
            kind,
            holds,
            reason: "Reason".into(),
            message: "in words".into(),
        }
    }

    fn verdict(accepted: bool, programmed: bool) -> Verdict {
        Verdict::Policy {
            conditions: vec![said("Accepted", accepted), said("Programmed", programmed)],
            proxies: "1/2".into(),
        }
    }

    #[test]
    fn what_stands_there_is_not_written_again() {
        let first = verdict(true, false)
            .status(&object(1, Value::Null), "T1")
            .unwrap();
        assert_eq!(first["observedGeneration"], 1);
        assert_eq!(first["proxies"], "1/2");
        assert_eq!(
            verdict(true, false).status(&object(1, first.clone()), "T2"),
            None
        );

        let second = verdict(true, true)
            .status(&object(1, first.clone()), "T2")
            .unwrap();
        let times: Vec<_> = list(second.get("conditions"))
            .iter()
            .map(|condition| condition["lastTransitionTime"].clone())
            .collect();
        assert_eq!(times, ["T1", "T2"], "what holds as before holds since then");

        let third = verdict(true, true)
            .status(&object(2, second), "T3")
            .unwrap();
        assert_eq!(third["conditions"][1]["observedGeneration"], 2);
        assert_eq!(third["conditions"][1]["lastTransitionTime"], "T2");
    }

    #[test]
    fn entries_of_other_controllers_are_never_touched() {
        let other = json!({
            "parentRef": {"name": "gateway"}, "controllerName": "example.com/gateways",
            "conditions": [{"type": "Accepted", "status": "True", "reason": "Accepted",
                "message": "", "lastTransitionTime": "T0"}],
        });
        let service = json!({"group": "", "kind": "Service", "name": "web"});
        let route = |parents: Vec<Value>| {
            Verdict::Route(
                parents
                    .into_iter()
                    .map(|p| (p, vec![said("Accepted", true)]))
                    .collect(),
            )
        };
        let before = json!({"parents": [other]});
        assert_eq!(route(vec![]).status(&object(1, before.clone()), "T1"), None);
        assert_eq!(route(vec![]).status(&object(1, Value::Null), "T1"), None);

        let with = route(vec![service.clone()])
            .status(&object(1, before.clone()), "T1")
            .unwrap();
        assert_eq!(with["parents"][0], other);
        assert_eq!(with["parents"][1]["controllerName"], CONTROLLER);
        assert_eq!(with["parents"][1]["parentRef"], service);
        let without = route(vec![]).status(&object(2, with), "T2").unwrap();
        assert_eq!(without, before, "ours goes with the parent");
    }

    #[test]
    fn services_are_told_from_other_parents() {
        let parent = |value: Value| service_parent(&value, "shop");
        let web = json!({"group": "", "kind": "Service", "name": "web"});
        assert_eq!(parent(web).as_deref(), Some("shop/web"));
        let other = json!({"group": "", "kind": "Service", "name": "web", "namespace": "bank"});
        assert_eq!(parent(other).as_deref(), Some("bank/web"));
        assert_eq!(parent(json!({"name": "gateway"})), None);
        assert_eq!(
            parent(json!({"group": "", "kind": "Pod", "name": "a"})),
            None
        );
    }

    proptest! {
        /// Whatever was there: written once, it stands; others' conditions stay.
        #[test]
        fn a_status_settles(
            verdicts in proptest::collection::vec((any::<bool>(), any::<bool>(), 1..3i64), 1..8),
        ) {
            let other = json!({"type": "Theirs", "status": "Unknown", "lastTransitionTime": "T0"});
            let mut status = json!({"conditions": [other]});
            for (n, (accepted, programmed, generation)) in verdicts.into_iter().enumerate() {
                let verdict = verdict(accepted, programmed);
                let now = format!("T{n}");
                if let Some(new) = verdict.status(&object(generation, status.clone()), &now) {
                    status = new;
                }
                prop_assert_eq!(verdict.status(&object(generation, status.clone()), "later"), None);
                prop_assert!(list(status.get("conditions")).contains(&other));
            }
        }
    }
}
