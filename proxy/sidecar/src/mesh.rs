//! What the data plane asks of the control side: this pod's own configuration, what an address
//! stands for, Services with their endpoints, and credentials.
//!
//! The data plane holds a [`Mesh`]; the control side implements [`Directory`] behind it. Calls may
//! come from any worker thread.

use std::{fmt, future::Future, net::IpAddr, pin::Pin, sync::Arc};

use tokio::sync::watch;
use turnpike_certs::CredentialStore;
use turnpike_rules::{
    ServiceKey,
    service::{Endpoint, PortMapping, Service, ServicePort},
    workload::{SelfConfig, Workload},
};

/// An answer that may take a round trip to the control plane, at most two seconds.
pub type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A Service as it changes. While the data plane uses a Service it holds a receiver, so that one
/// with no receiver is idle and may be evicted. The sender is dropped when the Service is gone:
/// the data plane then asks again.
pub type ServiceWatch = watch::Receiver<Arc<ServiceView>>;

/// Answers lookups, from what is known or by asking the control plane.
///
/// Implementations coalesce equal questions, answer within two seconds, keep negative answers in a
/// bounded cache, and answer from the last good state while the control plane is away.
pub trait Directory: Send + Sync + fmt::Debug + 'static {
    /// What stands at an address. One outside the mesh's prefixes is [`Lookup::Unknown`] at once,
    /// without a question to anybody.
    fn destination(&self, address: IpAddr) -> Answer<Lookup>;

    /// A Service by name.
    fn service(&self, key: &ServiceKey) -> Answer<Result<ServiceWatch, Missing>>;
}

/// Why there is no Service to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    #[error("there is no such Service")]
    Absent,
    /// No answer within the deadline: it may be there.
    #[error("the control plane has not answered for it")]
    Unanswered,
}

/// What an address stands for.
#[derive(Clone, Debug)]
pub enum Lookup {
    /// A Service's cluster address.
    Service(ServiceKey),
    /// One pod, called directly.
    Workload(Arc<Workload>),
    /// Nothing of the mesh: the egress path.
    Unknown,
    /// An address of the mesh that nothing is known about and nobody could be asked in time. To be
    /// refused: it may be a pod that must be spoken to in mutual TLS.
    Unanswered,
}

/// A Service with all of its endpoints; always complete, replaced whole.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceView {
    pub service: Service,
    pub endpoints: Vec<EndpointView>,
}

/// An endpoint with the port mapping of the shard it came in.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointView {
    pub endpoint: Endpoint,
    pub ports: Arc<[PortMapping]>,
}

impl ServiceView {
    /// The declared port of this number.
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.service
            .ports
            .iter()
            .find(|declared| declared.port == port)
    }
}

impl EndpointView {
    /// The port on the pod that serves a Service's port.
    pub fn target(&self, service_port: u16) -> Option<u16> {
        let mapping = self
            .ports
            .iter()
            .find(|mapping| mapping.service_port == service_port);
        mapping.map(|mapping| mapping.target_port)
    }
}

/// The data plane's handle on the control side; cheap to clone.
#[derive(Clone, Debug)]
pub struct Mesh {
    own: watch::Receiver<Arc<SelfConfig>>,
    directory: Arc<dyn Directory>,
    credentials: Arc<CredentialStore>,
    cluster: Arc<str>,
}

impl Mesh {
    /// The data plane is started only when the pod's own configuration has come, so that there is
    /// always one.
    pub fn new(
        own: watch::Receiver<Arc<SelfConfig>>,
        directory: Arc<dyn Directory>,
        credentials: Arc<CredentialStore>,
        cluster: &str,
    ) -> Self {
        Self {
            own,
            directory,
            credentials,
            cluster: cluster.into(),
        }
    }

    /// The cluster's name, as it stands in the server names of mesh TLS.
    pub fn cluster(&self) -> &Arc<str> {
        &self.cluster
    }

    /// This pod's configuration as it is now.
    pub fn self_config(&self) -> Arc<SelfConfig> {
        self.own.borrow().clone()
    }

    /// For those who act when it changes.
    pub fn watch_self(&self) -> watch::Receiver<Arc<SelfConfig>> {
        self.own.clone()
    }

    pub async fn destination(&self, address: IpAddr) -> Lookup {
        self.directory.destination(address).await
    }

    /// As [`Mesh::destination`], for who does not wait on the spot.
    pub fn lookup(&self, address: IpAddr) -> Answer<Lookup> {
        self.directory.destination(address)
    }

    pub async fn service(&self, key: &ServiceKey) -> Result<ServiceWatch, Missing> {
        self.directory.service(key).await
    }

    /// This workload's certificate and the roots it trusts; empty until the first was issued.
    pub fn credentials(&self) -> &Arc<CredentialStore> {
        &self.credentials
    }
}
