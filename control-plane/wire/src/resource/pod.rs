//! What the agent and the gate of a node know.

use turnpike_rules::{
    egress::{EgressPolicy, EgressPort, EgressProtocol, EgressRule, HttpRules, Mode},
    host::HostPattern,
    pod::{Capture, InboundPort, Members, PodEgress, PodNetwork, Transport},
};

use super::{
    field::{
        FieldError, Read, each, identity, ip, ip_bytes, messages, method, optional, port,
        port_numbers, ports, prefix, prefix_messages, required, strings, text, within,
    },
    route::path_match,
    understood,
};
use crate::mesh as pb;

pub(super) fn network(asked: &str, message: pb::PodNetwork) -> Read<PodNetwork> {
    let pb::PodNetwork {
        uid,
        namespace,
        name,
        identity: own,
        capture,
        selected,
        inbound,
        must_understand,
    } = message;
    understood(&must_understand)?;
    check_name(asked, &namespace, &name)?;
    Ok(PodNetwork {
        uid: text("uid", uid)?,
        namespace: namespace.into(),
        name: name.into(),
        identity: required("identity", own, identity)?,
        capture: optional("capture", capture, self::capture)?,
        selected,
        inbound: each("inbound", inbound, |message| {
            let transport = if message.udp {
                Transport::Udp
            } else {
                Transport::Tcp
            };
            Ok(InboundPort {
                transport,
                port: within("port", port(message.port))?,
            })
        })?,
    })
}

fn capture(message: pb::Capture) -> Read<Capture> {
    let pb::Capture {
        proxy_uid,
        outbound_port,
        inbound_port,
        probe_ports,
    } = message;
    Ok(Capture {
        proxy_uid,
        outbound_port: within("outbound_port", port(outbound_port))?,
        inbound_port: within("inbound_port", port(inbound_port))?,
        probe_ports: ports("probe_ports", probe_ports)?,
    })
}

pub(super) fn egress(asked: &str, message: pb::PodEgress) -> Read<PodEgress> {
    let pb::PodEgress {
        uid,
        namespace,
        name,
        identity: own,
        policies,
        must_understand,
    } = message;
    understood(&must_understand)?;
    check_name(asked, &namespace, &name)?;
    Ok(PodEgress {
        uid: text("uid", uid)?,
        namespace: namespace.into(),
        name: name.into(),
        identity: required("identity", own, identity)?,
        policies: each("policies", policies, policy)?,
    })
}

fn policy(message: pb::EgressPolicy) -> Read<EgressPolicy> {
    let pb::EgressPolicy {
        name,
        version,
        audit_only,
        rules,
    } = message;
    Ok(EgressPolicy {
        name: text("name", name)?,
        version: text("version", version)?,
        mode: if audit_only {
            Mode::Audit
        } else {
            Mode::Enforce
        },
        rules: each("rules", rules, rule)?,
    })
}

fn rule(message: pb::EgressRule) -> Read<EgressRule> {
    let pb::EgressRule {
        id,
        hosts,
        cidrs,
        ports,
        http,
        originate_tls,
    } = message;
    let ports = each("ports", ports, egress_port)?;
    if ports.is_empty() {
        return Err(FieldError::new(
            "ports",
            "is empty; at least one port is needed",
        ));
    }
    let nameless =
        |port: &EgressPort| matches!(port.protocol, EgressProtocol::Tcp | EgressProtocol::Udp);
    if cidrs.is_empty() && ports.iter().any(nameless) {
        let reason = "TCP and UDP need cidrs: nothing in them names a host";
        return Err(FieldError::new("ports", reason));
    }
    Ok(EgressRule {
        id: text("id", id)?,
        hosts: each("hosts", hosts, host_pattern)?,
        cidrs: each("cidrs", cidrs, prefix)?,
        ports,
        http: optional("http", http, http_rules)?,
        originate_tls,
    })
}

fn host_pattern(pattern: String) -> Read<HostPattern> {
    HostPattern::parse(&pattern).map_err(|e| FieldError::new("", format!("`{pattern}`: {e}")))
}

fn egress_port(message: pb::EgressPort) -> Read<EgressPort> {
    let pb::EgressPort {
        port: first,
        end_port,
        protocol,
    } = message;
    let first = within("port", port(first))?;
    let end_port = within("end_port", port(end_port))?;
    if end_port < first {
        return Err(FieldError::new(
            "end_port",
            format!("{end_port} is before {first}"),
        ));
    }
    let protocol = match pb::EgressProtocol::try_from(protocol) {
        Ok(pb::EgressProtocol::EgressTls) => EgressProtocol::Tls,
        Ok(pb::EgressProtocol::EgressHttp) => EgressProtocol::Http,
        Ok(pb::EgressProtocol::EgressTcp) => EgressProtocol::Tcp,
        Ok(pb::EgressProtocol::EgressUdp) => EgressProtocol::Udp,
        Ok(pb::EgressProtocol::EgressUnknown) | Err(_) => {
            let reason = format!("protocol {protocol} is not known to this version");
            return Err(FieldError::new("protocol", reason));
        }
    };
    Ok(EgressPort {
        port: first,
        end_port,
        protocol,
    })
}

fn http_rules(message: pb::HttpRules) -> Read<HttpRules> {
    Ok(HttpRules {
        methods: each("methods", message.methods, |name| method(&name))?,
        paths: each("paths", message.paths, path_match)?,
    })
}

pub(super) fn members(asked: &str, message: pb::Members) -> Read<Members> {
    match asked.split_once('/') {
        Some((cluster, node)) if !cluster.is_empty() && !node.is_empty() => Ok(Members {
            name: asked.into(),
            addresses: each("addresses", message.addresses, ip)?,
            services: each("services", message.services, prefix)?,
        }),
        _ => Err(FieldError::new("", "the name is not cluster/node")),
    }
}

/// `cluster/namespace/pod` names the pod that the content is about.
fn check_name(asked: &str, namespace: &str, name: &str) -> Read<()> {
    let parts: Vec<&str> = asked.split('/').collect();
    match parts[..] {
        [cluster, of, pod]
            if !cluster.is_empty()
                && !of.is_empty()
                && !pod.is_empty()
                && (of, pod) == (namespace, name) =>
        {
            Ok(())
        }
        _ => Err(FieldError::new(
            "name",
            format!("{namespace}/{name} is not what the name says"),
        )),
    }
}

impl From<&PodNetwork> for pb::PodNetwork {
    fn from(pod: &PodNetwork) -> Self {
        let PodNetwork {
            uid,
            namespace,
            name,
            identity,
            capture,
            selected,
            inbound,
        } = pod;
        Self {
            uid: uid.to_string(),
            namespace: namespace.to_string(),
            name: name.to_string(),
            identity: Some(identity.into()),
            capture: capture.as_ref().map(Into::into),
            selected: *selected,
            inbound: inbound
                .iter()
                .map(|inbound| pb::InboundPort {
                    udp: inbound.transport == Transport::Udp,
                    port: inbound.port.into(),
                })
                .collect(),
            must_understand: Vec::new(),
        }
    }
}

impl From<&Capture> for pb::Capture {
    fn from(capture: &Capture) -> Self {
        let Capture {
            proxy_uid,
            outbound_port,
            inbound_port,
            probe_ports,
        } = capture;
        Self {
            proxy_uid: *proxy_uid,
            outbound_port: (*outbound_port).into(),
            inbound_port: (*inbound_port).into(),
            probe_ports: port_numbers(probe_ports),
        }
    }
}

impl From<&PodEgress> for pb::PodEgress {
    fn from(pod: &PodEgress) -> Self {
        let PodEgress {
            uid,
            namespace,
            name,
            identity,
            policies,
        } = pod;
        Self {
            uid: uid.to_string(),
            namespace: namespace.to_string(),
            name: name.to_string(),
            identity: Some(identity.into()),
            policies: messages(policies),
            must_understand: Vec::new(),
        }
    }
}

impl From<&EgressPolicy> for pb::EgressPolicy {
    fn from(policy: &EgressPolicy) -> Self {
        let EgressPolicy {
            name,
            version,
            mode,
            rules,
        } = policy;
        Self {
            name: name.to_string(),
            version: version.to_string(),
            audit_only: *mode == Mode::Audit,
            rules: messages(rules),
        }
    }
}

impl From<&EgressRule> for pb::EgressRule {
    fn from(rule: &EgressRule) -> Self {
        let EgressRule {
            id,
            hosts,
            cidrs,
            ports,
            http,
            originate_tls,
        } = rule;
        Self {
            id: id.to_string(),
            hosts: hosts.iter().map(ToString::to_string).collect(),
            cidrs: prefix_messages(cidrs),
            ports: messages(ports),
            http: http.as_ref().map(|http| pb::HttpRules {
                methods: strings(&http.methods),
                paths: messages(&http.paths),
            }),
            originate_tls: *originate_tls,
        }
    }
}

impl From<&EgressPort> for pb::EgressPort {
    fn from(port: &EgressPort) -> Self {
        let protocol = match port.protocol {
            EgressProtocol::Tls => pb::EgressProtocol::EgressTls,
            EgressProtocol::Http => pb::EgressProtocol::EgressHttp,
            EgressProtocol::Tcp => pb::EgressProtocol::EgressTcp,
            EgressProtocol::Udp => pb::EgressProtocol::EgressUdp,
        };
        Self {
            port: port.port.into(),
            end_port: port.end_port.into(),
            protocol: protocol.into(),
        }
    }
}

impl From<&Members> for pb::Members {
    fn from(members: &Members) -> Self {
        Self {
            addresses: members.addresses.iter().copied().map(ip_bytes).collect(),
            services: prefix_messages(&members.services),
        }
    }
}
