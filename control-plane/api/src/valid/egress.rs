//! EgressPolicy.

use std::{fmt::Write as _, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use sha2::{Digest, Sha256};
use turnpike_rules::{
    address,
    egress::{EgressPolicy as Policy, EgressPort, EgressProtocol, EgressRule, HttpRules, Mode},
    host::HostPattern,
    pod::{InboundPort, Transport},
    route::PathMatch,
};

use super::{
    Invalid, PodSelector,
    problems::{self, Problems},
    selector,
};
use crate::kinds::{self, AllowRule, EgressPolicy, EgressPolicySpec, HttpRule, Protocol};

/// An EgressPolicy, and the pods it is about.
#[derive(Clone, Debug, PartialEq)]
pub struct Egress {
    pub selector: PodSelector,
    pub policy: Policy,
    pub inbound: Vec<InboundPort>,
}

pub fn egress_policy(object: &EgressPolicy) -> Result<Egress, Invalid> {
    let EgressPolicySpec {
        selector: typed_selector,
        mode,
        allow,
        inbound,
    } = &object.spec;
    let mut problems = Problems::default();
    let selector = selector(&mut problems, "spec.selector", typed_selector.as_ref());
    let rules = allow
        .iter()
        .enumerate()
        .map(|(i, typed)| rule(&mut problems, &format!("allow[{i}]"), typed))
        .collect();
    let policy = Policy {
        name: qualified(&object.metadata),
        version: version(&object.spec),
        mode: match mode {
            kinds::Mode::Enforce => Mode::Enforce,
            kinds::Mode::Audit => Mode::Audit,
        },
        rules,
    };
    let inbound = inbound_ports(&mut problems, inbound);
    problems.finish_some(selector.map(|selector| Egress {
        selector,
        policy,
        inbound,
    }))
}

/// `namespace/name`.
pub(super) fn qualified(metadata: &ObjectMeta) -> Arc<str> {
    let namespace = metadata.namespace.as_deref().unwrap_or("default");
    format!(
        "{namespace}/{}",
        metadata.name.as_deref().unwrap_or_default()
    )
    .into()
}

/// Of the content, so that a record proves under which text it was made, wherever that came from.
fn version(spec: &impl Serialize) -> Arc<str> {
    // What was just read from JSON can be written as JSON; a failure would still give a version.
    let json = serde_json::to_vec(spec).unwrap_or_default();
    let mut version = String::with_capacity(16);
    for byte in &Sha256::digest(&json)[..8] {
        let _ = write!(version, "{byte:02x}");
    }
    version.into()
}

fn rule(problems: &mut Problems, id: &str, typed: &AllowRule) -> EgressRule {
    let AllowRule {
        hosts,
        cidrs,
        ports,
        http,
        tls,
    } = typed;
    let field = format!("spec.{id}");
    let originate_tls = tls.as_ref().is_some_and(|tls| tls.originate);
    check_shape(problems, &field, typed, originate_tls);
    EgressRule {
        id: id.into(),
        hosts: hosts
            .iter()
            .enumerate()
            .filter_map(|(i, host)| {
                problems.take(
                    format!("{field}.hosts[{i}]"),
                    host,
                    HostPattern::parse(host),
                )
            })
            .collect(),
        cidrs: cidrs
            .iter()
            .enumerate()
            .filter_map(|(i, text)| problems.take(format!("{field}.cidrs[{i}]"), text, cidr(text)))
            .collect(),
        ports: ports
            .iter()
            .enumerate()
            .filter_map(|(i, port)| self::port(problems, &format!("{field}.ports[{i}]"), port))
            .collect(),
        http: http
            .as_ref()
            .map(|http| http_rules(problems, &format!("{field}.http"), http)),
        originate_tls,
    }
}

/// How the parts of a rule fit together; the same as the CEL rules of the CRD.
fn check_shape(problems: &mut Problems, field: &str, typed: &AllowRule, originate: bool) {
    let AllowRule {
        hosts,
        cidrs,
        ports,
        http,
        ..
    } = typed;
    if hosts.is_empty() == cidrs.is_empty() {
        let value = if hosts.is_empty() { "neither" } else { "both" };
        problems.add(
            field,
            value,
            "a rule has either hosts or cidrs; write two rules for both",
        );
    }
    if ports.is_empty() {
        problems.add(
            format!("{field}.ports"),
            "[]",
            "name the ports, as in {port: 443, protocol: TLS}",
        );
    }
    for (i, port) in ports.iter().enumerate() {
        let field = format!("{field}.ports[{i}].protocol");
        let value = protocol(port.protocol);
        if !hosts.is_empty() && matches!(port.protocol, Protocol::Tcp | Protocol::Udp) {
            let allowed = "with hosts, allowed are TLS and HTTP: nothing in TCP or UDP names a \
                           host; use cidrs for them";
            problems.add(&field, value, allowed);
        } else if port.protocol != Protocol::Http && http.is_some() {
            let allowed = "with http, allowed is HTTP: what is inside TLS is not seen";
            problems.add(&field, value, allowed);
        } else if port.protocol != Protocol::Http && originate {
            let allowed = "with tls.originate, allowed is HTTP: the pod speaks HTTP, the gate TLS";
            problems.add(&field, value, allowed);
        }
    }
    if originate && hosts.is_empty() {
        let allowed = "it needs hosts, since the certificate is verified against the name";
        problems.add(format!("{field}.tls.originate"), true, allowed);
    }
}

fn cidr(text: &str) -> Result<ipnet::IpNet, String> {
    let net = problems::cidr(text)?;
    match (
        address::special(net.network()),
        address::special(net.broadcast()),
    ) {
        (Some(first), Some(last)) if first == last => Err(format!(
            "it is {}, which no policy can open",
            first.as_str()
        )),
        _ => Ok(net),
    }
}

fn protocol(typed: Protocol) -> EgressProtocol {
    match typed {
        Protocol::Tls => EgressProtocol::Tls,
        Protocol::Http => EgressProtocol::Http,
        Protocol::Tcp => EgressProtocol::Tcp,
        Protocol::Udp => EgressProtocol::Udp,
    }
}

fn port(problems: &mut Problems, field: &str, typed: &kinds::AllowPort) -> Option<EgressPort> {
    let kinds::AllowPort {
        port,
        end_port,
        protocol: typed_protocol,
    } = *typed;
    let end_port = end_port.unwrap_or(port);
    if end_port < port {
        let allowed = format!("the last port of a range, not below port {port}");
        problems.add(format!("{field}.endPort"), end_port, allowed);
    }
    let port = problems.take(format!("{field}.port"), port, problems::port(port))?;
    Some(EgressPort {
        port,
        end_port,
        protocol: protocol(typed_protocol),
    })
}

fn http_rules(problems: &mut Problems, field: &str, typed: &HttpRule) -> HttpRules {
    let HttpRule { methods, paths } = typed;
    let methods = methods.iter().enumerate().filter_map(|(i, method)| {
        problems.take(
            format!("{field}.methods[{i}]"),
            method,
            problems::method(method),
        )
    });
    let methods = methods.map(Arc::from).collect();
    let paths = paths.iter().enumerate().filter_map(|(i, path)| {
        let field = format!("{field}.paths[{i}]");
        match (&path.exact, &path.prefix) {
            (Some(exact), None) => problems
                .take(format!("{field}.exact"), exact, problems::path(exact))
                .map(|path| PathMatch::Exact(path.into())),
            (None, Some(prefix)) => problems
                .take(format!("{field}.prefix"), prefix, problems::path(prefix))
                .map(PathMatch::prefix),
            (both, _) => {
                let value = if both.is_some() { "both" } else { "neither" };
                problems.add(field, value, "a path is either exact or a prefix");
                None
            }
        }
    });
    HttpRules {
        methods,
        paths: paths.collect(),
    }
}

fn inbound_ports(problems: &mut Problems, typed: &[kinds::InboundRule]) -> Vec<InboundPort> {
    let mut ports = Vec::new();
    for (i, rule) in typed.iter().enumerate() {
        let field = format!("spec.inbound[{i}].ports");
        if rule.ports.is_empty() {
            problems.add(
                &field,
                "[]",
                "name the ports, as in {port: 8080, protocol: TCP}",
            );
        }
        for (j, kinds::InboundPort { port, protocol }) in rule.ports.iter().enumerate() {
            let transport = match protocol {
                kinds::InboundProtocol::Tcp => Transport::Tcp,
                kinds::InboundProtocol::Udp => Transport::Udp,
            };
            let valid = problems.take(format!("{field}[{j}].port"), port, problems::port(*port));
            ports.extend(valid.map(|port| InboundPort { transport, port }));
        }
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}
