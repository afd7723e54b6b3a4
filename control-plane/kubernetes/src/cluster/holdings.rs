//! What of one kind is in force.
//!
//! Pure: objects as the API server sends them go in, events come out. A bad object is quarantined
//! alone and leaves the last good version of itself in force; what a new list no longer has is
//! deleted once the list is whole.

use std::{
    collections::{HashMap, HashSet},
    mem,
};

use kube::core::DynamicObject;
use serde_json::Value;
use turnpike_api::{Kind, ObjectKey};

use super::{store::Judged, trim::trim};
use crate::{
    Event, Rejection, path,
    reading::{self, Origin, Problem},
};

#[derive(Debug)]
pub(super) struct Holdings {
    kind: Kind,
    known: HashMap<ObjectKey, Known>,
    /// What the list that is being received has so far; `None` between lists.
    listed: Option<HashSet<ObjectKey>>,
}

#[derive(Debug, Default)]
struct Known {
    /// Two objects that had one name after another are not versions of each other.
    uid: Option<String>,
    in_force: bool,
    rejections: Vec<Rejection>,
}

impl Holdings {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            kind,
            known: HashMap::new(),
            listed: None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// A list begins; one that was not finished counts for nothing.
    pub(super) fn begin_list(&mut self) {
        self.listed = Some(HashSet::new());
    }

    /// The list is whole: what it does not have is gone.
    pub(super) fn end_list(&mut self) -> Vec<Event> {
        let Some(listed) = self.listed.take() else {
            return Vec::new();
        };
        let known = self.known.keys();
        let gone: Vec<_> = known
            .filter(|key| !listed.contains(*key))
            .cloned()
            .collect();
        gone.iter().flat_map(|key| self.forget(key)).collect()
    }

    /// All of the kind is gone.
    pub(super) fn clear(&mut self) -> Vec<Event> {
        let known: Vec<_> = self.known.keys().cloned().collect();
        known.iter().flat_map(|key| self.forget(key)).collect()
    }

    pub(super) fn remove(&mut self, object: &DynamicObject) -> (ObjectKey, Vec<Event>) {
        let key = self.key(object);
        let events = self.forget(&key);
        (key, events)
    }

    /// A new object, a changed one, or one as it was.
    pub(super) fn take(&mut self, mut object: DynamicObject) -> (Judged, Vec<Event>) {
        let key = self.key(&object);
        let path = api_path(self.kind, &key);
        let status = object.data.get("status").cloned();
        let parents = object
            .data
            .pointer("/spec/parentRefs")
            .and_then(Value::as_array)
            .cloned();
        trim(self.kind, &mut object);
        if let Some(listed) = &mut self.listed {
            listed.insert(key.clone());
        }
        let uid = object.metadata.uid.clone();
        let mut events = match self.known.get(&key) {
            Some(known) if known.uid != uid => self.forget(&key),
            _ => Vec::new(),
        };
        let metadata = object.metadata.clone();
        let result = read(self.kind, object);
        let known = self.known.entry(key.clone()).or_default();
        known.uid = uid;
        let rejections = match &result {
            Ok(_) => Vec::new(),
            Err(problems) => reject(&path, &key, problems, known.in_force),
        };
        let mended = mem::replace(&mut known.rejections, rejections.clone());
        let refused = (!rejections.is_empty()).then(|| message(&rejections));
        if mended != rejections {
            events.extend(mended.into_iter().map(Event::Resolved));
            events.extend(rejections.into_iter().map(Event::Rejected));
        }
        let judged = Judged {
            key,
            metadata,
            status,
            parents: parents.unwrap_or_default(),
            refused,
            object: result.ok(),
        };
        if let Some(object) = &judged.object {
            known.in_force = true;
            events.push(Event::Applied(object.clone()));
        }
        (judged, events)
    }

    fn forget(&mut self, key: &ObjectKey) -> Vec<Event> {
        let Some(known) = self.known.remove(key) else {
            return Vec::new();
        };
        let deleted = known.in_force.then(|| Event::Deleted(key.clone()));
        let resolved = known.rejections.into_iter().map(Event::Resolved);
        deleted.into_iter().chain(resolved).collect()
    }

    fn key(&self, object: &DynamicObject) -> ObjectKey {
        let metadata = &object.metadata;
        ObjectKey::new(
            self.kind,
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.name.as_deref().unwrap_or_default(),
        )
    }
}

fn read(kind: Kind, object: DynamicObject) -> Result<turnpike_api::Object, Vec<Problem>> {
    let whole = |error: serde_json::Error| {
        vec![Problem {
            path: Vec::new(),
            text: error.to_string(),
        }]
    };
    let DynamicObject {
        types: _,
        metadata,
        data,
    } = object;
    let mut value = match data {
        Value::Object(map) => map,
        _ => serde_json::Map::new(),
    };
    let metadata = serde_json::to_value(metadata).map_err(whole)?;
    value.insert("metadata".to_owned(), metadata);
    reading::read(kind, &Value::Object(value), Origin::ApiServer)
}

fn reject(path: &str, key: &ObjectKey, problems: &[Problem], in_force: bool) -> Vec<Rejection> {
    let stays = if in_force {
        "its last good version stays in force"
    } else {
        "nothing of it is in force"
    };
    let rejections = problems
        .iter()
        .map(|Problem { path: field, text }| Rejection {
            file: path.to_owned(),
            line: None,
            object: Some(key.clone()),
            field: Some(path::field(field)).filter(|field| !field.is_empty()),
            message: format!("{text} ({stays})"),
        });
    rejections.collect()
}

/// For the object's status: fields and messages.
fn message(rejections: &[Rejection]) -> String {
    let texts = rejections.iter().map(|rejection| match &rejection.field {
        Some(field) => format!("{field}: {}", rejection.message),
        None => rejection.message.clone(),
    });
    texts.collect::<Vec<_>>().join("; ")
}

/// `/apis/turnpike.dev/v1alpha1/namespaces/shop/egresspolicies/payments`.
pub(super) fn api_path(kind: Kind, key: &ObjectKey) -> String {
    let resource = kind.resource();
    let root = match &*resource.group {
        "" => "/api",
        _ => "/apis",
    };
    let namespace = match &*key.namespace {
        "" => String::new(),
        namespace => format!("namespaces/{namespace}/"),
    };
    format!(
        "{root}/{}/{namespace}{}/{}",
        resource.api_version, resource.plural, key.name
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn policy(name: &str, uid: &str, port: u32) -> DynamicObject {
        let object = json!({
            "metadata": {"name": name, "namespace": "shop", "uid": uid},
            "spec": {"allow": [{
                "hosts": ["a.example"], "ports": [{"port": port, "protocol": "TLS"}],
            }]},
        });
        serde_json::from_value(object).unwrap()
    }

    /// One whose port nobody has.
    fn bad(name: &str, uid: &str) -> DynamicObject {
        policy(name, uid, 70_000)
    }

    fn texts(events: &[Event]) -> Vec<String> {
        let text = |event: &Event| match event {
            Event::Applied(object) => format!("+{}", object.key().name),
            Event::Deleted(key) => format!("-{}", key.name),
            Event::Rejected(rejection) => format!("!{}", rejection.object.as_ref().unwrap().name),
            Event::Resolved(rejection) => format!("~{}", rejection.object.as_ref().unwrap().name),
            other => panic!("{other:?}"),
        };
        events.iter().map(text).collect()
    }

    fn take(all: &mut Holdings, object: DynamicObject) -> Vec<String> {
        texts(&all.take(object).1)
    }

    #[test]
    fn a_bad_version_leaves_the_last_good_one() {
        let mut all = Holdings::new(Kind::EgressPolicy);
        assert_eq!(take(&mut all, policy("a", "1", 443)), ["+a"]);
        let (judged, events) = all.take(bad("a", "1"));
        assert_eq!(texts(&events), ["!a"]);
        let Event::Rejected(rejection) = &events[0] else {
            panic!("{events:?}")
        };
        assert_eq!(
            rejection.to_string(),
            "/apis/turnpike.dev/v1alpha1/namespaces/shop/egresspolicies/a: EgressPolicy shop/a: \
             spec.allow[0].ports[0].port: invalid value: integer `70000`, expected u16 (its last \
             good version stays in force)"
        );
        assert!(
            judged
                .refused
                .unwrap()
                .starts_with("spec.allow[0].ports[0].port: invalid")
        );
        assert!(take(&mut all, bad("a", "1")).is_empty(), "said once");
        assert_eq!(take(&mut all, policy("a", "1", 443)), ["~a", "+a"]);
        assert_eq!(texts(&all.remove(&policy("a", "1", 443)).1), ["-a"]);
    }

    #[test]
    fn another_object_of_the_same_name_is_no_version_of_it() {
        let mut all = Holdings::new(Kind::EgressPolicy);
        take(&mut all, policy("a", "1", 443));
        let (judged, events) = all.take(bad("a", "2"));
        assert_eq!(texts(&events), ["-a", "!a"]);
        assert!(
            judged
                .refused
                .unwrap()
                .ends_with("(nothing of it is in force)")
        );
        assert_eq!(
            texts(&all.remove(&bad("a", "2")).1),
            ["~a"],
            "it never held"
        );
    }

    #[test]
    fn a_list_that_broke_off_deletes_nothing() {
        let mut all = Holdings::new(Kind::EgressPolicy);
        take(&mut all, policy("a", "1", 443));
        take(&mut all, policy("b", "2", 443));
        all.begin_list();
        take(&mut all, policy("b", "2", 443));
        all.begin_list();
        take(&mut all, policy("a", "1", 443));
        take(&mut all, policy("c", "3", 443));
        assert_eq!(texts(&all.end_list()), ["-b"]);
        assert!(all.end_list().is_empty());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take {
            name: u8,
            uid: u8,
            good: bool,
        },
        Remove(u8),
        /// What the server has at that moment, and whether all of it came.
        List {
            names: Vec<(u8, u8, bool)>,
            whole: bool,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        let object = || (0..4u8, 0..2u8, any::<bool>());
        prop_oneof![
            object().prop_map(|(name, uid, good)| Step::Take { name, uid, good }),
            (0..4u8).prop_map(Step::Remove),
            (proptest::collection::vec(object(), 0..4), any::<bool>())
                .prop_map(|(names, whole)| Step::List { names, whole }),
        ]
    }

    proptest! {
        /// Whatever comes in whatever order: what a consumer of the events holds in the end is
        /// each present object in its last good version, and rejections are each withdrawn once.
        #[test]
        fn consumers_hold_what_there_is(steps in proptest::collection::vec(step(), 0..40)) {
            let mut all = Holdings::new(Kind::EgressPolicy);
            let mut held = std::collections::BTreeSet::new();
            let mut rejected = std::collections::BTreeSet::new();
            // Name to UID, and whether a good version of that very object was seen.
            let mut there: std::collections::BTreeMap<u8, (u8, bool, bool)> = Default::default();
            let object = |name: u8, uid: u8, good: bool| {
                let (name, uid) = (format!("p{name}"), uid.to_string());
                if good { policy(&name, &uid, 443) } else { bad(&name, &uid) }
            };
            for step in steps {
                let mut events = Vec::new();
                let mut see = |all: &mut Holdings, name, uid, good, events: &mut Vec<Event>| {
                    let before = there.get(&name).filter(|(known, ..)| *known == uid);
                    let seen_good = good || before.is_some_and(|(_, seen, _)| *seen);
                    there.insert(name, (uid, seen_good, good));
                    events.extend(all.take(object(name, uid, good)).1);
                };
                match step {
                    Step::Take { name, uid, good } => see(&mut all, name, uid, good, &mut events),
                    Step::Remove(name) => {
                        events.extend(all.remove(&object(name, 0, true)).1);
                        there.remove(&name);
                    }
                    Step::List { names, whole } => {
                        all.begin_list();
                        let names: std::collections::BTreeMap<_, _> =
                            names.into_iter().map(|(name, uid, good)| (name, (uid, good))).collect();
                        for (name, (uid, good)) in &names {
                            see(&mut all, *name, *uid, *good, &mut events);
                        }
                        if whole {
                            events.extend(all.end_list());
                            there.retain(|name, _| names.contains_key(name));
                        }
                    }
                }
                for event in events {
                    match event {
                        Event::Applied(object) => { held.insert(object.key().name); }
                        Event::Deleted(key) => prop_assert!(held.remove(&key.name)),
                        Event::Rejected(rejection) => prop_assert!(rejected.insert(rejection)),
                        Event::Resolved(rejection) => prop_assert!(rejected.remove(&rejection)),
                        other => panic!("{other:?}"),
                    }
                }
                let good: Vec<String> = there.iter()
                    .filter(|(_, (_, seen, _))| *seen).map(|(name, _)| format!("p{name}")).collect();
                let names: Vec<String> = held.iter().map(|name| name.to_string()).collect();
                prop_assert_eq!(names, good);
                let bad: Vec<String> = there.iter()
                    .filter(|(_, (_, _, good))| !good).map(|(name, _)| format!("p{name}")).collect();
                let names: Vec<String> = rejected.iter()
                    .map(|rejection| rejection.object.as_ref().unwrap().name.to_string()).collect();
                prop_assert_eq!(names, bad);
            }
        }
    }
}
