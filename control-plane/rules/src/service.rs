//! Services and their endpoints, as the data plane sees them.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use crate::{Identity, route::RouteTable, traffic::TrafficPolicy, workload::Names};

/// Names a Service across clusters: `cluster/namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    pub cluster: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

/// A text that is not `cluster/namespace/name`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not cluster/namespace/name")]
pub struct InvalidServiceKey(pub String);

impl ServiceKey {
    pub fn new(cluster: &str, namespace: &str, name: &str) -> Self {
        Self {
            cluster: cluster.into(),
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.cluster, self.namespace, self.name)
    }
}

impl FromStr for ServiceKey {
    type Err = InvalidServiceKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(cluster), Some(namespace), Some(name), None)
                if !cluster.is_empty() && !namespace.is_empty() && !name.is_empty() =>
            {
                Ok(Self::new(cluster, namespace, name))
            }
            _ => Err(InvalidServiceKey(text.to_owned())),
        }
    }
}

/// A Service with everything a caller needs but its endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    pub key: ServiceKey,
    /// Set where a consumer route gives callers of this namespace a view of their own; the
    /// resource is then named `cluster/ns/name@consumer`.
    pub consumer: Option<Arc<str>>,
    /// Cluster addresses; empty for a headless Service.
    pub vips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub traffic: TrafficPolicy,
    /// Names of the [`EndpointShard`]s that together are this Service's endpoints. A Service takes
    /// effect when all of them have arrived.
    pub shards: Vec<Arc<str>>,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq)]
pub struct ServicePort {
    pub port: u16,
    /// Empty where the Service has one unnamed port.
    pub name: Arc<str>,
    pub protocol: Protocol,
    /// Routes attached to this port, in precedence order. Empty: all requests go to the Service
    /// itself.
    pub routes: RouteTable,
}

/// What an application speaks on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Protocol {
    /// Not declared: find out from the first bytes.
    #[default]
    Detect,
    Http1,
    /// HTTP/2 with prior knowledge, gRPC included.
    Http2,
    /// TLS of the application's own, passed as it is.
    Tls,
    /// Opaque bytes; also what server-first protocols need.
    Tcp,
}

/// At most [`EndpointShard::LIMIT`] endpoints that share one mapping of ports.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointShard {
    /// `cluster/ns/name/shard`.
    pub name: Arc<str>,
    /// Service port → the port on the pod.
    pub ports: Vec<PortMapping>,
    pub endpoints: Vec<Endpoint>,
}

impl EndpointShard {
    /// The most endpoints one shard carries, so that a change costs little however large a Service.
    pub const LIMIT: usize = 100;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortMapping {
    pub service_port: u16,
    pub target_port: u16,
}

/// One pod (or address outside the mesh) behind a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The pod's UID; for an address that is no pod, the address.
    pub uid: Arc<str>,
    pub address: IpAddr,
    /// The identity its certificate must bear. `None`: it has no sidecar, speak plaintext.
    pub identity: Option<Identity>,
    /// Availability zone, empty where unknown.
    pub zone: Arc<str>,
    pub state: EndpointState,
    /// `None`: an address that is no pod.
    pub names: Option<Arc<Names>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EndpointState {
    #[default]
    Serving,
    /// Used only while no endpoint is serving.
    Terminating,
}
