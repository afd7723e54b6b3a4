//! The verdict on each object.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use serde_json::Value;
use turnpike_api::{
    Kind, Object, ObjectKey,
    status::{ACCEPTED, PROGRAMMED},
};
use turnpike_discovery::{Adoption, Discovery};
use turnpike_kubernetes::{
    cluster::{PolicyObject, PolicyStore},
    status::{Said, Verdict, has_status, service_parent, stood},
};
use turnpike_model::{ConditionKind, Model, ObjectStatus};

const RESOLVED_REFS: &str = "ResolvedRefs";
/// Until a verdict is written: several changes that come together are one.
const SOON: Duration = Duration::from_millis(200);
/// That only the number of proxies is another: pods come and go.
const NUMBERS: Duration = Duration::from_secs(5);
/// That a generation which all had is not with all: while they come back to us, or new ones start.
const SETBACK: Duration = Duration::from_secs(10);
/// Since the controller's start, that a generation is with all: those whom it concerns may not have come back
/// yet (the longest pause between a client's attempts).
const RETURN: Duration = Duration::from_secs(15);

/// Which generation of each object is in the model.
#[derive(Clone, Debug, Default)]
pub(crate) struct Applied {
    generations: Arc<Mutex<HashMap<ObjectKey, Generation>>>,
    version: Arc<AtomicU64>,
}

type Generation = (Option<String>, Option<i64>);

impl Applied {
    pub(crate) fn put(&self, object: &Object) {
        self.changed();
        if has_status(object.kind()) {
            let metadata = object.metadata();
            let generation = (metadata.uid.clone(), metadata.generation);
            self.generations.lock().insert(object.key(), generation);
        }
    }

    pub(crate) fn remove(&self, key: &ObjectKey) {
        self.changed();
        self.generations.lock().remove(key);
    }

    /// Another after each change of the model.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    fn changed(&self) {
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Whether the model speaks of this very generation.
    fn has(&self, key: &ObjectKey, object: &PolicyObject) -> bool {
        let generations = self.generations.lock();
        let known = generations.get(key);
        known.is_some_and(|(uid, generation)| {
            uid.as_deref().unwrap_or_default() == object.uid && *generation == object.generation
        })
    }
}

type Judged = (ObjectKey, Arc<PolicyObject>, Verdict);

/// On every object of which something can be said now.
pub(crate) fn judge(
    policies: &PolicyStore,
    discovery: &Discovery,
    applied: &Applied,
) -> Vec<Judged> {
    let mut found: HashMap<ObjectKey, Vec<ObjectStatus>> = HashMap::new();
    for status in discovery.read(Model::statuses) {
        found.entry(status.object.clone()).or_default().push(status);
    }
    let mut judged = Vec::new();
    for (key, object) in policies.all() {
        let verdict = if let Some(refused) = &object.refused {
            on_refused(&key, &object, "Invalid", refused)
        } else if applied.has(&key, &object) {
            let statuses = found.remove(&key).unwrap_or_default();
            let shaped = discovery.read(|model| model.shaped_by(&key));
            let adoption = discovery.adoption(&shaped);
            on_known(&key, &object, &statuses, &adoption)
        } else {
            // The model is about to take it.
            continue;
        };
        judged.push((key, object, verdict));
    }
    judged
}

/// How long a verdict must last before it is written over what stands there, `up` after the controller's
/// start.
pub(super) fn patience(verdict: &Verdict, object: &PolicyObject, up: Duration) -> Duration {
    match verdict {
        Verdict::Policy { conditions, .. } => {
            patience_of(conditions, stood(object, None), object.generation, up)
        }
        Verdict::Route(parents) => {
            let each = parents.iter().map(|(parent, conditions)| {
                patience_of(
                    conditions,
                    stood(object, Some(parent)),
                    object.generation,
                    up,
                )
            });
            // One that has news has them of the whole object.
            let news = each.clone().filter(|patience| *patience != NUMBERS).max();
            news.or_else(|| each.max()).unwrap_or(SOON)
        }
    }
}

fn patience_of(said: &[Said], stood: &[Value], generation: Option<i64>, up: Duration) -> Duration {
    let stands = |kind: &str, holds: bool| {
        stood.iter().any(|condition| {
            condition["type"] == kind
                && condition["status"] == if holds { "True" } else { "False" }
                && condition["observedGeneration"].as_i64() == generation
        })
    };
    let programmed = said.iter().find(|said| said.kind == PROGRAMMED);
    let is_with_all = programmed.is_some_and(|said| said.holds);
    let is_pending = programmed.is_some_and(|said| said.reason == PENDING);
    if said.iter().all(|said| stands(said.kind, said.holds)) {
        NUMBERS
    } else if is_pending && stands(PROGRAMMED, true) {
        SETBACK
    } else if is_with_all {
        RETURN.saturating_sub(up).max(SOON)
    } else {
        SOON
    }
}

const PENDING: &str = "Pending";

/// The source did not take this generation, or the model did not.
fn on_refused(key: &ObjectKey, object: &PolicyObject, reason: &str, why: &str) -> Verdict {
    let accepted = said(ACCEPTED, false, reason, why);
    let programmed = said(
        PROGRAMMED,
        false,
        "NotAccepted",
        "this generation is not accepted, so no proxy has it; `Accepted` says why",
    );
    if key.kind != Kind::HttpRoute {
        return Verdict::Policy {
            conditions: vec![accepted, programmed],
            proxies: "0/0".to_owned(),
        };
    }
    // As the Gateway API words it.
    let accepted = Said {
        reason: "UnsupportedValue".to_owned(),
        ..accepted
    };
    let resolved = match ["InvalidKind", "RefNotPermitted"]
        .into_iter()
        .find(|reason| why.contains(&format!("(reason {reason})")))
    {
        Some(reason) => said(RESOLVED_REFS, false, reason, why),
        None => said(RESOLVED_REFS, true, RESOLVED_REFS, ""),
    };
    let parents = service_parents(key, object);
    let conditions = vec![accepted, resolved, programmed];
    Verdict::Route(
        parents
            .map(|(parent, _)| (parent, conditions.clone()))
            .collect(),
    )
}

fn on_known(
    key: &ObjectKey,
    object: &PolicyObject,
    statuses: &[ObjectStatus],
    adoption: &Adoption,
) -> Verdict {
    if key.kind != Kind::HttpRoute {
        let mut conditions = conditions(statuses.first());
        conditions.push(programmed(&conditions, adoption));
        return Verdict::Policy {
            conditions,
            proxies: proxies(adoption),
        };
    }
    // The model refuses a route as a whole; then nothing is said of its parents.
    let whole = statuses.iter().find(|status| status.parent.is_none());
    if let Some(accepted) = whole.and_then(|status| status.conditions.first()) {
        return on_refused(key, object, accepted.reason, &accepted.message);
    }
    let mut left: Vec<&ObjectStatus> = statuses.iter().collect();
    let parents = service_parents(key, object).map(|(parent, service)| {
        // Several refs may name one Service; they are told in the order in which they stand.
        let at = left
            .iter()
            .position(|status| status.parent.as_ref() == Some(&service));
        let mut conditions = conditions(at.map(|at| left.remove(at)));
        conditions.push(programmed(&conditions, adoption));
        (parent, conditions)
    });
    Verdict::Route(parents.collect())
}

/// As the model has found them; where it says nothing, nothing is wrong.
fn conditions(status: Option<&ObjectStatus>) -> Vec<Said> {
    let found = status.into_iter().flat_map(|status| &status.conditions);
    let conditions: Vec<Said> = found
        .map(|condition| {
            let kind = match condition.kind {
                ConditionKind::Accepted => ACCEPTED,
                ConditionKind::ResolvedRefs => RESOLVED_REFS,
            };
            said(kind, condition.holds, condition.reason, &condition.message)
        })
        .collect();
    if conditions.is_empty() {
        return vec![said(ACCEPTED, true, ACCEPTED, "")];
    }
    conditions
}

/// Whether all whom it concerns have it.
fn programmed(found: &[Said], adoption: &Adoption) -> Said {
    let Adoption {
        subscribers,
        current,
        refused,
        refusals,
        absent,
        ..
    } = adoption;
    let no = |reason, message: String| said(PROGRAMMED, false, reason, &message);
    if found
        .iter()
        .any(|said| said.kind == ACCEPTED && !said.holds)
    {
        return no(
            "NotAccepted",
            "it has no effect; `Accepted` says why".to_owned(),
        );
    }
    if let Some(refusal) = refusals.first() {
        let words = refusal.message.as_deref().unwrap_or("its log says why");
        let more = match refused.saturating_sub(1) {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        let message = format!(
            "{} keeps what it had, since it refuses {} `{}`: {words}{more}",
            refusal.subscriber, refusal.kind, refusal.resource
        );
        return no("Refused", message);
    }
    if !absent.is_empty() {
        let shown: Vec<&str> = absent.iter().take(3).map(String::as_str).collect();
        let more = match absent.len() - shown.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let message = format!(
            "waiting for the {}{more}: not connected to the controller; its pod's log says why",
            shown.join(", the ")
        );
        return no(PENDING, message);
    }
    let behind = subscribers - current;
    if behind > 0 {
        return no(
            PENDING,
            format!("{behind} of {subscribers} have not acknowledged it yet"),
        );
    }
    let message = match subscribers {
        0 => "no proxy that is connected needs it; one that does is told before it acts",
        _ => "",
    };
    said(PROGRAMMED, true, PROGRAMMED, message)
}

fn proxies(adoption: &Adoption) -> String {
    let total = adoption.subscribers + adoption.absent.len();
    format!("{}/{total}", adoption.current)
}

fn service_parents<'a>(
    key: &'a ObjectKey,
    object: &'a PolicyObject,
) -> impl Iterator<Item = (Value, String)> + 'a {
    let parents = object.parents.iter();
    parents.filter_map(|parent| Some((parent.clone(), service_parent(parent, &key.namespace)?)))
}

fn said(kind: &'static str, holds: bool, reason: &str, message: &str) -> Said {
    Said {
        kind,
        holds,
        reason: reason.to_owned(),
        message: message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;
    use turnpike_discovery::RefusedBy;
    use turnpike_model::{Condition, ResourceType};

    use super::*;

    fn key(kind: Kind) -> ObjectKey {
        ObjectKey::new(kind, "shop", "a")
    }

    fn object(parents: Vec<Value>, status: Value) -> PolicyObject {
        PolicyObject {
            uid: "u".into(),
            generation: Some(3),
            resource_version: "7".into(),
            status,
            parents,
            refused: None,
        }
    }

    fn texts(conditions: &[Said]) -> Vec<String> {
        let text = |said: &Said| format!("{}={} {}", said.kind, said.holds, said.reason);
        conditions.iter().map(text).collect()
    }

    fn policy(adoption: &Adoption) -> (Vec<String>, String, String) {
        let object = object(vec![], Value::Null);
        let verdict = on_known(&key(Kind::EgressPolicy), &object, &[], adoption);
        let Verdict::Policy {
            conditions,
            proxies,
        } = verdict
        else {
            panic!("{verdict:?}")
        };
        (
            texts(&conditions),
            proxies,
            conditions.last().unwrap().message.clone(),
        )
    }

    #[test]
    fn programmed_is_what_has_been_acknowledged() {
        let adoption = |subscribers, current, absent: &[&str]| Adoption {
            subscribers,
            current,
            absent: absent
                .iter()
                .map(|a| (*a).to_owned())
                .collect::<BTreeSet<_>>(),
            ..Adoption::default()
        };
        let (conditions, proxies, _) = policy(&adoption(2, 2, &[]));
        assert_eq!(
            conditions,
            ["Accepted=true Accepted", "Programmed=true Programmed"]
        );
        assert_eq!(proxies, "2/2");
        let (conditions, proxies, message) = policy(&adoption(3, 1, &[]));
        assert_eq!(conditions[1], "Programmed=false Pending");
        assert_eq!(
            (&*proxies, &*message),
            ("1/3", "2 of 3 have not acknowledged it yet")
        );
        let (conditions, proxies, message) = policy(&adoption(1, 1, &["gate of node-b"]));
        assert_eq!(conditions[1], "Programmed=false Pending");
        assert_eq!(proxies, "1/2");
        assert!(
            message.starts_with("waiting for the gate of node-b: not connected"),
            "{message}"
        );

        let mut refused = adoption(2, 1, &[]);
        refused.refused = 2;
        refused.refusals = vec![RefusedBy {
            subscriber: "pod web-1".into(),
            kind: ResourceType::SelfConfig,
            resource: "u1".into(),
            message: Some("no such thing".into()),
        }];
        let (conditions, _, message) = policy(&refused);
        assert_eq!(conditions[1], "Programmed=false Refused");
        let expected =
            "pod web-1 keeps what it had, since it refuses Self `u1`: no such thing (and 1 more)";
        assert_eq!(message, expected);
    }

    #[test]
    fn what_is_refused_is_programmed_nowhere() {
        let object = object(vec![], Value::Null);
        let verdict = on_refused(
            &key(Kind::EgressPolicy),
            &object,
            "Invalid",
            "spec.x: unknown",
        );
        let Verdict::Policy { conditions, .. } = verdict else {
            panic!("{verdict:?}")
        };
        assert_eq!(
            texts(&conditions),
            ["Accepted=false Invalid", "Programmed=false NotAccepted"]
        );
        assert_eq!(conditions[0].message, "spec.x: unknown");
    }

    #[test]
    fn each_parent_of_a_route_has_its_own_word() {
        let web = json!({"group": "", "kind": "Service", "name": "web", "port": 80});
        let web_admin = json!({"group": "", "kind": "Service", "name": "web", "port": 81});
        let gateway = json!({"name": "gateway"});
        let object = object(vec![web.clone(), gateway, web_admin.clone()], Value::Null);
        let condition = |kind, holds, reason| Condition {
            kind,
            holds,
            reason,
            message: String::new(),
        };
        let status = |accepted| ObjectStatus {
            object: key(Kind::HttpRoute),
            parent: Some("shop/web".into()),
            conditions: vec![
                condition(ConditionKind::Accepted, accepted, "NoMatchingParent"),
                condition(ConditionKind::ResolvedRefs, true, "ResolvedRefs"),
            ],
        };
        let statuses = [status(true), status(false)];
        let verdict = on_known(
            &key(Kind::HttpRoute),
            &object,
            &statuses,
            &Adoption::default(),
        );
        let Verdict::Route(parents) = verdict else {
            panic!("{verdict:?}")
        };
        assert_eq!(parents.len(), 2);
        assert_eq!((&parents[0].0, &parents[1].0), (&web, &web_admin));
        assert!(parents[0].1[0].holds && parents[0].1[2].holds);
        assert!(!parents[1].1[0].holds && !parents[1].1[2].holds);

        let why = "spec.rules[0].backendRefs[0].kind: `x/Y` is refused: allowed is … (reason InvalidKind)";
        let verdict = on_refused(&key(Kind::HttpRoute), &object, "Invalid", why);
        let Verdict::Route(parents) = verdict else {
            panic!("{verdict:?}")
        };
        assert_eq!(
            texts(&parents[1].1),
            [
                "Accepted=false UnsupportedValue",
                "ResolvedRefs=false InvalidKind",
                "Programmed=false NotAccepted"
            ]
        );
    }

    #[test]
    fn a_setback_must_last_and_a_new_generation_need_not() {
        let pending = |holds: bool| Verdict::Policy {
            conditions: vec![
                said(ACCEPTED, true, ACCEPTED, ""),
                said(
                    PROGRAMMED,
                    holds,
                    if holds { PROGRAMMED } else { PENDING },
                    "",
                ),
            ],
            proxies: "0/1".into(),
        };
        let stands = |generation: i64| {
            let condition = |kind: &str| json!({"type": kind, "status": "True", "observedGeneration": generation});
            let conditions = [condition(ACCEPTED), condition(PROGRAMMED)];
            object(vec![], json!({ "conditions": conditions }))
        };
        let late = RETURN * 2;
        assert_eq!(patience(&pending(false), &stands(3), late), SETBACK);
        assert_eq!(
            patience(&pending(false), &stands(2), late),
            SOON,
            "it says nothing of this one"
        );
        assert_eq!(patience(&pending(true), &stands(3), late), NUMBERS);
        let new = object(vec![], Value::Null);
        assert_eq!(patience(&pending(false), &new, late), SOON);
        assert_eq!(patience(&pending(true), &new, late), SOON);
        assert_eq!(
            patience(&pending(true), &new, Duration::from_secs(1)),
            RETURN - Duration::from_secs(1),
            "those whom it concerns may not be back"
        );
    }

    #[test]
    fn a_routes_setback_must_last_too() {
        let web = json!({"name": "web"});
        let said = |kind, holds, reason| said(kind, holds, reason, "");
        let pending = vec![
            said(ACCEPTED, true, ACCEPTED),
            said(PROGRAMMED, false, PENDING),
        ];
        let verdict = Verdict::Route(vec![(web.clone(), pending)]);
        let of = |controller: &str| {
            let condition = |kind| json!({"type": kind, "status": "True", "observedGeneration": 3});
            let conditions = [condition(ACCEPTED), condition(PROGRAMMED)];
            let parent = json!({
                "parentRef": web, "controllerName": controller, "conditions": conditions,
            });
            object(vec![web.clone()], json!({ "parents": [parent] }))
        };
        assert_eq!(
            patience(&verdict, &of("turnpike.dev/controller"), RETURN),
            SETBACK
        );
        assert_eq!(
            patience(&verdict, &of("example.com/another"), RETURN),
            SOON,
            "that is another's word"
        );
    }
}
