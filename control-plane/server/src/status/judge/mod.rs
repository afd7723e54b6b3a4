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
    let resolved = said(RESOLVED_REFS, true, RESOLVED_REFS, "");
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
mod tests;
