//! Who may call what: AuthorizationPolicy and its verdicts.
//!
//! As in Istio: a matching DENY refuses; else, where any ALLOW policy selects the workload, one of
//! them must match; else the call is allowed.

use std::sync::Arc;

use ipnet::IpNet;

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
