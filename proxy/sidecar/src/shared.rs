//! What all workers must agree on: circuit limits, retry budgets, endpoint health, open
//! connections.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use turnpike_rules::ServiceKey;

use crate::{
    clock::Clock, config::Config, drain::Drain, limits::Gauge, mesh::Mesh, observe::Observer,
    outlier::Outliers, retry::Budget, tls::MeshTls,
};

/// One per process.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) mesh: Mesh,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) tls: MeshTls,
    pub(crate) clock: Clock,
    pub(crate) drain: Drain,
    /// Where this process listens for captured connections.
    pub(crate) listeners: Vec<SocketAddr>,
    pub(crate) open_inbound: Arc<Gauge>,
    pub(crate) open_outbound: Arc<Gauge>,
    /// Locked when a worker meets a Service for the first time.
    services: Mutex<HashMap<ServiceKey, Weak<SharedService>>>,
}

/// One per Service that some worker uses.
#[derive(Debug, Default)]
pub(crate) struct SharedService {
    pub(crate) connections: Arc<Gauge>,
    pub(crate) pending: Arc<Gauge>,
    pub(crate) requests: Arc<Gauge>,
    pub(crate) budget: Budget,
    pub(crate) outliers: Outliers,
}

impl Shared {
    pub(crate) fn new(
        config: Config,
        mesh: Mesh,
        observer: Arc<dyn Observer>,
        drain: Drain,
        listeners: Vec<SocketAddr>,
    ) -> Arc<Self> {
        Arc::new(Self {
            tls: MeshTls::new(mesh.credentials()),
            config,
            mesh,
            observer,
            clock: Clock::start(),
            drain,
            listeners,
            open_inbound: Arc::default(),
            open_outbound: Arc::default(),
            services: Mutex::default(),
        })
    }

    pub(crate) fn service(&self, key: &ServiceKey) -> Arc<SharedService> {
        let mut services = self.services.lock();
        if let Some(known) = services.get(key).and_then(Weak::upgrade) {
            return known;
        }
        services.retain(|_, service| service.strong_count() > 0);
        let service = Arc::new(SharedService::default());
        services.insert(key.clone(), Arc::downgrade(&service));
        service
    }
}
