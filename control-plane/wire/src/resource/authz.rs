//! Authorization policies.

use turnpike_rules::authz::{Authorization, Operation, Policy, Rule, Source, TextPattern};

use super::field::{Read, bad, each, messages, port_numbers, ports, prefix, prefix_messages, text};
use crate::mesh as pb;

pub(super) fn authorization(message: pb::Authorization) -> Read<Authorization> {
    Ok(Authorization {
        deny: each("deny", message.deny, policy)?,
        allow: each("allow", message.allow, policy)?,
    })
}

fn policy(message: pb::Policy) -> Read<Policy> {
    Ok(Policy {
        name: text("name", message.name)?,
        rules: each("rules", message.rules, rule)?,
    })
}

fn rule(message: pb::Rule) -> Read<Rule> {
    Ok(Rule {
        from: each("from", message.from, source)?,
        to: each("to", message.to, operation)?,
    })
}

fn source(message: pb::Source) -> Read<Source> {
    let pb::Source {
        principals,
        not_principals,
        namespaces,
        not_namespaces,
        ip_blocks,
        not_ip_blocks,
    } = message;
    Ok(Source {
        principals: patterns("principals", principals)?,
        not_principals: patterns("not_principals", not_principals)?,
        namespaces: patterns("namespaces", namespaces)?,
        not_namespaces: patterns("not_namespaces", not_namespaces)?,
        ip_blocks: each("ip_blocks", ip_blocks, prefix)?,
        not_ip_blocks: each("not_ip_blocks", not_ip_blocks, prefix)?,
    })
}

fn operation(message: pb::Operation) -> Read<Operation> {
    let pb::Operation {
        hosts,
        not_hosts,
        methods,
        not_methods,
        paths,
        not_paths,
        ports: on_ports,
        not_ports,
    } = message;
    Ok(Operation {
        hosts: patterns("hosts", hosts)?,
        not_hosts: patterns("not_hosts", not_hosts)?,
        methods: patterns("methods", methods)?,
        not_methods: patterns("not_methods", not_methods)?,
        paths: patterns("paths", paths)?,
        not_paths: patterns("not_paths", not_paths)?,
        ports: ports("ports", on_ports)?,
        not_ports: ports("not_ports", not_ports)?,
    })
}

fn patterns(field: &str, messages: Vec<pb::TextPattern>) -> Read<Vec<TextPattern>> {
    use pb::text_pattern::Kind;
    each(field, messages, |message| match message.kind {
        Some(Kind::Exact(text)) => Ok(TextPattern::Exact(text.into())),
        Some(Kind::Prefix(text)) => Ok(TextPattern::Prefix(text.into())),
        Some(Kind::Suffix(text)) => Ok(TextPattern::Suffix(text.into())),
        Some(Kind::Any(true)) => Ok(TextPattern::Any),
        Some(Kind::Any(false)) | None => bad("this kind of pattern is not known to this version"),
    })
}

impl From<&Authorization> for pb::Authorization {
    fn from(authorization: &Authorization) -> Self {
        Self {
            deny: messages(&authorization.deny),
            allow: messages(&authorization.allow),
        }
    }
}

impl From<&Policy> for pb::Policy {
    fn from(policy: &Policy) -> Self {
        Self {
            name: policy.name.to_string(),
            rules: messages(&policy.rules),
        }
    }
}

impl From<&Rule> for pb::Rule {
    fn from(rule: &Rule) -> Self {
        Self {
            from: messages(&rule.from),
            to: messages(&rule.to),
        }
    }
}

impl From<&Source> for pb::Source {
    fn from(source: &Source) -> Self {
        let Source {
            principals,
            not_principals,
            namespaces,
            not_namespaces,
            ip_blocks,
            not_ip_blocks,
        } = source;
        Self {
            principals: messages(principals),
            not_principals: messages(not_principals),
            namespaces: messages(namespaces),
            not_namespaces: messages(not_namespaces),
            ip_blocks: prefix_messages(ip_blocks),
            not_ip_blocks: prefix_messages(not_ip_blocks),
        }
    }
}

impl From<&Operation> for pb::Operation {
    fn from(operation: &Operation) -> Self {
        let Operation {
            hosts,
            not_hosts,
            methods,
            not_methods,
            paths,
            not_paths,
            ports,
            not_ports,
        } = operation;
        Self {
            hosts: messages(hosts),
            not_hosts: messages(not_hosts),
            methods: messages(methods),
            not_methods: messages(not_methods),
            paths: messages(paths),
            not_paths: messages(not_paths),
            ports: port_numbers(ports),
            not_ports: port_numbers(not_ports),
        }
    }
}

impl From<&TextPattern> for pb::TextPattern {
    fn from(pattern: &TextPattern) -> Self {
        use pb::text_pattern::Kind;
        let kind = match pattern {
            TextPattern::Exact(text) => Kind::Exact(text.to_string()),
            TextPattern::Prefix(text) => Kind::Prefix(text.to_string()),
            TextPattern::Suffix(text) => Kind::Suffix(text.to_string()),
            TextPattern::Any => Kind::Any(true),
        };
        Self { kind: Some(kind) }
    }
}
