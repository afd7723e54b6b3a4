//! Policies, and which pods or Services they are about.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use turnpike_api::{
    AuthorizationPolicy, EgressPolicy, PeerAuthentication, Telemetry, TrafficPolicy,
    kinds::Action,
    valid::{self, Invalid},
};
use turnpike_rules::{
    authz::{self, TextPattern},
    egress,
    pod::InboundPort,
    traffic,
    workload::MtlsMode,
};

use crate::{
    key::{Birth, Key},
    selector::Selector,
    store::Selected,
};

/// As in Istio, it stands for the mesh's own trust domain in principals, whatever that is called.
const LOCAL: &str = "cluster.local";

/// Policies here are about the whole mesh, where their kind allows that.
pub(crate) const SYSTEM: &str = "turnpike-system";

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TrafficDefaults {
    pub(crate) key: Key,
    pub(crate) birth: Birth,
    /// Services, always of its own namespace.
    pub(crate) targets: Vec<Key>,
    pub(crate) policy: traffic::TrafficPolicy,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Authorization {
    pub(crate) deny: bool,
    pub(crate) policy: authz::Policy,
}

/// `None`: as the next wider policy says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mtls {
    pub(crate) mode: Option<MtlsMode>,
    pub(crate) ports: Vec<(u16, MtlsMode)>,
}

/// `None`: as the next wider policy says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reporting {
    pub(crate) sampling: Option<f64>,
    pub(crate) access_log: Option<bool>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Egress {
    pub(crate) policy: egress::EgressPolicy,
    pub(crate) inbound: Vec<InboundPort>,
}

impl TrafficDefaults {
    pub(crate) fn read(object: &TrafficPolicy) -> Result<Self, Invalid> {
        let valid::Traffic { targets, policy } = valid::traffic_policy(object)?;
        let key = Key::of(&object.metadata);
        let namespace = &key.namespace;
        let target = |name| Key {
            namespace: namespace.clone(),
            name,
        };
        Ok(Self {
            birth: Birth::of(&object.metadata),
            targets: targets.into_iter().map(target).collect(),
            policy,
            key,
        })
    }
}

impl Selected<Authorization> {
    /// As in Istio, one in the system namespace selects in all namespaces.
    pub(crate) fn read(object: &AuthorizationPolicy, trust_domain: &str) -> Result<Self, Invalid> {
        let valid::Authorization {
            selector: _,
            action,
            mut policy,
        } = valid::authorization_policy(object)?;
        for source in policy.rules.iter_mut().flat_map(|rule| &mut rule.from) {
            let lists = [&mut source.principals, &mut source.not_principals];
            for pattern in lists.into_iter().flatten() {
                localise(pattern, trust_domain);
            }
        }
        let content = Authorization {
            deny: matches!(action, Action::Deny),
            policy,
        };
        let selector = object.spec.selector.as_ref();
        Ok(selected(
            &object.metadata,
            selector,
            is_system(&object.metadata),
            content,
        ))
    }
}

impl Selected<Mtls> {
    /// As in Istio, one in the system namespace without a selector is the mesh's.
    pub(crate) fn read(object: &PeerAuthentication) -> Result<Self, Invalid> {
        let valid::PeerMtls {
            selector,
            mtls,
            ports,
        } = valid::peer_authentication(object)?;
        let mesh = is_system(&object.metadata) && selector.selects_all();
        let content = Mtls { mode: mtls, ports };
        Ok(selected(
            &object.metadata,
            object.spec.selector.as_ref(),
            mesh,
            content,
        ))
    }
}

impl Selected<Reporting> {
    /// One in the system namespace without a selector is the mesh's.
    pub(crate) fn read(object: &Telemetry) -> Result<Self, Invalid> {
        let valid::Reporting {
            selector,
            sampling,
            access_log,
        } = valid::telemetry(object)?;
        let mesh = is_system(&object.metadata) && selector.selects_all();
        let content = Reporting {
            sampling,
            access_log,
        };
        Ok(selected(
            &object.metadata,
            object.spec.selector.as_ref(),
            mesh,
            content,
        ))
    }
}

impl Selected<Egress> {
    pub(crate) fn read(object: &EgressPolicy) -> Result<Self, Invalid> {
        let valid::Egress {
            selector: _,
            policy,
            inbound,
        } = valid::egress_policy(object)?;
        let content = Egress { policy, inbound };
        Ok(selected(
            &object.metadata,
            object.spec.selector.as_ref(),
            false,
            content,
        ))
    }
}

fn selected<P>(
    meta: &ObjectMeta,
    selector: Option<&LabelSelector>,
    mesh: bool,
    content: P,
) -> Selected<P> {
    let key = Key::of(meta);
    let scope: Option<Arc<str>> = (!mesh).then(|| key.namespace.clone());
    let selector = selector.map(Selector::read).unwrap_or_default();
    Selected {
        birth: Birth::of(meta),
        scope,
        selector,
        content,
        key,
    }
}

fn localise(principal: &mut TextPattern, trust_domain: &str) {
    let (TextPattern::Exact(text) | TextPattern::Prefix(text)) = principal else {
        return;
    };
    let bare = text.strip_prefix("spiffe://").unwrap_or(text);
    if let Some(rest) = bare.strip_prefix(LOCAL)
        && (rest.is_empty() || rest.starts_with('/'))
    {
        *text = format!("{trust_domain}{rest}").into();
    }
}

fn is_system(meta: &ObjectMeta) -> bool {
    meta.namespace.as_deref() == Some(SYSTEM)
}
