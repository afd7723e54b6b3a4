//! Where a request goes, and under which limits.

use std::{rc::Rc, sync::Arc, time::Duration};

use turnpike_rules::{route::Route, traffic::TrafficPolicy};

use crate::{
    circuit::Circuit, endpoint::Endpoint, error::ProxyError, mesh::ServiceView, service::Port,
    shared::SharedService, worker::Worker,
};

pub(crate) struct Destination {
    pub(crate) picker: Picker,
    pub(crate) circuit: Rc<Circuit>,
    pub(crate) shared: Arc<SharedService>,
    pub(crate) policy: Policy,
    pub(crate) route: Option<Arc<Route>>,
}

impl Destination {
    /// For the whole request. The route's own timeout goes first; zero switches it off.
    pub(crate) fn whole_timeout(&self) -> Option<Duration> {
        let own = self.route.as_ref().and_then(|route| route.timeouts.request);
        own.or(self.policy.timeouts.request)
            .filter(|timeout| !timeout.is_zero())
    }

    pub(crate) fn try_timeout(&self) -> Option<Duration> {
        let route = self.route.as_ref();
        let own = route.and_then(|route| route.timeouts.backend_request);
        own.or(self.policy.timeouts.per_try)
            .filter(|timeout| !timeout.is_zero())
    }
}

#[derive(Clone)]
pub(crate) enum Picker {
    Among(Rc<Port>),
    /// A pod that the caller chose.
    Pod(Rc<Endpoint>),
    /// This pod's own application.
    Application(Rc<Endpoint>),
}

/// The policy, held by whatever it came in.
#[derive(Clone)]
pub(crate) enum Policy {
    OfService(Arc<ServiceView>),
    Own(Rc<TrafficPolicy>),
}

impl std::ops::Deref for Policy {
    type Target = TrafficPolicy;

    fn deref(&self) -> &TrafficPolicy {
        match self {
            Self::OfService(view) => &view.service.traffic,
            Self::Own(policy) => policy,
        }
    }
}

impl Picker {
    pub(crate) fn pick(&self, worker: &Worker, tried: &[Rc<Endpoint>]) -> Option<Rc<Endpoint>> {
        match self {
            Self::Among(port) => port.pick(worker, tried),
            Self::Pod(endpoint) | Self::Application(endpoint) => Some(endpoint.clone()),
        }
    }

    /// What stands there now. To be asked again before anything is dialled that was looked up a
    /// while ago: by now the address may be that of a pod which must be spoken to in mutual TLS.
    pub(crate) async fn renewed(&self, worker: &Rc<Worker>) -> Result<Self, ProxyError> {
        match self {
            Self::Application(_) => Ok(self.clone()),
            Self::Pod(endpoint) => worker.pod_at(endpoint).await.map(Self::Pod),
            Self::Among(port) => {
                let key = &port.view.service.key;
                let (_, port) = worker.port(key, port.port).await?;
                Ok(Self::Among(port))
            }
        }
    }

    pub(crate) fn endpoints(&self) -> usize {
        match self {
            Self::Among(port) => port.endpoints(),
            Self::Pod(_) | Self::Application(_) => 1,
        }
    }

    pub(crate) fn has_mesh_peers(&self) -> bool {
        match self {
            Self::Among(port) => port.has_mesh_peers(),
            Self::Pod(endpoint) | Self::Application(endpoint) => endpoint.peer.is_some(),
        }
    }
}
