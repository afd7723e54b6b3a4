//! What became of each policy: whether it took effect, and why not.

use turnpike_api::{Kind, ObjectKey};

use crate::{
    Model,
    facts::{
        policy::TrafficDefaults,
        route::{Parent, Route},
    },
    key::Key,
};

/// An object's status, or that of its attachment to one parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectStatus {
    pub object: ObjectKey,
    /// The Service that the conditions are about, where there may be several.
    pub parent: Option<String>,
    pub conditions: Vec<Condition>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    pub kind: ConditionKind,
    pub holds: bool,
    /// One word, for programs.
    pub reason: &'static str,
    /// For people: what was refused, by which rule, and what to do.
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConditionKind {
    Accepted,
    ResolvedRefs,
}

impl std::fmt::Display for ConditionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Accepted => "Accepted",
            Self::ResolvedRefs => "ResolvedRefs",
        })
    }
}

impl Condition {
    fn accepted() -> Self {
        Self {
            kind: ConditionKind::Accepted,
            holds: true,
            reason: "Accepted",
            message: String::new(),
        }
    }

    fn refused(reason: &'static str, message: String) -> Self {
        Self {
            kind: ConditionKind::Accepted,
            holds: false,
            reason,
            message,
        }
    }

    fn unresolved(reason: &'static str, message: String) -> Self {
        Self {
            kind: ConditionKind::ResolvedRefs,
            holds: false,
            reason,
            message,
        }
    }
}

impl Model {
    /// Of all policies and routes, and of whatever object was refused. It walks the policies, not
    /// the pods.
    pub fn statuses(&self) -> Vec<ObjectStatus> {
        let mut found: Vec<ObjectStatus> = Vec::new();
        found.extend(self.routes.all().flat_map(|route| self.route_status(route)));
        found.extend(self.traffic.all().map(|policy| self.traffic_status(policy)));
        let accepted = |kind: Kind, key: &Key| ObjectStatus {
            object: key.object(kind),
            parent: None,
            conditions: vec![Condition::accepted()],
        };
        let selecting = self
            .authorization
            .all()
            .map(|p| (Kind::AuthorizationPolicy, &p.key));
        let selecting = selecting
            .chain(self.peers.all().map(|p| (Kind::PeerAuthentication, &p.key)))
            .chain(self.telemetry.all().map(|p| (Kind::Telemetry, &p.key)))
            .chain(self.egress.all().map(|p| (Kind::EgressPolicy, &p.key)));
        found.extend(selecting.map(|(kind, key)| accepted(kind, key)));
        // What a refused object was before may still be in force; the refusal is what counts.
        found.retain(|status| !self.refused.contains_key(&status.object));
        found.extend(self.refused.iter().map(|(object, refusal)| ObjectStatus {
            object: object.clone(),
            parent: None,
            conditions: vec![Condition::refused(refusal.reason, refusal.message.clone())],
        }));
        found.sort_by(|a, b| (&a.object, &a.parent).cmp(&(&b.object, &b.parent)));
        found
    }

    fn route_status(&self, route: &Route) -> Vec<ObjectStatus> {
        let statuses = route.parents.iter().map(|parent| ObjectStatus {
            object: route.key.object(Kind::HttpRoute),
            parent: Some(parent.service.to_string()),
            conditions: vec![self.attachment(parent), self.backends(route)],
        });
        statuses.collect()
    }

    fn attachment(&self, parent: &Parent) -> Condition {
        let Some(service) = self.services.get(&parent.service) else {
            return Condition::refused(
                "NoMatchingParent",
                format!(
                    "there is no Service `{}`; the route waits for it",
                    parent.service
                ),
            );
        };
        if service.ports.iter().any(|port| parent.covers(port)) {
            return Condition::accepted();
        }
        let asked = match (parent.port, &parent.section) {
            (Some(port), _) => port.to_string(),
            (None, Some(section)) => section.to_string(),
            (None, None) => "any".into(),
        };
        let ports: Vec<String> = service
            .ports
            .iter()
            .map(|port| format!("{} {}", port.number, port.name))
            .collect();
        Condition::refused(
            "NoMatchingParent",
            format!(
                "Service `{}` has no TCP port `{asked}`; it has: {}",
                parent.service,
                ports.join(", ").replace(" ,", ",").trim_end()
            ),
        )
    }

    fn backends(&self, route: &Route) -> Condition {
        let missing =
            route
                .backends()
                .into_iter()
                .find_map(|(key, port)| match self.services.get(&key) {
                    None => Some(format!("there is no Service `{key}`")),
                    Some(service) if service.port(port).is_none() => {
                        Some(format!("Service `{key}` has no TCP port {port}"))
                    }
                    Some(_) => None,
                });
        match missing {
            None => Condition {
                kind: ConditionKind::ResolvedRefs,
                holds: true,
                reason: "ResolvedRefs",
                message: String::new(),
            },
            Some(what) => Condition::unresolved(
                "BackendNotFound",
                format!("{what}; its share of the requests is answered 500"),
            ),
        }
    }

    fn traffic_status(&self, policy: &TrafficDefaults) -> ObjectStatus {
        let problem = policy.targets.iter().find_map(|target| {
            if self.services.get(target).is_none() {
                return Some((
                    "TargetNotFound",
                    format!("there is no Service `{target}`; the policy waits for it"),
                ));
            }
            let holding = self.traffic.holding(target)?;
            (holding.key != policy.key).then(|| {
                let text = format!(
                    "TrafficPolicy `{}` is older and holds for Service `{target}`; put both into \
                     one, or name another target",
                    holding.key
                );
                ("Conflicted", text)
            })
        });
        let condition = match problem {
            None => Condition::accepted(),
            Some((reason, message)) => Condition::refused(reason, message),
        };
        ObjectStatus {
            object: policy.key.object(Kind::TrafficPolicy),
            parent: None,
            conditions: vec![condition],
        }
    }
}
