//! What can be said of the subscribers.

use std::{collections::BTreeMap, sync::Arc};

use turnpike_model::{Changes, ResourceType};

use super::Hub;
use crate::{
    Adoption, RefusedBy, SubscriberStatus, TypeStatus,
    subscriber::{Answer, Subscriber, SubscriberId},
};

impl Hub {
    /// How far resources have come with those who watch them.
    pub(crate) fn adoption(&self, of: &Changes) -> Adoption {
        let mut adoption = Adoption::default();
        let mut current = BTreeMap::new();
        for (kind, name) in of.iter() {
            self.adopt(kind, name, &mut adoption, &mut current);
            adoption.absent.extend(self.absent(kind, name));
            let views = self
                .views
                .get(name)
                .filter(|_| kind == ResourceType::Service);
            views
                .into_iter()
                .flatten()
                .for_each(|view| self.adopt(kind, view, &mut adoption, &mut current));
        }
        adoption.subscribers = current.len();
        adoption.current = current.values().filter(|current| **current).count();
        adoption
    }

    /// Who on a pod's node should watch this and does not.
    fn absent(&self, kind: ResourceType, name: &Arc<str>) -> Option<String> {
        let who = match kind {
            ResourceType::PodNetwork => "agent",
            ResourceType::PodEgress => "gate",
            _ => return None,
        };
        let node = self.model.node_of(name)?;
        let watchers = self.covering(kind, Some(node));
        let entry = self.entries.get(&(kind, name.clone()));
        let watched = !watchers.is_empty() || entry.is_some_and(|entry| !entry.exact.is_empty());
        (!watched).then(|| format!("{who} of {node}"))
    }

    /// `current`: by subscriber, whether all that it watches is accepted.
    fn adopt(
        &self,
        kind: ResourceType,
        name: &Arc<str>,
        adoption: &mut Adoption,
        current: &mut BTreeMap<SubscriberId, bool>,
    ) {
        let Some(entry) = self.entries.get(&(kind, name.clone())) else {
            return;
        };
        let mut watchers = self.covering(kind, entry.node.as_ref());
        watchers.extend(&entry.exact);
        let latest = entry.content.as_ref().map(|content| &content.version);
        for id in watchers {
            let Some(subscriber) = self.subscribers.get(&id) else {
                continue;
            };
            adoption.watched += 1;
            let held = subscriber
                .types
                .get(&kind)
                .and_then(|state| state.held.get(name));
            let answer = held
                .filter(|held| held.version.as_ref() == latest)
                .map(|held| held.answer);
            *current.entry(id).or_insert(true) &= answer == Some(Answer::Accepted);
            match answer {
                Some(Answer::Accepted) => adoption.accepted += 1,
                Some(Answer::Refused) => {
                    adoption.refused += 1;
                    adoption.note(|| refused_by(subscriber, kind, name));
                }
                Some(Answer::Awaited | Answer::RefusedWithOthers) | None => {}
            }
        }
    }

    pub(crate) fn status(&self) -> Vec<SubscriberStatus> {
        self.subscribers.values().map(subscriber_status).collect()
    }
}

fn refused_by(subscriber: &Subscriber, kind: ResourceType, name: &str) -> RefusedBy {
    let mut refusals = subscriber.refusals.iter();
    let known = refusals.find(|refusal| refusal.kind == kind && refusal.resource == name);
    RefusedBy {
        subscriber: subscriber.caller.to_string(),
        kind,
        resource: name.to_owned(),
        message: known.map(|refusal| refusal.message.clone()),
    }
}

fn subscriber_status(subscriber: &Subscriber) -> SubscriberStatus {
    let types = subscriber.types.iter().map(|(kind, state)| {
        let answered = |answer| {
            state
                .held
                .values()
                .filter(|held| held.answer == answer)
                .count()
        };
        let status = TypeStatus {
            wildcard: state.wildcard,
            subscribed: state.exact.len(),
            accepted: answered(Answer::Accepted),
            refused: answered(Answer::Refused),
            waiting: state.dirty.len(),
        };
        (kind.to_string(), status)
    });
    SubscriberStatus {
        identity: subscriber.caller.identity.to_string(),
        pod: subscriber
            .caller
            .pod
            .as_ref()
            .map(|pod| pod.name.to_string()),
        node: subscriber.caller.node.as_ref().map(ToString::to_string),
        node_id: subscriber.node_id.clone(),
        since: subscriber.since,
        unanswered: subscriber.unanswered.len(),
        types: types.collect(),
        refusals: subscriber.refusals.iter().cloned().collect(),
    }
}
