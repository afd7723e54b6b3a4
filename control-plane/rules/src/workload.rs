//! What an address stands for, and what a sidecar knows of its own pod.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::{Identity, ServiceKey, authz::Authorization, service::Protocol};

/// The answer to "what is at this address?".
#[derive(Clone, Debug, PartialEq)]
pub enum Destination {
    /// A Service's cluster address.
    Service(ServiceKey),
    /// One pod, chosen by the caller itself (headless Services, StatefulSets, direct calls).
    Workload(Workload),
}

/// One pod as its callers see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    pub uid: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub address: IpAddr,
    /// The identity its certificate must bear. `None`: no sidecar.
    pub identity: Option<Identity>,
    /// The Service whose policy applies when this pod is called by its own address, if exactly one
    /// backs each port.
    pub service: Option<ServiceKey>,
    pub ports: Vec<WorkloadPort>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadPort {
    pub port: u16,
    pub protocol: Protocol,
}

/// Everything a sidecar needs to serve what comes *in*; it is pushed, and readiness waits for it.
#[derive(Clone, Debug, PartialEq)]
pub struct SelfConfig {
    pub uid: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub identity: Identity,
    /// The workload's name in metrics and traces: its owner without generated suffixes.
    pub workload: Arc<str>,
    pub zone: Arc<str>,
    pub ports: Vec<WorkloadPort>,
    /// Ports that kubelet probes: reached in plaintext by the node, whatever `mtls` says.
    pub probe_ports: Vec<u16>,
    pub mtls: MtlsMode,
    /// Modes of single ports, before `mtls`.
    pub port_mtls: Vec<(u16, MtlsMode)>,
    pub authorization: Authorization,
    pub backs: Vec<BackedService>,
    pub telemetry: Telemetry,
    /// Addresses that may be in the mesh (pods and Services). Others are never asked for.
    pub mesh_prefixes: Vec<IpNet>,
}

impl SelfConfig {
    /// The mode that holds for connections to `port`.
    pub fn mtls_for(&self, port: u16) -> MtlsMode {
        self.port_mtls
            .iter()
            .find(|(p, _)| *p == port)
            .map_or(self.mtls, |(_, mode)| *mode)
    }
}

/// A Service that selects this pod; the SNI of mesh TLS names one of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackedService {
    pub key: ServiceKey,
    /// Service port → this pod's port.
    pub ports: Vec<crate::service::PortMapping>,
}

/// Whether plaintext from outside the mesh is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum MtlsMode {
    #[default]
    Permissive,
    Strict,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Telemetry {
    /// Share of new traces that are sampled, 0.0 to 1.0. A caller's own decision is kept.
    pub sampling: f64,
    pub access_log: bool,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            sampling: 1.0,
            access_log: true,
        }
    }
}
