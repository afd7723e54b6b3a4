//! AuthorizationPolicy.

use std::sync::Arc;

use ipnet::IpNet;
use turnpike_rules::authz::{self, TextPattern};

use super::{
    Invalid, PodSelector,
    egress::qualified,
    problems::{self, Problems},
    selector,
};
use crate::kinds::{
    Action, AuthorizationPolicy, AuthorizationPolicySpec, CallRule, Operation, Source,
};

/// An AuthorizationPolicy, and the pods it is about.
#[derive(Clone, Debug, PartialEq)]
pub struct Authorization {
    pub selector: PodSelector,
    pub action: Action,
    pub policy: authz::Policy,
}

pub fn authorization_policy(object: &AuthorizationPolicy) -> Result<Authorization, Invalid> {
    let AuthorizationPolicySpec {
        selector: typed_selector,
        action,
        rules,
    } = &object.spec;
    let mut problems = Problems::default();
    let selector = selector(&mut problems, "spec.selector", typed_selector.as_ref());
    if rules.is_empty() && *action == Action::Deny {
        problems.add(
            "spec.rules",
            "[]",
            "a DENY without rules denies nothing; `[{}]` denies all",
        );
    }
    let rules = rules
        .iter()
        .enumerate()
        .map(|(i, typed)| rule(&mut problems, &format!("spec.rules[{i}]"), typed))
        .collect();
    let policy = authz::Policy {
        name: qualified(&object.metadata),
        rules,
    };
    let action = *action;
    problems.finish_some(selector.map(|selector| Authorization {
        selector,
        action,
        policy,
    }))
}

fn rule(problems: &mut Problems, field: &str, typed: &CallRule) -> authz::Rule {
    let CallRule { from, to } = typed;
    let from = from
        .iter()
        .enumerate()
        .map(|(i, from)| source(problems, &format!("{field}.from[{i}].source"), &from.source))
        .collect();
    let to = to
        .iter()
        .enumerate()
        .map(|(i, to)| {
            operation(
                problems,
                &format!("{field}.to[{i}].operation"),
                &to.operation,
            )
        })
        .collect();
    authz::Rule { from, to }
}

fn source(problems: &mut Problems, field: &str, typed: &Source) -> authz::Source {
    let Source {
        principals,
        not_principals,
        namespaces,
        not_namespaces,
        ip_blocks,
        not_ip_blocks,
    } = typed;
    if *typed == Source::default() {
        problems.add(
            field,
            "{}",
            "it would match every caller; leave `from` out to mean that",
        );
    }
    let mut texts = |name: &str, list: &[String], check: Check| {
        patterns(problems, &format!("{field}.{name}"), list, check)
    };
    let valid = authz::Source {
        principals: texts("principals", principals, principal),
        not_principals: texts("notPrincipals", not_principals, principal),
        namespaces: texts("namespaces", namespaces, any),
        not_namespaces: texts("notNamespaces", not_namespaces, any),
        ..authz::Source::default()
    };
    authz::Source {
        ip_blocks: blocks(problems, &format!("{field}.ipBlocks"), ip_blocks),
        not_ip_blocks: blocks(problems, &format!("{field}.notIpBlocks"), not_ip_blocks),
        ..valid
    }
}

fn operation(problems: &mut Problems, field: &str, typed: &Operation) -> authz::Operation {
    let Operation {
        hosts,
        not_hosts,
        methods,
        not_methods,
        paths,
        not_paths,
        ports,
        not_ports,
    } = typed;
    if *typed == Operation::default() {
        problems.add(
            field,
            "{}",
            "it would match every call; leave `to` out to mean that",
        );
    }
    for (name, list) in [("ports", ports), ("notPorts", not_ports)] {
        for (i, port) in list.iter().enumerate() {
            problems.take(format!("{field}.{name}[{i}]"), port, problems::port(*port));
        }
    }
    let mut texts = |name: &str, list: &[String], check: Check| {
        patterns(problems, &format!("{field}.{name}"), list, check)
    };
    authz::Operation {
        hosts: texts("hosts", hosts, host),
        not_hosts: texts("notHosts", not_hosts, host),
        methods: texts("methods", methods, method),
        not_methods: texts("notMethods", not_methods, method),
        paths: texts("paths", paths, path),
        not_paths: texts("notPaths", not_paths, path),
        ports: ports.clone(),
        not_ports: not_ports.clone(),
    }
}

/// Whether the text of a pattern, its `*` aside, can match anything at all.
type Check = fn(&TextPattern) -> Result<(), String>;

fn patterns(
    problems: &mut Problems,
    field: &str,
    list: &[String],
    check: Check,
) -> Vec<TextPattern> {
    let valid = list
        .iter()
        .enumerate()
        .filter_map(|(i, text)| problems.take(format!("{field}[{i}]"), text, pattern(text, check)));
    valid.collect()
}

fn pattern(text: &str, check: Check) -> Result<TextPattern, String> {
    let pattern = TextPattern::parse(text);
    match &pattern {
        TextPattern::Exact(inner) | TextPattern::Prefix(inner) | TextPattern::Suffix(inner) => {
            if inner.is_empty() {
                return Err("it is empty; `*` matches all that is not".to_owned());
            }
            if inner.contains('*') {
                return Err("`*` stands alone, first or last, and once".to_owned());
            }
        }
        TextPattern::Any => {}
    }
    check(&pattern).map(|()| pattern)
}

fn any(_: &TextPattern) -> Result<(), String> {
    Ok(())
}

fn principal(pattern: &TextPattern) -> Result<(), String> {
    let allowed = "allowed is cluster.local/ns/NAMESPACE/sa/SERVICE-ACCOUNT";
    match pattern {
        TextPattern::Exact(text) => {
            let uri = format!(
                "spiffe://{}",
                text.strip_prefix("spiffe://").unwrap_or(text)
            );
            uri.parse::<turnpike_rules::Identity>()
                .map(drop)
                .map_err(|_| allowed.to_owned())
        }
        _ => Ok(()),
    }
}

fn host(pattern: &TextPattern) -> Result<(), String> {
    let Some(text) = inner(pattern) else {
        return Ok(());
    };
    if text.contains(':') && text.parse::<std::net::IpAddr>().is_err() {
        Err("hosts are without port; use `ports`".to_owned())
    } else if text.bytes().any(|b| b.is_ascii_uppercase()) {
        Err(format!(
            "hosts are lower case; write {}",
            text.to_ascii_lowercase()
        ))
    } else {
        Ok(())
    }
}

fn method(pattern: &TextPattern) -> Result<(), String> {
    inner(pattern).map_or(Ok(()), |text| problems::method(text).map(drop))
}

fn path(pattern: &TextPattern) -> Result<(), String> {
    match pattern {
        TextPattern::Exact(text) => problems::path(text).map(drop),
        // A prefix may end inside an element, even one that reads `..` so far.
        TextPattern::Prefix(text) if text.ends_with('.') => {
            problems::path(&format!("{text}x")).map(drop)
        }
        TextPattern::Prefix(text) => problems::path(text).map(drop),
        TextPattern::Suffix(text) if !text.starts_with('/') => {
            problems::path(&format!("/x{text}")).map(drop)
        }
        TextPattern::Suffix(text) => problems::path(text).map(drop),
        TextPattern::Any => Ok(()),
    }
}

fn inner(pattern: &TextPattern) -> Option<&Arc<str>> {
    match pattern {
        TextPattern::Exact(text) | TextPattern::Prefix(text) | TextPattern::Suffix(text) => {
            Some(text)
        }
        TextPattern::Any => None,
    }
}

fn blocks(problems: &mut Problems, field: &str, list: &[String]) -> Vec<IpNet> {
    let block = |text: &str| match text.parse::<std::net::IpAddr>() {
        Ok(address) => Ok(IpNet::from(address)),
        Err(_) => problems::cidr(text),
    };
    let valid = list
        .iter()
        .enumerate()
        .filter_map(|(i, text)| problems.take(format!("{field}[{i}]"), text, block(text)));
    valid.collect()
}
