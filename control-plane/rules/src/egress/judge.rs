//! The verdicts: name, connection, request.
//!
//! Every rule of every policy is asked; each says yes, or how far the attempt got. The first yes
//! wins. Without one, the rule that the attempt got furthest with gives the reason. It passes all
//! the same, marked, where every policy of the pod is in Audit mode: observing never weakens what
//! another policy enforces.

use super::{
    Connect, EgressPolicy, EgressProtocol, EgressRule, Grade, Mode, Reason, Request, Transport,
    Verdict,
};
use crate::{address, host::HostName, pod::PodEgress};

/// How far an attempt got with a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// The rule is about something else.
    Unrelated,
    /// It has the host, but not the port and protocol.
    Port,
    /// And those, but the address was not resolved for the host.
    Binding,
    Method,
    Path,
    Allowed,
}

impl PodEgress {
    /// Whether the pod may ask DNS for a name: it may if any rule has it, on whatever port.
    pub fn resolve(&self, name: &HostName) -> Verdict {
        self.judge(
            |rule| {
                if rule.has_host(name) {
                    Step::Allowed
                } else {
                    Step::Unrelated
                }
            },
            |_| Grade::DnsBound,
            |_| Reason::NoRuleForHost { host: name.clone() },
        )
    }

    /// Whether the pod may open a connection. For plaintext HTTP, [`Self::request`] must be asked
    /// for each request as well.
    pub fn connect(&self, connect: &Connect<'_>) -> Verdict {
        self.attempt(connect, None)
    }

    /// Whether a request may go out on a plaintext HTTP connection. `connect` names the host of
    /// this request, which need not be that of the first one.
    pub fn request(&self, connect: &Connect<'_>, request: &Request<'_>) -> Verdict {
        self.attempt(connect, Some(request))
    }

    /// Whether what no policy allows passes: nothing is enforced on the pod, it is only observed.
    pub fn only_audits(&self) -> bool {
        let audits = |policy: &EgressPolicy| policy.mode == Mode::Audit;
        !self.policies.is_empty() && self.policies.iter().all(audits)
    }

    fn attempt(&self, connect: &Connect<'_>, request: Option<&Request<'_>>) -> Verdict {
        // Before any rule and any mode: dialled by the gate, these would lead to the node itself.
        if !self.policies.is_empty()
            && let Some(special) = address::special(connect.address)
        {
            let reason = Reason::SpecialAddress {
                address: connect.address,
                special,
            };
            return deny(self.policies.first(), None, reason);
        }
        self.judge(
            |rule| rule.judge(connect, request),
            |rule| grade(connect, rule),
            |step| self.reason(connect, request, step),
        )
    }

    fn judge(
        &self,
        ask: impl Fn(&EgressRule) -> Step,
        grade: impl Fn(Option<&EgressRule>) -> Grade,
        reason: impl Fn(Step) -> Reason,
    ) -> Verdict {
        let Some(first) = self.policies.first() else {
            return not_selected();
        };
        let mut closest = (Step::Unrelated, first, None);
        for policy in &self.policies {
            for rule in &policy.rules {
                let step = ask(rule);
                if step == Step::Allowed {
                    return allow(policy, rule, grade(Some(rule)));
                }
                if step > closest.0 {
                    closest = (step, policy, Some(rule));
                }
            }
        }
        let (step, policy, rule) = closest;
        let denied = deny(Some(policy), rule, reason(step));
        if !self.only_audits() {
            return denied;
        }
        Verdict {
            allowed: true,
            would_deny: true,
            grade: grade(None),
            ..denied
        }
    }

    fn reason(&self, connect: &Connect<'_>, request: Option<&Request<'_>>, step: Step) -> Reason {
        let Connect {
            address,
            port,
            transport,
            bound,
        } = *connect;
        let protocol = transport.protocol();
        let Some(host) = transport.claimed() else {
            return match transport {
                Transport::Tls { .. } => Reason::NoSni { address, port },
                Transport::Http { .. } => Reason::NoHost { address, port },
                _ => Reason::NoRuleForAddress {
                    address,
                    port,
                    protocol,
                },
            };
        };
        let host = host.clone();
        match (step, request) {
            (Step::Port, _) => {
                let allowed = self.ports_of(&host).into();
                Reason::PortNotAllowed {
                    host,
                    port,
                    protocol,
                    allowed,
                }
            }
            (Step::Binding, _) => Reason::NotResolved {
                host,
                address,
                bound: bound.first().cloned(),
            },
            (Step::Method, Some(request)) => Reason::MethodNotAllowed {
                host,
                method: request.method.into(),
            },
            (Step::Path, Some(request)) => Reason::PathNotAllowed {
                host,
                path: request.path.into(),
            },
            _ => Reason::NoRuleForHost { host },
        }
    }

    /// `443/TLS, 80/HTTP`: where the host is allowed.
    fn ports_of(&self, host: &HostName) -> String {
        let rules = self.policies.iter().flat_map(|policy| &policy.rules);
        let mut ports: Vec<String> = Vec::new();
        for port in rules
            .filter(|rule| rule.has_host(host))
            .flat_map(|rule| &rule.ports)
        {
            let port = port.to_string();
            if !ports.contains(&port) {
                ports.push(port);
            }
        }
        ports.join(", ")
    }
}

impl EgressRule {
    fn has_host(&self, name: &HostName) -> bool {
        self.hosts.iter().any(|pattern| pattern.matches(name))
    }

    fn judge(&self, connect: &Connect<'_>, request: Option<&Request<'_>>) -> Step {
        let protocol = connect.transport.protocol();
        if !self.cidrs.is_empty() && !self.cidrs.iter().any(|c| c.contains(&connect.address)) {
            return Step::Unrelated;
        }
        if self.hosts.is_empty() {
            return match self.cidrs.is_empty() || !self.has_port(connect.port, protocol) {
                true => Step::Unrelated,
                false => self.judge_http(request),
            };
        }
        let Some(name) = connect
            .transport
            .claimed()
            .filter(|name| self.has_host(name))
        else {
            return Step::Unrelated;
        };
        if !self.has_port(connect.port, protocol) {
            Step::Port
        } else if !connect.bound.contains(name) {
            Step::Binding
        } else {
            self.judge_http(request)
        }
    }

    /// A rule of addresses alone takes opaque TCP to mean anything over TCP; one with hosts needs
    /// the protocol that names them.
    fn has_port(&self, port: u16, protocol: EgressProtocol) -> bool {
        let by_address = self.hosts.is_empty();
        let protocol_fits = |allowed: EgressProtocol| match allowed {
            EgressProtocol::Tcp => by_address && protocol != EgressProtocol::Udp,
            EgressProtocol::Udp => by_address && protocol == EgressProtocol::Udp,
            // What is inside TLS cannot be held to a method or path.
            EgressProtocol::Tls => protocol == EgressProtocol::Tls && self.http.is_none(),
            EgressProtocol::Http => protocol == EgressProtocol::Http,
        };
        self.ports
            .iter()
            .any(|p| (p.port..=p.end_port).contains(&port) && protocol_fits(p.protocol))
    }

    fn judge_http(&self, request: Option<&Request<'_>>) -> Step {
        let (Some(rules), Some(request)) = (&self.http, request) else {
            return Step::Allowed;
        };
        if !rules.methods.is_empty() && !rules.methods.iter().any(|m| **m == *request.method) {
            return Step::Method;
        }
        if rules.paths.is_empty() {
            return Step::Allowed;
        }
        // Patterns go by whole elements, so that what a path matches as it stands, it also matches
        // in its lenient reading (`path::lenient`).
        if rules
            .paths
            .iter()
            .any(|pattern| pattern.matches(request.path))
        {
            Step::Allowed
        } else {
            Step::Path
        }
    }
}

/// What the gate knows by itself of the other end; `rule` is the one that allows.
fn grade(connect: &Connect<'_>, rule: Option<&EgressRule>) -> Grade {
    let named = connect
        .transport
        .claimed()
        .is_some_and(|name| connect.bound.contains(name));
    let http = connect.transport.protocol() == EgressProtocol::Http;
    match rule {
        Some(rule) if rule.originate_tls && named && http => Grade::HttpVerified,
        _ if named => Grade::SniDns,
        _ if !connect.bound.is_empty() => Grade::DnsBound,
        _ => Grade::L3,
    }
}

fn allow(policy: &EgressPolicy, rule: &EgressRule, grade: Grade) -> Verdict {
    Verdict {
        allowed: true,
        would_deny: false,
        policy: Some(policy.name.clone()),
        version: Some(policy.version.clone()),
        rule: Some(rule.id.clone()),
        reason: Reason::Rule,
        grade,
        originate_tls: rule.originate_tls,
    }
}

fn deny(policy: Option<&EgressPolicy>, rule: Option<&EgressRule>, reason: Reason) -> Verdict {
    Verdict {
        allowed: false,
        would_deny: false,
        policy: policy.map(|policy| policy.name.clone()),
        version: policy.map(|policy| policy.version.clone()),
        rule: rule.map(|rule| rule.id.clone()),
        reason,
        grade: Grade::L3,
        originate_tls: false,
    }
}

fn not_selected() -> Verdict {
    Verdict {
        allowed: true,
        ..deny(None, None, Reason::NotSelected)
    }
}
