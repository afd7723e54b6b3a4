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
    let egress = match rules(view, caller, standing) {
        Ok(egress) => egress,
        Err(reason) => return refuse(attempt, reason),
    };
    let verdict = ask(&egress, caller, claim);
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

/// All that a verdict takes from what is known: while it is the same, so is the verdict on the same
/// claim. None: whatever the caller claims is denied.
pub(super) fn grounds(view: &View, caller: &Caller) -> Option<Arc<PodEgress>> {
    rules(view, caller, view.standing(caller.source.ip())).ok()
}

/// The rules to ask, or why none are.
fn rules(view: &View, caller: &Caller, standing: Standing) -> Result<Arc<PodEgress>, &'static str> {
    let Standing::Selected(pod, egress) = standing else {
        return Err(missing(&standing));
    };
    if pod.uid != caller.uid {
        return Err("the address has another pod now");
    }
    if view.is_cluster(caller.destination.ip()) {
        return Err("an address of the cluster is not reached through the gate");
    }
    Ok(egress)
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

#[cfg(test)]
pub(super) mod tests {
    use std::time::{Duration, Instant};

    use turnpike_rules::{
        egress::{EgressPolicy, EgressPort, EgressProtocol, EgressRule, Mode},
        host::HostPattern,
        pod::Members,
    };

    use super::*;
    use crate::{
        dns::names::Names,
        state::{Change, Owner, PodInfo, PodLimits, State},
    };

    pub(in crate::door) const HOST: &str = "api.payments.example";

    pub(in crate::door) fn rule(
        protocol: EgressProtocol,
        port: u16,
        originate_tls: bool,
    ) -> EgressRule {
        EgressRule {
            id: "allow[0]".into(),
            hosts: vec![HostPattern::parse(HOST).unwrap()],
            cidrs: vec![],
            ports: vec![EgressPort {
                port,
                end_port: port,
                protocol,
            }],
            http: None,
            originate_tls,
        }
    }

    pub(in crate::door) fn state(mode: Mode, rule: EgressRule) -> (Arc<Owner>, State) {
        let (owner, state) = Owner::new(PodLimits::default());
        owner.apply(Change::PodAdded(PodInfo {
            uid: "u1".into(),
            namespace: "shop".into(),
            name: "pay-0".into(),
            container_id: "c1".into(),
            addresses: vec!["10.0.1.5".parse().unwrap()],
            selected: true,
        }));
        let policy = EgressPolicy {
            name: "shop/pay".into(),
            version: "7".into(),
            mode,
            rules: vec![rule],
        };
        let egress = PodEgress {
            uid: "u1".into(),
            namespace: "shop".into(),
            name: "pay-0".into(),
            identity: "spiffe://cluster.local/ns/shop/sa/pay".parse().unwrap(),
            policies: vec![policy],
        };
        owner.apply(Change::Policies {
            added: vec![egress],
            removed: vec![],
        });
        (owner, state)
    }

    pub(in crate::door) fn caller(destination: &str, bound: &str) -> Caller {
        let destination: SocketAddr = destination.parse().unwrap();
        let (mut names, now) = (Names::new(10), Instant::now());
        let name = HostName::parse(bound).unwrap();
        let chain = ["cdn.example".to_owned()];
        names
            .learn(
                &name,
                &chain,
                &[destination.ip()],
                Duration::from_secs(60),
                now,
            )
            .unwrap();
        Caller {
            source: "10.0.1.5:40000".parse().unwrap(),
            destination,
            uid: "u1".into(),
            bound: names.leading_to(destination.ip(), now),
        }
    }

    pub(in crate::door) fn sni(name: &str) -> Claim {
        Claim::Tls(Some(HostName::parse(name).unwrap()))
    }

    #[test]
    fn the_record_says_all_that_is_known() {
        let (_owner, state) = state(Mode::Enforce, rule(EgressProtocol::Tls, 443, false));
        let attempt = judge(&state.view(), &caller("203.0.113.66:443", HOST), &sni(HOST));
        assert_eq!((attempt.verdict, attempt.reason), (Verdict::Allowed, None));
        assert_eq!(attempt.name.as_deref(), Some(HOST));
        assert_eq!(attempt.answer_chain, ["cdn.example"]);
        assert_eq!(attempt.assurance, Some(record::Assurance::SniDns));
        assert_eq!(attempt.rule.unwrap().version, "7");
    }

    #[test]
    fn what_is_not_known_or_not_outside_is_denied() {
        let (owner, state) = state(Mode::Enforce, rule(EgressProtocol::Tls, 443, false));
        let good = caller("203.0.113.66:443", HOST);
        let reason = |caller: &Caller| {
            let attempt = judge(&state.view(), caller, &sni(HOST));
            assert_eq!(attempt.verdict, Verdict::Denied, "{attempt:?}");
            attempt.reason.unwrap()
        };
        let stranger = Caller {
            source: "10.0.1.9:1".parse().unwrap(),
            ..good.clone()
        };
        assert!(reason(&stranger).contains("no pod known"));
        let earlier = Caller {
            uid: "u0".into(),
            ..good.clone()
        };
        assert!(reason(&earlier).contains("another pod now"));
        assert!(reason(&caller("169.254.169.254:443", HOST)).contains("metadata"));
        let members = Members {
            name: "cluster/node-b".into(),
            addresses: vec!["203.0.113.66".parse().unwrap()],
            services: vec![],
        };
        let added = vec![("cluster/node-b".to_owned(), members)];
        owner.apply(Change::Members {
            added,
            removed: vec![],
        });
        assert!(reason(&good).contains("address of the cluster"));
        owner.apply(Change::Policies {
            added: vec![],
            removed: vec!["shop/pay-0".into()],
        });
        assert!(reason(&good).contains("has not sent it yet"));
    }

    #[test]
    fn audit_lets_pass_and_says_what_it_would_have_denied() {
        let (_owner, state) = state(Mode::Audit, rule(EgressProtocol::Tls, 443, false));
        let lie = judge(
            &state.view(),
            &caller("203.0.113.99:443", "other.example"),
            &sni(HOST),
        );
        assert_eq!(lie.verdict, Verdict::AuditWouldDeny);
        assert!(
            lie.reason
                .unwrap()
                .contains("got 203.0.113.99 for other.example")
        );
    }

    #[test]
    fn origination_that_cannot_be_done_is_refused_and_says_so() {
        let (_owner, state) = state(Mode::Enforce, rule(EgressProtocol::Http, 80, true));
        let claim = Claim::Http {
            host: HostName::parse(HOST).ok(),
            method: "GET".into(),
            path: "/".into(),
        };
        let attempt = judge(&state.view(), &caller("203.0.113.66:80", HOST), &claim);
        assert_eq!(attempt.verdict, Verdict::Denied);
        assert!(attempt.reason.unwrap().contains("tls.originate"));
    }
}
