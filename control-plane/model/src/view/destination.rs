use std::{collections::BTreeMap, net::IpAddr};

use turnpike_rules::{
    service::Protocol,
    workload::{Destination, Workload, WorkloadPort},
};

use crate::{Model, facts::pod::Pod, key::Key, protocol};

impl Model {
    /// What stands at `network/ip`. A Service's cluster address goes before a pod's.
    pub fn destination(&self, name: &str) -> Option<Destination> {
        let address: IpAddr = name.rsplit_once('/')?.1.parse().ok()?;
        // One address has one name, so that a change of it is told under that name.
        if self.address_name(&address) != name {
            return None;
        }
        if let Some(service) = self.services.at(&address) {
            return Some(Destination::Service(self.service_key(&service.key)));
        }
        let pod = self.pods.at(&address)?;
        Some(Destination::Workload(self.workload(pod, address)))
    }

    fn workload(&self, pod: &Pod, address: IpAddr) -> Workload {
        let backed = self.backed(pod);
        let service = match backed.as_slice() {
            [(key, _)] => Some(self.service_key(key)),
            _ => None,
        };
        Workload {
            uid: pod.uid.clone(),
            namespace: pod.key.namespace.clone(),
            name: pod.key.name.clone(),
            address,
            identity: pod.mesh_identity(),
            service,
            ports: self.workload_ports(pod, &backed),
            names: Some(pod.names.clone()),
        }
    }

    /// The Services whose callers a pod must let in, with their ports on it: those that select it,
    /// ready or not, and those whose slices name it.
    pub(crate) fn backed(&self, pod: &Pod) -> Vec<(Key, crate::shards::Mapping)> {
        let mut found: BTreeMap<Key, BTreeMap<u16, u16>> = BTreeMap::new();
        for key in self.slices.naming(pod) {
            let Some(slice) = self.slices.get(&key) else {
                continue;
            };
            if let Some(service) = self.services.get(&slice.service)
                && service.key.namespace == pod.key.namespace
            {
                found
                    .entry(service.key.clone())
                    .or_default()
                    .extend(slice.mapping(service));
            }
        }
        for key in self.services.selecting(pod) {
            if let Some(service) = self.services.get(&key) {
                found.entry(key).or_default().extend(service.mapping(pod));
            }
        }
        let listed = found
            .into_iter()
            .map(|(key, ports)| (key, ports.into_iter().collect()));
        listed
            .filter(|(_, ports): &(_, Vec<_>)| !ports.is_empty())
            .collect()
    }

    /// Ports that the pod declares or its Services lead to. Where two Services disagree on what one
    /// speaks, it is detected.
    pub(crate) fn workload_ports(
        &self,
        pod: &Pod,
        backed: &[(Key, crate::shards::Mapping)],
    ) -> Vec<WorkloadPort> {
        let mut ports: BTreeMap<u16, Option<Protocol>> =
            pod.ports.iter().map(|(_, port)| (*port, None)).collect();
        for (key, mapping) in backed {
            let Some(service) = self.services.get(key) else {
                continue;
            };
            for (service_port, target) in mapping {
                let Some(port) = service.port(*service_port) else {
                    continue;
                };
                ports
                    .entry(*target)
                    .and_modify(|known| match known {
                        Some(other) if *other != port.protocol => *known = Some(Protocol::Detect),
                        _ => *known = Some(port.protocol),
                    })
                    .or_insert(Some(port.protocol));
            }
        }
        let declared =
            |port, known: Option<Protocol>| known.unwrap_or_else(|| protocol::by_port(&[port]));
        ports
            .into_iter()
            .map(|(port, known)| WorkloadPort {
                port,
                protocol: declared(port, known),
            })
            .collect()
    }
}
