//! What a node's agent and gate know of each pod bound to it.

use std::{net::IpAddr, sync::Arc};

use crate::{Identity, egress::EgressPolicy};

/// For the agent: how a pod's network is set up. Resource `cluster/ns/pod`.
#[derive(Clone, Debug, PartialEq)]
pub struct PodNetwork {
    pub uid: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub identity: Identity,
    /// Set where a sidecar runs in the pod: its traffic is captured.
    pub capture: Option<Capture>,
    /// An egress policy selects the pod: nothing leaves it but through the gate.
    pub selected: bool,
    /// Ports that callers from outside the cluster may reach on a selected pod.
    pub inbound: Vec<InboundPort>,
}

/// Where traffic of a pod with a sidecar is turned to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// The user the sidecar runs as; its own connections are not captured again.
    pub proxy_uid: u32,
    pub outbound_port: u16,
    pub inbound_port: u16,
    /// Inbound ports reached without the sidecar: its own, and from the node the probed ones.
    pub probe_ports: Vec<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InboundPort {
    pub transport: Transport,
    pub port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    Tcp,
    Udp,
}

/// For the gate: what a pod may reach outside the cluster. Resource `cluster/ns/pod`.
#[derive(Clone, Debug, PartialEq)]
pub struct PodEgress {
    pub uid: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub identity: Identity,
    /// All policies that select the pod; what one of them allows is allowed. Empty: not selected.
    pub policies: Vec<EgressPolicy>,
}

/// For the agent and the gate: addresses that are the cluster itself. Resource `cluster/node`,
/// one for the pods of each node, and `cluster/static` for what the mesh's configuration adds
/// (the API server, the control plane).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    pub name: Arc<str>,
    pub addresses: Vec<IpAddr>,
    /// Service ranges, on `cluster/static` alone.
    pub services: Vec<ipnet::IpNet>,
}
