//! Who may call what: AuthorizationPolicy and its verdicts.
//!
//! As in Istio: a matching DENY refuses; else, where any ALLOW policy selects the workload, one of
//! them must match; else the call is allowed.

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::{Identity, path};

/// All policies that select a workload, compiled.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Authorization {
    pub deny: Vec<Policy>,
    pub allow: Vec<Policy>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// One must match. Empty: an ALLOW that allows nothing.
    pub rules: Vec<Rule>,
}

/// Each list that is not empty must have a match.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Rule {
    pub from: Vec<Source>,
    pub to: Vec<Operation>,
}

/// Each field that is not empty must have a match.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Source {
    /// Whole identities, or with a leading or trailing `*`.
    pub principals: Vec<TextPattern>,
    pub not_principals: Vec<TextPattern>,
    pub namespaces: Vec<TextPattern>,
    pub not_namespaces: Vec<TextPattern>,
    pub ip_blocks: Vec<IpNet>,
    pub not_ip_blocks: Vec<IpNet>,
}

/// Each field that is not empty must have a match. A rule with hosts, methods or paths never
/// matches opaque TCP when it allows, and always does when it denies.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Operation {
    pub hosts: Vec<TextPattern>,
    pub not_hosts: Vec<TextPattern>,
    pub methods: Vec<TextPattern>,
    pub not_methods: Vec<TextPattern>,
    pub paths: Vec<TextPattern>,
    pub not_paths: Vec<TextPattern>,
    pub ports: Vec<u16>,
    pub not_ports: Vec<u16>,
}

/// Istio's string match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextPattern {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    /// Present, whatever it is.
    Any,
}

/// One call, as the sidecar knows it: a connection at its start, or one request of it.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Verified by mutual TLS. `None`: plaintext.
    pub identity: Option<&'a Identity>,
    pub source: IpAddr,
    /// The pod's port that is called.
    pub port: u16,
    /// `None`: opaque TCP, or the connection as a whole.
    pub http: Option<HttpCall<'a>>,
}

#[derive(Clone, Copy, Debug)]
pub struct HttpCall<'a> {
    pub method: &'a str,
    /// In the normal form of [`crate::host`], without port; an address as it prints.
    pub host: &'a str,
    /// In the normal form of [`crate::path`].
    pub path: &'a str,
}

/// Whether a call may go on, and which policy said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict<'a> {
    pub allowed: bool,
    /// The policy that matched. `None`: none did; where not allowed, none of the ALLOW policies.
    pub policy: Option<&'a str>,
}

impl fmt::Display for Verdict<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.allowed, self.policy) {
            (true, Some(policy)) => write!(f, "allowed by AuthorizationPolicy {policy}"),
            (true, None) => f.write_str("allowed: no ALLOW policy selects this workload"),
            (false, Some(policy)) => write!(f, "denied by AuthorizationPolicy {policy}"),
            (false, None) => f.write_str(
                "denied: ALLOW policies select this workload and none allows this call; add a rule \
                 for it to one of them",
            ),
        }
    }
}

impl Authorization {
    /// The verdict on a call. For a path that servers may read in two ways, a DENY that matches
    /// either reading denies, and an ALLOW must match both ([`crate::path::lenient`]).
    pub fn check<'a>(&'a self, call: &Call<'_>) -> Verdict<'a> {
        if self.deny.is_empty() && self.allow.is_empty() {
            return Verdict {
                allowed: true,
                policy: None,
            };
        }
        let lenient = call.http.and_then(|http| path::lenient(http.path));
        let strict = Reading {
            path: call.http.map(|http| http.path),
            lenient: false,
        };
        let second = lenient.as_deref().map(|path| Reading {
            path: Some(path),
            lenient: true,
        });

        let denies = |rule: &Rule| {
            rule.matches(call, strict, Action::Deny)
                || second.is_some_and(|reading| rule.matches(call, reading, Action::Deny))
        };
        if let Some(policy) = self
            .deny
            .iter()
            .find(|policy| policy.rules.iter().any(denies))
        {
            return Verdict {
                allowed: false,
                policy: Some(&policy.name),
            };
        }
        if self.allow.is_empty() {
            return Verdict {
                allowed: true,
                policy: None,
            };
        }
        let allows = |rule: &Rule| {
            rule.matches(call, strict, Action::Allow)
                && second.is_none_or(|reading| rule.matches(call, reading, Action::Allow))
        };
        let policy = self
            .allow
            .iter()
            .find(|policy| policy.rules.iter().any(allows));
        Verdict {
            allowed: policy.is_some(),
            policy: policy.map(|policy| &*policy.name),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Allow,
    Deny,
}

/// One way to read the path of a call.
#[derive(Clone, Copy)]
struct Reading<'a> {
    path: Option<&'a str>,
    /// Patterns are then read in the same way.
    lenient: bool,
}

impl Reading<'_> {
    fn matches(&self, pattern: &TextPattern) -> bool {
        let Some(path) = self.path else { return false };
        if self.lenient {
            pattern.lenient().matches(path)
        } else {
            pattern.matches(path)
        }
    }
}

impl Rule {
    fn matches(&self, call: &Call<'_>, reading: Reading<'_>, action: Action) -> bool {
        (self.from.is_empty() || self.from.iter().any(|source| source.matches(call)))
            && (self.to.is_empty() || self.to.iter().any(|to| to.matches(call, reading, action)))
    }
}

impl Source {
    fn matches(&self, call: &Call<'_>) -> bool {
        let Self {
            principals,
            not_principals,
            namespaces,
            not_namespaces,
            ip_blocks,
            not_ip_blocks,
        } = self;
        let address = call.source.to_canonical();
        let principal = |p: &TextPattern| call.identity.is_some_and(|id| p.matches_identity(id));
        let namespace = |p: &TextPattern| call.identity.is_some_and(|id| p.matches(id.namespace()));
        let block = |block: &IpNet| block.contains(&address);
        fits(principals, not_principals, principal)
            && fits(namespaces, not_namespaces, namespace)
            && fits(ip_blocks, not_ip_blocks, block)
    }
}

impl Operation {
    fn matches(&self, call: &Call<'_>, reading: Reading<'_>, action: Action) -> bool {
        let Self {
            hosts,
            not_hosts,
            methods,
            not_methods,
            paths,
            not_paths,
            ports,
            not_ports,
        } = self;
        if !fits(ports, not_ports, |port| *port == call.port) {
            return false;
        }
        let about_http = [hosts, not_hosts, methods, not_methods, paths, not_paths]
            .iter()
            .any(|list| !list.is_empty());
        match call.http {
            _ if !about_http => true,
            None => action == Action::Deny,
            Some(http) => {
                fits(hosts, not_hosts, |p| p.matches(http.host))
                    && fits(methods, not_methods, |p| p.matches(http.method))
                    && fits(paths, not_paths, |p| reading.matches(p))
            }
        }
    }
}

/// The first list, unless empty, must have a hit; the second must have none.
fn fits<T>(any_of: &[T], none_of: &[T], hit: impl Fn(&T) -> bool) -> bool {
    (any_of.is_empty() || any_of.iter().any(&hit)) && !none_of.iter().any(&hit)
}

impl TextPattern {
    /// Istio's notation: `abc`, `abc*`, `*abc`, `*`.
    pub fn parse(text: &str) -> Self {
        match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(""), _) => Self::Any,
            (Some(suffix), _) => Self::Suffix(suffix.into()),
            (None, Some(prefix)) => Self::Prefix(prefix.into()),
            (None, None) => Self::Exact(text.into()),
        }
    }

    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *text,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Any => !text.is_empty(),
        }
    }

    /// Against `TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`, as Istio writes principals; a pattern may
    /// have the URI's `spiffe://` too.
    pub fn matches_identity(&self, identity: &Identity) -> bool {
        let parts = [
            identity.trust_domain(),
            "/ns/",
            identity.namespace(),
            "/sa/",
            identity.service_account(),
        ];
        let bare = |text: &'_ Arc<str>| text.strip_prefix("spiffe://").unwrap_or(text).len();
        match self {
            Self::Exact(text) => {
                let text = &text[text.len() - bare(text)..];
                starts_with(text, &parts) && text.len() == parts.iter().map(|p| p.len()).sum()
            }
            Self::Prefix(text) => starts_with(&text[text.len() - bare(text)..], &parts),
            Self::Suffix(text) => ends_with(text, &parts),
            Self::Any => true,
        }
    }

    fn lenient(&self) -> Self {
        let read = |text: &Arc<str>| path::lenient(text).map_or_else(|| text.clone(), Into::into);
        match self {
            Self::Exact(text) => Self::Exact(read(text)),
            Self::Prefix(text) => Self::Prefix(read(text)),
            Self::Suffix(text) => Self::Suffix(read(text)),
            Self::Any => Self::Any,
        }
    }
}

/// Whether the parts, written one after the other, start with `text`.
fn starts_with(mut text: &str, parts: &[&str]) -> bool {
    for part in parts {
        if text.len() <= part.len() {
            return part.starts_with(text);
        }
        match text.strip_prefix(part) {
            Some(rest) => text = rest,
            None => return false,
        }
    }
    text.is_empty()
}

fn ends_with(mut text: &str, parts: &[&str]) -> bool {
    for part in parts.iter().rev() {
        if text.len() <= part.len() {
            return part.ends_with(text);
        }
        match text.strip_suffix(part) {
            Some(rest) => text = rest,
            None => return false,
        }
    }
    text.is_empty()
}

#[cfg(test)]
mod tests;
