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

/// Which workload a pod is of, as metrics and traces name it: Istio's labels. All pods of one
/// version of a workload have the same, so it is shared.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Names {
    /// The owner's name, without generated suffixes.
    pub workload: Arc<str>,
    pub namespace: Arc<str>,
    /// The canonical service and its revision: what the workload is part of, by its labels.
    pub service: Arc<str>,
    pub revision: Arc<str>,
    /// Labels `app` and `version`; empty where there are none.
    pub app: Arc<str>,
    pub version: Arc<str>,
}

impl Names {
    /// Of a workload that no label says more of.
    pub fn unlabelled(workload: impl Into<Arc<str>>, namespace: impl Into<Arc<str>>) -> Self {
        let workload = workload.into();
        Self {
            service: workload.clone(),
            workload,
            namespace: namespace.into(),
            revision: "latest".into(),
            app: "".into(),
            version: "".into(),
        }
    }
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
    /// `None`: the control plane does not say.
    pub names: Option<Arc<Names>>,
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
    pub names: Arc<Names>,
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
