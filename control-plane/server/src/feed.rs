//! From the source into the model, and what became of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use turnpike_api::{Kind, Object, ObjectKey};
use turnpike_discovery::Discovery;
use turnpike_kubernetes::{Event, Impairment, Impairments, Place, Rejection, Source};
use turnpike_model::{ConditionKind, ObjectStatus};

use crate::{metrics::Metrics, status::Applied};

/// Rejections that are shown; of a folder with more, the first.
const SHOWN: usize = 10_000;

/// Changes that come together are judged together.
const SETTLE: Duration = Duration::from_millis(200);
const MESH_CONFIG: &str = "MeshConfig default";
const NO_PREFIXES: &str = "no meshPrefixes are set, so proxies take every address for one outside \
                           the mesh; list the ranges of pods and Services";

/// What is known of the source's state, for pages and probes.
#[derive(Debug)]
pub struct Health {
    rejections: Mutex<BTreeSet<Rejection>>,
    impairments: Impairments,
    /// Of objects with a condition that does not hold.
    places: Mutex<BTreeMap<ObjectKey, Place>>,
    applied: Applied,
    synced: watch::Sender<bool>,
    stopping: watch::Sender<bool>,
}

/// As `/debug/rejections` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Quarantined {
    pub file: String,
    pub line: Option<usize>,
    pub object: Option<String>,
    pub field: Option<String>,
    pub message: String,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            rejections: Mutex::default(),
            impairments: Impairments::default(),
            applied: Applied::default(),
            places: Mutex::default(),
            synced: watch::Sender::new(false),
            stopping: watch::Sender::new(false),
        }
    }
}

impl Health {
    /// What does not work now, of the source and of what is kept in the API.
    pub fn impairments(&self) -> &Impairments {
        &self.impairments
    }

    /// What the model has taken.
    pub(crate) fn applied(&self) -> &Applied {
        &self.applied
    }

    /// What is refused, after what does not work at all.
    pub fn rejections(&self) -> Vec<Quarantined> {
        let impairments = self.impairments.all();
        let rejections = self.rejections.lock();
        let impaired = impairments.iter().map(Quarantined::from);
        impaired
            .chain(rejections.iter().map(Quarantined::from))
            .collect()
    }

    /// Where an object that does not hold as it was meant stands in its file.
    pub fn place(&self, object: &ObjectKey) -> Option<Place> {
        self.places.lock().get(object).cloned()
    }

    /// `None`: ready.
    pub fn why_not_ready(&self) -> Option<String> {
        if *self.stopping.borrow() {
            return Some("the controller is stopping".to_owned());
        }
        if *self.synced.borrow() {
            return None;
        }
        let mut why = "the source has not delivered all its objects yet".to_owned();
        for impairment in self.impairments.blocking() {
            why.push('\n');
            why.push_str(&impairment.to_string());
        }
        Some(why)
    }

    /// Returns when the source has delivered all that there was.
    pub async fn synced(&self) {
        // The sender is `self`, so it outlives this wait.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
    }

    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }
}

impl From<&Rejection> for Quarantined {
    fn from(rejection: &Rejection) -> Self {
        let Rejection {
            file,
            line,
            object,
            field,
            message,
        } = rejection;
        Self {
            file: file.clone(),
            line: *line,
            object: object.as_ref().map(ToString::to_string),
            field: field.clone(),
            message: message.clone(),
        }
    }
}

impl From<&Impairment> for Quarantined {
    fn from(impairment: &Impairment) -> Self {
        Self {
            file: impairment.what.clone(),
            line: None,
            object: None,
            field: None,
            message: impairment.message.clone(),
        }
    }
}

/// Feeds the model for as long as the source lives.
pub async fn run(
    mut source: impl Source,
    discovery: Discovery,
    health: Arc<Health>,
    metrics: Metrics,
) {
    let mut feed = Feed {
        discovery,
        health,
        metrics,
        problems: BTreeMap::new(),
    };
    let mut due: Option<Instant> = None;
    loop {
        tokio::select! {
            event = source.next() => {
                let Some(event) = event else { return };
                if feed.take(event) {
                    due.get_or_insert_with(|| Instant::now() + SETTLE);
                }
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                due = None;
                feed.report(&source);
            }
        }
    }
}

struct Feed {
    discovery: Discovery,
    health: Arc<Health>,
    metrics: Metrics,
    /// Conditions that do not hold, as they were last logged.
    problems: BTreeMap<Problem, String>,
}

type Problem = (String, Option<String>, ConditionKind);

impl Feed {
    /// True where policies may have become right or wrong by it.
    fn take(&mut self, event: Event) -> bool {
        self.metrics.source_event();
        match event {
            Event::Applied(object) => {
                let key = object.key();
                let judged = may_change_statuses(&object);
                let changes = self.discovery.update(|model| model.apply(object.clone()));
                self.health.applied.put(&object);
                tracing::debug!(object = %key, touched = changes.len(), "applied");
                judged
            }
            Event::Deleted(key) => {
                let changes = self.discovery.update(|model| model.delete(&key));
                self.health.applied.remove(&key);
                tracing::debug!(object = %key, touched = changes.len(), "deleted");
                key.kind != Kind::Pod && key.kind != Kind::EndpointSlice
            }
            Event::Rejected(rejection) => {
                tracing::warn!("{rejection}");
                let mut rejections = self.health.rejections.lock();
                if rejections.len() < SHOWN {
                    rejections.insert(rejection);
                }
                self.metrics.set_rejected(rejections.len());
                false
            }
            Event::Resolved(rejection) => {
                tracing::info!(
                    file = rejection.file,
                    line = rejection.line,
                    "mended: {rejection}"
                );
                let mut rejections = self.health.rejections.lock();
                rejections.remove(&rejection);
                self.metrics.set_rejected(rejections.len());
                false
            }
            Event::Impaired(impairment) => {
                let what = impairment.what.clone();
                self.health.impairments.set(&what, Some(impairment));
                false
            }
            Event::Restored(impairment) => {
                self.health.impairments.set(&impairment.what, None);
                false
            }
            Event::Synced => {
                self.metrics.set_synced();
                self.health.synced.send_replace(true);
                tracing::info!("the source has delivered all its objects");
                true
            }
        }
    }

    /// Logs what has become wrong or right with policies, once each. While the source still
    /// delivers, what a policy needs may yet come.
    fn report(&mut self, source: &impl Source) {
        if !*self.health.synced.borrow() {
            return;
        }
        let statuses = self.discovery.read(turnpike_model::Model::statuses);
        let mut current: BTreeMap<Problem, String> = statuses.iter().flat_map(failing).collect();
        let places: BTreeMap<ObjectKey, Place> = statuses
            .iter()
            .filter(|status| failing(status).next().is_some())
            .filter_map(|status| Some((status.object.clone(), source.place(&status.object)?)))
            .collect();
        let place = |object: &str| {
            let found = places.iter().find(|(key, _)| key.to_string() == object);
            found
                .map(|(_, place)| format!("{place}: "))
                .unwrap_or_default()
        };
        if self
            .discovery
            .read(|model| model.mesh_prefixes().is_empty())
        {
            let problem = (MESH_CONFIG.to_owned(), None, ConditionKind::Accepted);
            current.insert(problem, NO_PREFIXES.to_owned());
        }
        for (problem @ (object, parent, kind), message) in &current {
            if self.problems.get(problem) != Some(message) {
                let (parent, place) = (parent.as_deref(), place(object));
                tracing::warn!(object, parent, "{place}{object}: not {kind}: {message}");
            }
        }
        for (object, parent, kind) in self.problems.keys() {
            if !current.contains_key(&(object.clone(), parent.clone(), *kind)) {
                tracing::info!(object, parent = parent.as_deref(), "{object}: {kind} now");
            }
        }
        self.problems = current;
        *self.health.places.lock() = places;
    }
}

/// Pods and their addresses say nothing of policies, and change all the time.
fn may_change_statuses(object: &Object) -> bool {
    !matches!(object, Object::Pod(_) | Object::EndpointSlice(_))
}

fn failing(status: &ObjectStatus) -> impl Iterator<Item = (Problem, String)> {
    status
        .conditions
        .iter()
        .filter(|condition| !condition.holds)
        .map(|condition| {
            let problem = (
                status.object.to_string(),
                status.parent.clone(),
                condition.kind,
            );
            (problem, condition.message.clone())
        })
}
