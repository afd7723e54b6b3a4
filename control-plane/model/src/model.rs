//! The model itself: what it holds, and how objects enter and leave it.

use std::{collections::BTreeMap, sync::Arc};

use turnpike_api::{Kind, Object, ObjectKey, valid};

use crate::{
    Changes,
    facts::{
        Refusal,
        mesh::Mesh,
        pod::Pod,
        policy::{Authorization, Egress, Mtls, Reporting, TrafficDefaults},
        route::Route,
        service::Service,
        slice::Slice,
    },
    key::Key,
    store::{Pods, Policies, Routes, Selected, Services, Slices, TrafficPolicies},
};

/// The one MeshConfig that is read.
const MESH: &str = "default";

/// What no object says.
#[derive(Clone, Debug)]
pub struct Settings {
    pub cluster: Arc<str>,
    pub trust_domain: Arc<str>,
    /// The network that addresses belong to.
    pub network: Arc<str>,
}

/// The mesh and its policies, indexed.
#[derive(Debug)]
pub struct Model {
    pub(crate) settings: Settings,
    pub(crate) pods: Pods,
    pub(crate) services: Services,
    pub(crate) slices: Slices,
    pub(crate) routes: Routes,
    pub(crate) traffic: TrafficPolicies,
    pub(crate) authorization: Policies<Authorization>,
    pub(crate) peers: Policies<Mtls>,
    pub(crate) telemetry: Policies<Reporting>,
    pub(crate) egress: Policies<Egress>,
    pub(crate) mesh: Mesh,
    /// Objects that came but are not used as they came.
    pub(crate) refused: BTreeMap<ObjectKey, Refusal>,
}

impl Model {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            pods: Pods::default(),
            services: Services::default(),
            slices: Slices::default(),
            routes: Routes::default(),
            traffic: TrafficPolicies::default(),
            authorization: Policies::default(),
            peers: Policies::default(),
            telemetry: Policies::default(),
            egress: Policies::default(),
            mesh: Mesh::default(),
            refused: BTreeMap::new(),
        }
    }

    /// Takes an object, new or changed.
    ///
    /// Sources check objects before they deliver them. One that is invalid all the same changes
    /// nothing: what was known under its key stays in force, and its status says why.
    pub fn apply(&mut self, object: Object) -> Changes {
        let mut changes = Changes::default();
        let key = object.key();
        match self.take(&object, &mut changes) {
            Ok(()) => self.refused.remove(&key),
            Err(refusal) => self.refused.insert(key, refusal),
        };
        changes
    }

    /// Forgets an object; one that is not known changes nothing.
    pub fn delete(&mut self, object: &ObjectKey) -> Changes {
        let mut changes = Changes::default();
        let (key, to) = (&Key::from(object), &mut changes);
        self.refused.remove(object);
        match object.kind {
            Kind::Pod => self.set_pod(key, None, to),
            Kind::Service => self.set_service(key, None, to),
            Kind::EndpointSlice => self.set_slice(key, None, to),
            Kind::HttpRoute => self.set_route(key, None, to),
            Kind::TrafficPolicy => self.set_traffic(key, None, to),
            Kind::AuthorizationPolicy => self.set_authorization(key, None, to),
            Kind::PeerAuthentication => self.set_peers(key, None, to),
            Kind::Telemetry => self.set_telemetry(key, None, to),
            Kind::EgressPolicy => self.set_egress(key, None, to),
            Kind::MeshConfig if &*object.name == MESH => self.set_mesh(Mesh::default(), to),
            Kind::MeshConfig
            | Kind::ClusterEgressPolicy
            | Kind::Namespace
            | Kind::ServiceAccount => {}
        }
        changes
    }

    /// The resources that an object shapes: those that deleting it would touch.
    pub fn shaped_by(&self, object: &ObjectKey) -> Changes {
        let mut found = Changes::default();
        let (key, to) = (&Key::from(object), &mut found);
        match object.kind {
            Kind::HttpRoute => self
                .routes
                .get(key)
                .iter()
                .for_each(|r| self.touch_route(r, to)),
            Kind::TrafficPolicy => {
                self.traffic
                    .get(key)
                    .iter()
                    .for_each(|p| self.touch_traffic(p, to));
            }
            Kind::AuthorizationPolicy => {
                self.authorization
                    .get(key)
                    .iter()
                    .for_each(|p| self.touch_selves(p, to));
            }
            Kind::PeerAuthentication => {
                self.peers
                    .get(key)
                    .iter()
                    .for_each(|p| self.touch_selves(p, to));
            }
            Kind::Telemetry => {
                self.telemetry
                    .get(key)
                    .iter()
                    .for_each(|p| self.touch_selves(p, to));
            }
            Kind::EgressPolicy => {
                self.egress
                    .get(key)
                    .iter()
                    .for_each(|p| self.touch_egress(p, to));
            }
            Kind::MeshConfig if &*object.name == MESH => self.touch_mesh(to),
            Kind::Pod => self
                .pods
                .get(key)
                .iter()
                .for_each(|pod| self.touch_pod(pod, to)),
            Kind::Service => self.touch_service(key, to),
            Kind::MeshConfig
            | Kind::EndpointSlice
            | Kind::ClusterEgressPolicy
            | Kind::Namespace
            | Kind::ServiceAccount => {}
        }
        found
    }

    fn take(&mut self, object: &Object, to: &mut Changes) -> Result<(), Refusal> {
        let key = &Key::from(&object.key());
        match object {
            Object::Pod(pod) => {
                let pod = Pod::read(pod, &self.settings.trust_domain)?;
                self.set_pod(key, Some(pod), to);
            }
            Object::Service(service) => self.set_service(key, Service::read(service), to),
            Object::EndpointSlice(slice) => self.set_slice(key, Slice::read(slice), to),
            Object::HttpRoute(route) => {
                let route = Route::read(route, &self.settings.cluster)?;
                self.set_route(key, Some(route), to);
            }
            Object::TrafficPolicy(policy) => {
                self.set_traffic(key, Some(TrafficDefaults::read(policy)?), to);
            }
            Object::AuthorizationPolicy(policy) => {
                self.set_authorization(
                    key,
                    Some(Selected::<Authorization>::read(
                        policy,
                        &self.settings.trust_domain,
                    )?),
                    to,
                );
            }
            Object::PeerAuthentication(policy) => {
                self.set_peers(key, Some(Selected::<Mtls>::read(policy)?), to);
            }
            Object::Telemetry(policy) => {
                self.set_telemetry(key, Some(Selected::<Reporting>::read(policy)?), to);
            }
            Object::EgressPolicy(policy) => {
                self.set_egress(key, Some(Selected::<Egress>::read(policy)?), to);
            }
            Object::MeshConfig(config) => self.set_mesh(valid::mesh_config(config)?, to),
            Object::ClusterEgressPolicy(_) => valid::check(object)?,
            Object::Namespace(_) | Object::ServiceAccount(_) => {}
        }
        Ok(())
    }
}
