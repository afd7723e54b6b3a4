//! Services.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::core::v1::{Service as ServiceObject, ServicePort as PortObject},
    apimachinery::pkg::util::intstr::IntOrString,
};
use turnpike_rules::service::Protocol;

use super::pod::Pod;
use crate::{
    key::{Birth, Key},
    protocol,
    selector::Selector,
    shards::Mapping,
};

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Service {
    pub(crate) key: Key,
    pub(crate) birth: Birth,
    /// `None`: its endpoints are written by somebody else.
    pub(crate) selector: Option<Selector>,
    pub(crate) vips: Vec<IpAddr>,
    pub(crate) ports: Vec<Port>,
    pub(crate) unready_too: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Port {
    pub(crate) number: u16,
    pub(crate) name: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) target: Target,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Target {
    Number(u16),
    Name(String),
}

impl Service {
    /// `None` for an ExternalName: it stands for a name outside the mesh, reached like any other.
    pub(crate) fn read(object: &ServiceObject) -> Option<Self> {
        let key = Key::of(&object.metadata);
        let spec = object.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let selector = spec.selector.clone().filter(|labels| !labels.is_empty());
        let mut vips = Vec::new();
        for address in spec
            .cluster_ip
            .iter()
            .chain(spec.cluster_ips.iter().flatten())
        {
            if let Ok(address) = address.parse()
                && !vips.contains(&address)
            {
                vips.push(address);
            }
        }
        let mut ports: Vec<Port> = spec.ports.iter().flatten().filter_map(Port::read).collect();
        ports.sort_by_key(|port| port.number);
        ports.dedup_by_key(|port| port.number);
        Some(Self {
            birth: Birth::of(&object.metadata),
            selector: selector.map(Selector::labels),
            vips,
            ports,
            unready_too: spec.publish_not_ready_addresses.unwrap_or(false),
            key,
        })
    }

    pub(crate) fn selects(&self, pod: &Pod) -> bool {
        pod.key.namespace == self.key.namespace
            && self
                .selector
                .as_ref()
                .is_some_and(|selector| selector.matches(&pod.labels))
    }

    /// Its ports on one pod. A named port that the pod does not have is left out.
    pub(crate) fn mapping(&self, pod: &Pod) -> Mapping {
        let resolve = |port: &Port| match &port.target {
            Target::Number(number) => Some((port.number, *number)),
            Target::Name(name) => Some((port.number, pod.named_port(name)?)),
        };
        self.ports.iter().filter_map(resolve).collect()
    }

    pub(crate) fn port(&self, number: u16) -> Option<&Port> {
        self.ports.iter().find(|port| port.number == number)
    }
}

impl Port {
    /// `None` where it is not TCP.
    fn read(object: &PortObject) -> Option<Self> {
        if object
            .protocol
            .as_deref()
            .is_some_and(|protocol| protocol != "TCP")
        {
            return None;
        }
        let valid = |number: i32| u16::try_from(number).ok().filter(|number| *number > 0);
        let number = valid(object.port)?;
        let target = match &object.target_port {
            None => Target::Number(number),
            Some(IntOrString::Int(0)) => Target::Number(number),
            Some(IntOrString::Int(target)) => Target::Number(valid(*target)?),
            Some(IntOrString::String(text)) => match text.parse() {
                Ok(target) => Target::Number(target),
                Err(_) => Target::Name(text.clone()),
            },
        };
        let name = object.name.as_deref().unwrap_or_default();
        let ports = match target {
            Target::Number(target) => vec![number, target],
            Target::Name(_) => vec![number],
        };
        let protocol = protocol::declared(object.app_protocol.as_deref(), name, &ports);
        Some(Self {
            number,
            name: name.into(),
            protocol,
            target,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(yaml: &str) -> Option<Service> {
        Service::read(&serde_saphyr::from_str(yaml).unwrap())
    }

    #[test]
    fn what_is_kept() {
        let service = read(
            "{metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.96.0.1, \
             clusterIPs: [10.96.0.1, 'fd00::1'], selector: {app: web}, ports: [\
             {port: 443, name: https, targetPort: tls}, {port: 80, targetPort: '8080'}, \
             {port: 53, protocol: UDP}, {port: 70000}]}}",
        )
        .unwrap();
        assert_eq!(service.vips.len(), 2);
        let ports: Vec<_> = service
            .ports
            .iter()
            .map(|p| (p.number, p.target.clone()))
            .collect();
        assert_eq!(
            ports,
            [
                (80, Target::Number(8080)),
                (443, Target::Name("tls".into()))
            ]
        );
        let headless = "{metadata: {name: db}, spec: {clusterIP: None, ports: [{port: 5432}]}}";
        let headless = read(headless).unwrap();
        assert!(headless.vips.is_empty() && headless.selector.is_none());
        assert_eq!(headless.ports[0].protocol, Protocol::Tcp);
        assert!(
            read("{metadata: {name: x}, spec: {type: ExternalName, externalName: a.b}}").is_none()
        );
    }
}
