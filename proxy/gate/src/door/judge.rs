//! One verdict on one connection or request, ready to be recorded.

use std::{net::SocketAddr, sync::Arc};

use turnpike_ledger::record::{self, Attempt, Verdict};
use turnpike_rules::{
    egress::{self, Connect, Transport},
    host::HostName,
    pod::PodEgress,
};

use crate::{
    describe,
    dns::names::Resolved,
    state::{Standing, View},
};

/// Who connects where, as the kernel says; and the names that led there when it connected, which
/// are good for the connection's life.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    /// The pod when it connected; another one with its address is another caller.
    pub(super) uid: Arc<str>,
    pub(super) bound: Vec<Resolved>,
}

/// What the client's own bytes claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    Tcp,
    Tls(Option<HostName>),
    Http {
        host: Option<HostName>,
        method: String,
        path: String,
    },
}

impl Claim {
    fn protocol(&self) -> record::Protocol {
        match self {
            Self::Tcp => record::Protocol::Tcp,
            Self::Tls(_) => record::Protocol::Tls,
            Self::Http { .. } => record::Protocol::Http,
        }
    }

    pub(super) fn host(&self) -> Option<&HostName> {
        match self {
            Self::Tcp => None,
            Self::Tls(host) | Self::Http { host, .. } => host.as_ref(),
        }
    }
}

/// Judges by what is known now. Allowed is whatever is not [`Verdict::Denied`].
pub(super) fn judge(view: &View, caller: &Caller, claim: &Claim) -> Attempt {
    let standing = view.standing(caller.source.ip());
    let mut attempt = attempt(caller, claim, &standing);
    let Standing::Selected(pod, egress) = &standing else {
        return refuse(attempt, missing(&standing));
    };
    if pod.uid != caller.uid {
        return refuse(attempt, "the address has another pod now");
    }
    if view.is_cluster(caller.destination.ip()) {
        return refuse(
            attempt,
            "an address of the cluster is not reached through the gate",
        );
    }
    let verdict = ask(egress, caller, claim);
    attempt.verdict = describe::verdict(&verdict);
    attempt.reason = describe::reason(&verdict);
    attempt.rule = describe::rule(&verdict);
    if verdict.allowed {
        attempt.assurance = Some(describe::assurance(verdict.grade));
    }
    if verdict.allowed && verdict.originate_tls {
        return refuse(
            attempt,
            "the rule has `tls.originate`, which this version of the gate cannot do; let the pod \
             speak TLS itself and allow protocol TLS",
        );
    }
    attempt
}

fn ask(egress: &PodEgress, caller: &Caller, claim: &Claim) -> egress::Verdict {
    let bound: Vec<_> = caller
        .bound
        .iter()
        .map(|resolved| resolved.name.clone())
        .collect();
    let transport = match claim {
        Claim::Tcp => Transport::Tcp,
        Claim::Tls(sni) => Transport::Tls { sni: sni.as_ref() },
        Claim::Http { host, .. } => Transport::Http {
            host: host.as_ref(),
        },
    };
    let connect = Connect {
        address: caller.destination.ip(),
        port: caller.destination.port(),
        transport,
        bound: &bound,
    };
    match claim {
        Claim::Http { method, path, .. } => {
            egress.request(&connect, &egress::Request { method, path })
        }
        _ => egress.connect(&connect),
    }
}

/// The record of a caller's attempt before anything is decided.
pub(super) fn attempt(caller: &Caller, claim: &Claim, standing: &Standing) -> Attempt {
    let claimed = claim.host();
    let by_name = caller
        .bound
        .iter()
        .find(|resolved| Some(&resolved.name) == claimed);
    let bound = by_name.or(caller.bound.first());
    Attempt {
        connection: String::new(),
        pod: standing.recorded(),
        source: caller.source,
        destination: caller.destination,
        protocol: claim.protocol(),
        verdict: Verdict::Denied,
        reason: None,
        rule: None,
        name: bound.map(|resolved| resolved.name.to_string()),
        answer_chain: bound
            .map(|resolved| resolved.chain.clone())
            .unwrap_or_default(),
        claimed: claimed.map(ToString::to_string),
        request: match claim {
            Claim::Http { method, path, .. } => Some(record::Request {
                method: describe::bounded(method),
                path: describe::bounded(path),
            }),
            _ => None,
        },
        assurance: None,
        count: 1,
    }
}

pub(super) fn refuse(mut attempt: Attempt, reason: impl Into<String>) -> Attempt {
    attempt.verdict = Verdict::Denied;
    attempt.reason = Some(reason.into());
    attempt.assurance = None;
    attempt
}

pub(super) fn missing(standing: &Standing) -> &'static str {
    match standing {
        Standing::Unknown => "the source address belongs to no pod known on this node",
        Standing::Unselected(_) => "no egress policy selects the pod, yet its packets came here",
        Standing::NoPolicy(_) | Standing::Selected(..) => {
            "an egress policy selects the pod, but the controller has not sent it yet"
        }
    }
}
