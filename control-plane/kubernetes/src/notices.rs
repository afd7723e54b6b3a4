//! Events on pods that run outside of the mesh though their namespace is in it: they were there
//! before its label, and nothing but their restart brings them in.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::{sync::watch, time::sleep};
use turnpike_api::ObjectKey;

use crate::{
    Impairment, Impairments,
    cluster::{Namespaces, Outsider, Outsiders},
    inject::{self, InjectConfig},
};

/// Between rounds; a label that is set is told of after this at the latest.
const INTERVAL: Duration = Duration::from_secs(3);
/// Events in one round; the others come in later ones.
const ROUND: usize = 20;
/// Pods of one workload that are told; the others say nothing new.
const OF_A_WORKLOAD: usize = 3;
const REASON: &str = "OutsideMesh";
const REPORTER: &str = "turnpike.dev/controller";
const WHAT: &str = "events on pods without a sidecar";

/// Tells each pod once.
#[derive(Clone)]
pub struct OutsiderNotices {
    pub client: Client,
    pub namespaces: Namespaces,
    pub outsiders: Outsiders,
    pub impairments: Impairments,
    /// Which namespaces are never injected.
    pub settings: watch::Receiver<Arc<InjectConfig>>,
}

impl std::fmt::Debug for OutsiderNotices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OutsiderNotices").finish_non_exhaustive()
    }
}

impl OutsiderNotices {
    /// Tells for as long as it is polled.
    pub async fn run(self) {
        let mut namespaces = self.namespaces.changes();
        let mut outsiders = self.outsiders.changes();
        let mut told = HashSet::new();
        let mut more = true;
        loop {
            if !more {
                let changed = tokio::select! {
                    changed = namespaces.changed() => changed,
                    changed = outsiders.changed() => changed,
                };
                if changed.is_err() {
                    return;
                }
            }
            sleep(INTERVAL).await;
            namespaces.mark_unchanged();
            outsiders.mark_unchanged();
            more = self.round(&mut told).await;
        }
    }

    /// True: there is more to tell.
    async fn round(&self, told: &mut HashSet<String>) -> bool {
        let all = self.outsiders.all();
        // Those who are gone need no remembering.
        let there: HashSet<&String> = all.iter().map(|(_, outsider)| &outsider.uid).collect();
        told.retain(|uid| there.contains(uid));
        let mut due = self.due(all, told);
        let more = due.len() > ROUND;
        due.truncate(ROUND);
        let mut failure = None;
        for notice in due {
            match self.tell(&notice.key, &notice.outsider).await {
                Ok(()) => {
                    tracing::info!(pod = %notice.key, "runs without a sidecar; told so");
                    told.extend(notice.uids);
                }
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        let failed = failure.is_some();
        self.impairments
            .set(WHAT, failure.map(|error| impaired(&error)));
        more || failed
    }

    /// Who is to be told, by workload.
    fn due(&self, all: Vec<(ObjectKey, Outsider)>, told: &HashSet<String>) -> Vec<Notice> {
        let settings = self.settings.borrow().clone();
        let exempt = |namespace: &str| {
            settings
                .exempt_namespaces
                .iter()
                .any(|name| name == namespace)
        };
        let enabled = |namespace: &str| {
            let labels = self.namespaces.labels(namespace);
            let label = labels.and_then(|labels| labels.get(inject::LABEL).cloned());
            label.as_deref() == Some("enabled") && !exempt(namespace)
        };
        let mut workloads: BTreeMap<_, Vec<(ObjectKey, Outsider)>> = BTreeMap::new();
        for (key, outsider) in all {
            if enabled(&key.namespace) && !told.contains(&outsider.uid) {
                let workload = match &outsider.owner {
                    Some(owner) => (key.namespace.clone(), Some(owner.clone()), None),
                    None => (key.namespace.clone(), None, Some(key.name.clone())),
                };
                workloads.entry(workload).or_default().push((key, outsider));
            }
        }
        let notices = workloads.into_values().flat_map(|mut pods| {
            pods.sort_by(|a, b| a.0.cmp(&b.0));
            let silent: Vec<String> = pods
                .iter()
                .skip(OF_A_WORKLOAD)
                .map(|(_, outsider)| outsider.uid.clone())
                .collect();
            pods.truncate(OF_A_WORKLOAD);
            let notices = pods.into_iter().enumerate().map(|(n, (key, outsider))| {
                let mut uids = vec![outsider.uid.clone()];
                if n == 0 {
                    uids.extend(silent.iter().cloned());
                }
                Notice {
                    key,
                    outsider,
                    uids,
                }
            });
            notices.collect::<Vec<_>>()
        });
        notices.collect()
    }

    async fn tell(&self, key: &ObjectKey, outsider: &Outsider) -> Result<(), kube::Error> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &key.namespace);
        let created = api
            .create(&PostParams::default(), &event(key, outsider))
            .await;
        match created {
            Ok(_) => Ok(()),
            // Told by the controller that ran before, or the pod's namespace is ending.
            Err(kube::Error::Api(status)) if status.is_already_exists() || status.code == 404 => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

struct Notice {
    key: ObjectKey,
    outsider: Outsider,
    /// All that need no telling after it.
    uids: Vec<String>,
}

/// Its name follows from the pod, so that a controller that starts anew does not repeat it.
fn event(key: &ObjectKey, outsider: &Outsider) -> Event {
    let id = outsider.uid.split('-').next().unwrap_or_default();
    let name: String = key.name.chars().take(200).collect();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{id}.outside-mesh")),
            namespace: Some(key.namespace.to_string()),
            ..ObjectMeta::default()
        },
        action: Some("Inject".to_owned()),
        event_time: Some(MicroTime(Timestamp::now())),
        note: Some(advice(key, outsider)),
        reason: Some(REASON.to_owned()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(key.name.to_string()),
            namespace: Some(key.namespace.to_string()),
            uid: Some(outsider.uid.clone()),
            ..ObjectReference::default()
        }),
        reporting_controller: Some(REPORTER.to_owned()),
        reporting_instance: Some("turnpike-controller".to_owned()),
        type_: Some("Warning".to_owned()),
        ..Event::default()
    }
}

/// What brings the pod into the mesh.
fn advice(key: &ObjectKey, outsider: &Outsider) -> String {
    let ObjectKey {
        namespace, name, ..
    } = key;
    let restart =
        |what: &str| format!("restart it: kubectl --namespace {namespace} rollout restart {what}");
    let todo = match &outsider.owner {
        Some((kind, owner)) => match (kind.as_str(), &outsider.template_hash) {
            ("ReplicaSet", Some(hash)) => {
                let deployment = owner
                    .strip_suffix(hash.as_str())
                    .and_then(|name| name.strip_suffix('-'));
                restart(&format!("deployment/{}", deployment.unwrap_or(owner)))
            }
            ("StatefulSet", _) => restart(&format!("statefulset/{owner}")),
            ("DaemonSet", _) => restart(&format!("daemonset/{owner}")),
            ("Job", _) => "it stays outside until the Job runs again".to_owned(),
            _ => format!(
                "delete it, so that {kind} {owner} makes it anew: kubectl --namespace {namespace} \
                 delete pod {name}"
            ),
        },
        None => "nothing makes it anew: delete it and create it again".to_owned(),
    };
    format!(
        "the pod has no sidecar and is outside of the mesh, though the namespace's label {} is \
         `enabled`: it was created before; {todo}",
        inject::LABEL
    )
}

fn impaired(error: &kube::Error) -> Impairment {
    let message = match error {
        kube::Error::Api(status) if status.code == 403 => format!(
            "they cannot be written: {}; grant verb create on events of apiGroup events.k8s.io",
            status.message
        ),
        error => format!("they cannot be written: {error}; it is tried again"),
    };
    Impairment {
        what: WHAT.to_owned(),
        message,
        blocking: false,
    }
}

#[cfg(test)]
mod tests {
    use turnpike_api::Kind;

    use super::*;

    #[test]
    fn the_advice_fits_what_made_the_pod() {
        let key = ObjectKey::new(Kind::Pod, "shop", "web-5d4-x");
        let told = |owner: Option<(&str, &str)>, hash: Option<&str>| {
            let outsider = Outsider {
                uid: "u-1".into(),
                owner: owner.map(|(kind, name)| (kind.to_owned(), name.to_owned())),
                template_hash: hash.map(str::to_owned),
            };
            let text = advice(&key, &outsider);
            text.rsplit_once("created before; ").unwrap().1.to_owned()
        };
        for (owner, hash, expected) in [
            (
                Some(("ReplicaSet", "web-5d4")),
                Some("5d4"),
                "restart it: kubectl --namespace shop rollout restart deployment/web",
            ),
            (
                Some(("StatefulSet", "db")),
                None,
                "restart it: kubectl --namespace shop rollout restart statefulset/db",
            ),
            (
                Some(("ReplicaSet", "bare")),
                None,
                "delete it, so that ReplicaSet bare makes it anew: kubectl --namespace shop \
                 delete pod web-5d4-x",
            ),
            (
                Some(("Job", "j")),
                None,
                "it stays outside until the Job runs again",
            ),
            (
                None,
                None,
                "nothing makes it anew: delete it and create it again",
            ),
        ] {
            assert_eq!(told(owner, hash), expected);
        }
    }
}
