use std::sync::Arc;

use ipnet::IpNet;
use turnpike_rules::{
    authz::Authorization,
    service::PortMapping,
    workload::{BackedService, MtlsMode, SelfConfig, Telemetry},
};

use crate::{Model, facts::pod::Pod, store::Selected};

impl Model {
    /// Ranges that may hold pods and Services of the mesh.
    pub fn mesh_prefixes(&self) -> &[IpNet] {
        &self.mesh.mesh_prefixes
    }

    /// What the sidecar of the pod with this UID needs to serve what comes in.
    pub fn self_config(&self, uid: &str) -> Option<SelfConfig> {
        let pod = self.pods.by_uid(uid)?;
        let backed = self.backed(pod);
        let (mtls, port_mtls) = self.mtls(pod);
        let ports = self.workload_ports(pod, &backed);
        let backs = backed.into_iter().map(|(key, mapping)| BackedService {
            key: self.service_key(&key),
            ports: mapping
                .into_iter()
                .map(|(service_port, target_port)| PortMapping {
                    service_port,
                    target_port,
                })
                .collect(),
        });
        Some(SelfConfig {
            uid: pod.uid.clone(),
            namespace: pod.key.namespace.clone(),
            name: pod.key.name.clone(),
            identity: pod.identity.clone(),
            names: pod.names.clone(),
            zone: self.pods.zone(pod),
            ports,
            probe_ports: pod.probe_ports.clone(),
            mtls,
            port_mtls,
            authorization: self.authorization_of(pod),
            backs: backs.collect(),
            telemetry: self.telemetry_of(pod),
            mesh_prefixes: self.mesh.mesh_prefixes.clone(),
        })
    }

    /// The narrowest PeerAuthentication that states a mode: of the workload, the namespace, the
    /// mesh; then MeshConfig. Of several of one width the oldest holds.
    fn mtls(&self, pod: &Pod) -> (MtlsMode, Vec<(u16, MtlsMode)>) {
        let policies = narrowest_first(self.peers.selecting(pod));
        let mode = policies.iter().find_map(|policy| policy.content.mode);
        let own = policies
            .first()
            .filter(|policy| !policy.selector.is_empty());
        let ports = own
            .map(|policy| policy.content.ports.clone())
            .unwrap_or_default();
        (mode.unwrap_or(self.mesh.mtls), ports)
    }

    /// Each setting from the narrowest Telemetry that states it; then MeshConfig's.
    fn telemetry_of(&self, pod: &Pod) -> Telemetry {
        let policies = narrowest_first(self.telemetry.selecting(pod));
        let sampling = policies.iter().find_map(|policy| policy.content.sampling);
        let access_log = policies.iter().find_map(|policy| policy.content.access_log);
        Telemetry {
            sampling: sampling.unwrap_or(self.mesh.telemetry.sampling),
            access_log: access_log.unwrap_or(self.mesh.telemetry.access_log),
        }
    }

    fn authorization_of(&self, pod: &Pod) -> Authorization {
        let mut compiled = Authorization::default();
        for policy in self.authorization.selecting(pod) {
            let list = if policy.content.deny {
                &mut compiled.deny
            } else {
                &mut compiled.allow
            };
            list.push(policy.content.policy.clone());
        }
        compiled
    }
}

/// One policy of each width: of the workload, of its namespace, of the mesh. Of several the oldest.
fn narrowest_first<P>(selecting: Vec<&Arc<Selected<P>>>) -> Vec<&Selected<P>> {
    // The sort is stable, and the oldest came first.
    let mut policies: Vec<&Selected<P>> = selecting.into_iter().map(|policy| &**policy).collect();
    policies.sort_by_key(|policy| policy.width());
    policies.dedup_by_key(|policy| policy.width());
    policies
}
