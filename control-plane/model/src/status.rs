//! What became of each policy: whether it took effect, and why not.

use std::collections::BTreeMap;

use turnpike_api::{Kind, ObjectKey};
use turnpike_rules::service::Protocol;

use crate::{
    Model,
    facts::{
        pod::Pod,
        policy::TrafficDefaults,
        route::{Parent, Route},
        service::{Port, Service},
    },
    key::{Birth, Key},
    store::{Policies, Selected},
};

/// A route that is shared with a Gateway is in force for both.
const HOSTS_IGNORED: &str = "`hostnames` are a Gateway's: for calls inside the mesh they are ignored, and \
                             the route holds for every call to the Service";

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
        Self::accepted_but(String::new())
    }

    /// In force, if not everywhere.
    fn accepted_but(message: String) -> Self {
        Self {
            kind: ConditionKind::Accepted,
            holds: true,
            reason: "Accepted",
            message,
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
    /// Of all policies and routes, and of whatever object was refused. It walks the policies, and
    /// pods only where two policies might select the same ones.
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
        let selecting = selecting.chain(self.egress.all().map(|p| (Kind::EgressPolicy, &p.key)));
        found.extend(selecting.map(|(kind, key)| accepted(kind, key)));
        found.extend(self.exclusive_statuses(Kind::PeerAuthentication, &self.peers));
        found.extend(self.exclusive_statuses(Kind::Telemetry, &self.telemetry));
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
            conditions: vec![self.attachment(route, parent), self.backends(route)],
        });
        statuses.collect()
    }

    fn attachment(&self, route: &Route, parent: &Parent) -> Condition {
        let Some(service) = self.services.get(&parent.service) else {
            return Condition::refused(
                "NoMatchingParent",
                format!(
                    "there is no Service `{}`; the route waits for it",
                    parent.service
                ),
            );
        };
        let covered = || service.ports.iter().filter(|port| parent.covers(port));
        if covered().next().is_some() {
            let in_force = || match route.names_hosts {
                true => Condition::accepted_but(HOSTS_IGNORED.to_owned()),
                false => Condition::accepted(),
            };
            return unasked(service, covered()).unwrap_or_else(in_force);
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
        if let Some(unknown) = route.unknown.first() {
            return Condition::unresolved(
                "InvalidKind",
                format!(
                    "{unknown} is no Service; its share of the requests is answered 500, and of \
                     copies dropped"
                ),
            );
        }
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

    /// Refused only where none of its targets is left to it.
    fn traffic_status(&self, policy: &TrafficDefaults) -> ObjectStatus {
        let problems = policy.targets.iter().filter_map(|target| {
            if self.services.get(target).is_none() {
                let text = format!("there is no Service `{target}`; the policy waits for it");
                return Some(("TargetNotFound", text));
            }
            let holding = self.traffic.holding(target)?;
            (holding.key != policy.key).then(|| {
                let text = format!(
                    "TrafficPolicy `{}` {} and holds for Service `{target}`; put both into one, or \
                     name another target",
                    holding.key,
                    why_first(holding.birth, policy.birth)
                );
                ("Conflicted", text)
            })
        });
        let (reasons, texts): (Vec<_>, Vec<_>) = problems.unzip();
        let text = texts.join("; ");
        let condition = match reasons.first() {
            None => Condition::accepted(),
            Some(reason) if reasons.len() == policy.targets.len() => {
                Condition::refused(reason, text)
            }
            Some(_) => {
                Condition::accepted_but(format!("it holds for its other targets; but {text}"))
            }
        };
        ObjectStatus {
            object: policy.key.object(Kind::TrafficPolicy),
            parent: None,
            conditions: vec![condition],
        }
    }

    /// Of policies of which one holds for a pod, among all of its width.
    fn exclusive_statuses<P>(&self, kind: Kind, policies: &Policies<P>) -> Vec<ObjectStatus> {
        let mut rivals: BTreeMap<_, Vec<&Selected<P>>> = BTreeMap::new();
        for policy in policies.all() {
            let group = (policy.scope.as_deref(), policy.width());
            rivals.entry(group).or_default().push(policy);
        }
        let mut found = Vec::new();
        for mut group in rivals.into_values() {
            group.sort_by_key(|policy| policy.rank());
            for (place, policy) in group.iter().enumerate() {
                let earlier = &group[..place];
                let holding = earlier.iter().find(|other| self.share_pods(other, policy));
                let condition = match holding {
                    None => Condition::accepted(),
                    Some(holding) => {
                        let left = self.has_other_pods(policy, earlier);
                        overruled(kind, holding, policy, left)
                    }
                };
                found.push(ObjectStatus {
                    object: policy.key.object(kind),
                    parent: None,
                    conditions: vec![condition],
                });
            }
        }
        found
    }

    /// Whether some pod has both.
    fn share_pods<P>(&self, one: &Selected<P>, other: &Selected<P>) -> bool {
        one.selector == other.selector || {
            let pods = self.pods.select(one.scope.as_deref(), &one.selector);
            pods.iter().any(|pod| other.selector.matches(&pod.labels))
        }
    }

    /// Whether some pod has it and none of the others.
    fn has_other_pods<P>(&self, policy: &Selected<P>, others: &[&Selected<P>]) -> bool {
        let pods = self.pods.select(policy.scope.as_deref(), &policy.selector);
        let has = |pod: &Pod| others.iter().any(|o| o.selector.matches(&pod.labels));
        pods.iter().any(|pod| !has(pod))
    }
}

/// Why no request to these ports of a Service is routed: none is known to be for it, or none is read.
fn unasked<'a>(service: &Service, mut ports: impl Iterator<Item = &'a Port>) -> Option<Condition> {
    let key = &service.key;
    if service.vips.is_empty() {
        return Some(Condition::refused(
            "UnsupportedParent",
            format!(
                "Service `{key}` is headless: its callers choose a pod themselves, and no route is \
                 asked; give it a cluster IP, or attach the route to a Service that has one"
            ),
        ));
    }
    let opaque = ports.all(|port| matches!(port.protocol, Protocol::Tcp | Protocol::Tls));
    opaque.then(|| {
        Condition::refused(
            "UnsupportedProtocol",
            format!(
                "what the ports of Service `{key}` carry is not read, by their `appProtocol`, name \
                 or number; if it is plaintext HTTP, set `appProtocol: http` on them"
            ),
        )
    })
}

/// `left`: it holds for other pods all the same.
fn overruled<P>(kind: Kind, holding: &Selected<P>, policy: &Selected<P>, left: bool) -> Condition {
    let first = why_first(holding.birth, policy.birth);
    let what = format!(
        "{kind} `{}` {first} and holds for the workloads that both select",
        holding.key
    );
    let remedy = "put both into one, or select others";
    if left {
        Condition::accepted_but(format!("{what}, this one for its others; {remedy}"))
    } else {
        Condition::refused("Conflicted", format!("{what}; {remedy}"))
    }
}

/// Objects from files have no time of birth.
fn why_first(holding: Birth, other: Birth) -> &'static str {
    if holding == other {
        "comes first by its name"
    } else {
        "is older"
    }
}
