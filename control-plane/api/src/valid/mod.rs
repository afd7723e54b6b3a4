//! What was typed becomes what is valid: each kind in the types of `turnpike-rules`.
//!
//! A function for each kind, and [`check`] for any object. An [`Invalid`] names every field that is
//! wrong, not the first alone, with its value and what is allowed there. What takes more than one
//! object to decide (does the Service exist, which policy is older) is the model's.

mod authorization;
mod egress;
mod mesh;
mod problems;
mod routes;
mod traffic;

#[cfg(test)]
mod tests;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector, SelectorExt};
use std::collections::BTreeMap;

use crate::{Kind, Object};
use problems::Problems;

pub use authorization::{Authorization, authorization_policy};
pub use egress::{Egress, egress_policy};
pub use mesh::{MeshSettings, PeerMtls, Reporting, mesh_config, peer_authentication, telemetry};
pub use problems::{Invalid, Problem};
pub use routes::{Parent, Routes, http_route};
pub use traffic::{Traffic, traffic_policy};

/// Which pods of its namespace a policy is about.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PodSelector(Selector);

impl PodSelector {
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.matches(labels)
    }

    /// Whether it is about every pod: it then comes after those that are more specific.
    pub fn selects_all(&self) -> bool {
        self.0.selects_all()
    }
}

/// Whether an object can be used by itself.
pub fn check(object: &Object) -> Result<(), Invalid> {
    let mut problems = Problems::default();
    let key = object.key();
    name(&mut problems, "metadata.name", &key.name);
    if key.kind.namespaced() {
        name(&mut problems, "metadata.namespace", &key.namespace);
    }
    problems.finish(())?;
    match object {
        Object::MeshConfig(config) => mesh_config(config).map(drop),
        Object::TrafficPolicy(policy) => traffic_policy(policy).map(drop),
        Object::AuthorizationPolicy(policy) => authorization_policy(policy).map(drop),
        Object::PeerAuthentication(policy) => peer_authentication(policy).map(drop),
        Object::EgressPolicy(policy) => egress_policy(policy).map(drop),
        Object::Telemetry(policy) => telemetry(policy).map(drop),
        Object::HttpRoute(route) => http_route(route, "cluster").map(drop),
        Object::ClusterEgressPolicy(_) => Err(Invalid::one(
            "kind",
            Kind::ClusterEgressPolicy,
            "this version does not enforce it, and so does not accept it; write an EgressPolicy in \
             each namespace",
        )),
        Object::Namespace(_)
        | Object::ServiceAccount(_)
        | Object::Service(_)
        | Object::EndpointSlice(_)
        | Object::Pod(_) => Ok(()),
    }
}

/// RFC 1123: what Kubernetes accepts for names.
fn name(problems: &mut Problems, field: &str, name: &str) {
    let label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.is_empty() || name.len() > 253 || !name.split('.').all(label) {
        let allowed = "allowed are lower case letters, digits, `-` and `.`, 253 at most, beginning \
                       and ending with a letter or digit";
        problems.add(field, name, allowed);
    }
}

fn selector(
    problems: &mut Problems,
    field: &str,
    selector: Option<&LabelSelector>,
) -> Option<PodSelector> {
    let Some(typed) = selector else {
        return Some(PodSelector::default());
    };
    for (i, expression) in typed.match_expressions.iter().flatten().enumerate() {
        let field = format!("{field}.matchExpressions[{i}]");
        let values = expression.values.as_deref().unwrap_or_default();
        match (expression.operator.as_str(), values.is_empty()) {
            ("In" | "NotIn", true) => {
                problems.add(format!("{field}.values"), "[]", "In and NotIn need a value");
            }
            ("Exists" | "DoesNotExist", false) => problems.add(
                format!("{field}.values"),
                values.join(", "),
                "Exists and DoesNotExist take no values",
            ),
            ("In" | "NotIn" | "Exists" | "DoesNotExist", _) => {}
            (other, _) => problems.add(
                format!("{field}.operator"),
                other,
                "allowed are In, NotIn, Exists and DoesNotExist",
            ),
        }
    }
    Selector::try_from(typed.clone()).ok().map(PodSelector)
}
