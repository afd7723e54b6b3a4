//! Who is on a stream, and what they may subscribe.

use std::{fmt, sync::Arc, time::SystemTime};

use turnpike_model::ResourceType;
use turnpike_rules::Identity;

/// The namespace of Turnpike's own service accounts.
const SYSTEM: &str = "turnpike-system";
const AGENT: &str = "turnpike-node";
const GATE: &str = "turnpike-gate";

/// An authenticated caller, as its token describes it. The server puts an `Arc` of it into the
/// extensions of each request; a request without one is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub identity: Identity,
    /// The pod that the token is bound to.
    pub pod: Option<PodRef>,
    /// The node that pod runs on.
    pub node: Option<Arc<str>>,
    /// When the token ends, and with it the stream.
    pub expires: Option<SystemTime>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRef {
    pub name: Arc<str>,
    pub uid: Arc<str>,
}

/// For people: the pod, or who it is where the token is bound to none.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pod {
            Some(pod) => write!(f, "pod {}/{}", self.identity.namespace(), pod.name),
            None => write!(f, "{}", self.identity),
        }
    }
}

/// A subscription that the caller has no right to.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{kind} `{name}` is refused to {identity}: {rule}")]
pub struct Denied {
    pub kind: ResourceType,
    pub name: String,
    pub identity: String,
    pub rule: String,
}

impl Caller {
    pub(crate) fn may_subscribe(&self, kind: ResourceType, name: &str) -> Result<(), Denied> {
        let refuse = |rule: String| {
            let name = name.chars().take(256).collect();
            Err(Denied {
                kind,
                name,
                identity: self.identity.to_string(),
                rule,
            })
        };
        let wildcard = name == turnpike_wire::names::WILDCARD;
        match kind {
            ResourceType::SelfConfig => match &self.pod {
                Some(pod) if *pod.uid == *name => Ok(()),
                Some(pod) => refuse(format!(
                    "a pod may ask for itself alone, and this token is bound to pod `{}` ({})",
                    pod.name, pod.uid
                )),
                None => refuse("the token is bound to no pod; use a projected token".into()),
            },
            ResourceType::Address | ResourceType::Service | ResourceType::Endpoints if wildcard => {
                refuse("these are subscribed by name, on first use".into())
            }
            // A view is a Service encoded once more: as many as names that a caller makes up
            // would be no bound, and another namespace's routes are not its business.
            ResourceType::Service => match name.split_once('@') {
                Some((_, consumer)) if consumer != self.identity.namespace() => refuse(format!(
                    "a caller may ask for the view of its own namespace alone, `@{}`",
                    self.identity.namespace()
                )),
                _ => Ok(()),
            },
            ResourceType::Address | ResourceType::Endpoints => Ok(()),
            ResourceType::PodNetwork if !self.is(AGENT) => {
                refuse(format!("it is for service account {SYSTEM}/{AGENT} alone"))
            }
            ResourceType::PodEgress if !self.is(GATE) => {
                refuse(format!("it is for service account {SYSTEM}/{GATE} alone"))
            }
            ResourceType::Members if !self.is(AGENT) && !self.is(GATE) => refuse(format!(
                "it is for service accounts {SYSTEM}/{AGENT} and {SYSTEM}/{GATE} alone"
            )),
            ResourceType::PodNetwork | ResourceType::PodEgress if self.node.is_none() => {
                refuse("the token names no node; use a projected token of a running pod".into())
            }
            ResourceType::PodNetwork | ResourceType::PodEgress | ResourceType::Members => Ok(()),
        }
    }

    fn is(&self, account: &str) -> bool {
        self.identity.namespace() == SYSTEM && self.identity.service_account() == account
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(namespace: &str, account: &str, node: Option<&str>) -> Caller {
        Caller {
            identity: Identity::new("cluster.local", namespace, account).unwrap(),
            pod: Some(PodRef {
                name: "web-1".into(),
                uid: "u1".into(),
            }),
            node: node.map(Arc::from),
            expires: None,
        }
    }

    #[test]
    fn who_may_what() {
        use ResourceType::{
            Address, Endpoints, Members, PodEgress, PodNetwork, SelfConfig, Service,
        };
        let web = caller("shop", "web", Some("node-a"));
        let agent = caller(SYSTEM, AGENT, Some("node-a"));
        let gate = caller(SYSTEM, GATE, Some("node-a"));
        let impostor = caller("shop", AGENT, Some("node-a"));
        let nowhere = caller(SYSTEM, AGENT, None);
        for (who, kind, name, allowed) in [
            (&web, SelfConfig, "u1", true),
            (&web, SelfConfig, "u2", false),
            (&web, SelfConfig, "*", false),
            (&web, Service, "cluster/shop/web@shop", true),
            (&web, Service, "*", false),
            (&web, Service, "cluster/bank/vault", true),
            (&web, Service, "cluster/bank/vault@shop", true),
            (&web, Service, "cluster/shop/web@bank", false),
            (&web, Service, "cluster/shop/web@shop@bank", false),
            (&web, Service, "cluster/shop/web@", false),
            (&web, Address, "default/10.0.0.1", true),
            (&web, Endpoints, "cluster/shop/web/0", true),
            (&web, PodNetwork, "*", false),
            (&web, PodEgress, "*", false),
            (&web, Members, "*", false),
            (&agent, PodNetwork, "*", true),
            (&agent, PodEgress, "*", false),
            (&agent, Members, "*", true),
            (&gate, PodNetwork, "*", false),
            (&gate, PodEgress, "*", true),
            (&gate, Members, "*", true),
            (&impostor, PodNetwork, "*", false),
            (&nowhere, PodNetwork, "*", false),
            (&nowhere, Members, "*", true),
        ] {
            let verdict = who.may_subscribe(kind, name);
            assert_eq!(verdict.is_ok(), allowed, "{:?} {kind} {name}", who.identity);
        }
    }
}
