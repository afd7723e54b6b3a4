//! From a changed fact to the resources it touches.
//!
//! Each `set_` puts one fact in the place of an older one and follows the indexes from it: what it
//! selects, what names it, what it is attached to. Endpoints are the only derived state that is
//! kept; everything else is put together when it is asked for.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use turnpike_rules::service::Endpoint;

use crate::{
    Changes, Model, ResourceType,
    facts::{
        mesh::Mesh,
        pod::Pod,
        policy::{Authorization, Egress, Mtls, Reporting, TrafficDefaults},
        route::{Parent, Route},
        service::Service,
        slice::{Entry, Slice},
    },
    key::Key,
    names::{STATIC, api_server},
    shards::{Contribution, Source, Touched},
    store::{Change, Selected},
};

impl Model {
    pub(crate) fn set_pod(&mut self, key: &Key, new: Option<Pod>, to: &mut Changes) {
        let known = self.pods.get(key).map(Arc::as_ref);
        let pods = known.into_iter().chain(&new);
        let nodes = nodes(pods.map(|pod| pod.node.as_ref()));
        let zones = self.zones_of(&nodes);
        let Some(Change { old, new }) = self.pods.replace(key, new) else {
            return;
        };
        let mut services = BTreeSet::new();
        let mut slices = BTreeSet::new();
        for pod in old.iter().chain(&new) {
            self.touch_pod(pod, to);
            services.extend(self.services.selecting(pod));
            slices.extend(self.slices.naming(pod));
        }
        self.touch_membership(old.as_deref(), new.as_deref(), to);
        for service in &services {
            self.refresh(service, [Source::Pod(key.clone())], to);
        }
        self.refresh_slices(slices, to);
        self.follow_zones(&nodes, &zones, to);
    }

    pub(crate) fn set_service(&mut self, key: &Key, new: Option<Service>, to: &mut Changes) {
        let Some(Change { old, new }) = self.services.replace(key, new) else {
            return;
        };
        self.touch_service(key, to);
        let vips = |service: &Option<Arc<Service>>| service.as_ref().map(|s| s.vips.clone());
        if self.mesh.service_cidrs.is_empty() && vips(&old) != vips(&new) {
            to.touch(ResourceType::Members, self.members_name(STATIC));
        }
        let mut pods = Vec::new();
        for service in old.iter().chain(&new) {
            service
                .vips
                .iter()
                .for_each(|vip| self.touch_address(vip, to));
            if let Some(selector) = &service.selector {
                pods.extend(self.pods.select(Some(&key.namespace), selector));
            }
        }
        pods.extend(self.slices.of(key).flat_map(|slice| self.named_by(slice)));
        pods.iter().for_each(|pod| self.touch_inbound(pod, to));
        self.refresh_all(key, to);
    }

    pub(crate) fn set_slice(&mut self, key: &Key, new: Option<Slice>, to: &mut Changes) {
        let known = self.slices.get(key).map(Arc::as_ref);
        let slices = known.into_iter().chain(&new);
        let entries = slices.flat_map(|slice| &slice.endpoints);
        let nodes = nodes(entries.map(|entry| entry.node.as_ref()));
        let zones = self.zones_of(&nodes);
        let Some(Change { old, new }) = self.slices.replace(key, new) else {
            return;
        };
        for entry in old.iter().flat_map(|slice| &slice.endpoints) {
            entry
                .node
                .iter()
                .for_each(|n| self.pods.zones_mut().withdraw(n, entry.zone.as_ref()));
        }
        for entry in new.iter().flat_map(|slice| &slice.endpoints) {
            entry
                .node
                .iter()
                .for_each(|n| self.pods.zones_mut().claim(n, entry.zone.as_ref()));
        }
        let slices = || old.iter().chain(&new);
        let pods: Vec<Arc<Pod>> = slices().flat_map(|slice| self.named_by(slice)).collect();
        pods.iter().for_each(|pod| self.touch_inbound(pod, to));
        let services: BTreeSet<Key> = slices().map(|slice| slice.service.clone()).collect();
        if services.contains(&api_server()) {
            to.touch(ResourceType::Members, self.members_name(STATIC));
        }
        for service in &services {
            // The first slice of a Service puts its pods out of account, the last brings them back.
            let others = self.slices.of(service).any(|slice| slice.key != *key);
            if others {
                self.refresh(service, [Source::Slice(key.clone())], to);
            } else {
                self.refresh_all(service, to);
            }
        }
        self.follow_zones(&nodes, &zones, to);
    }

    pub(crate) fn set_route(&mut self, key: &Key, new: Option<Route>, to: &mut Changes) {
        for route in self.routes.replace(key, new).into_iter().flatten() {
            self.touch_route(&route, to);
        }
    }

    pub(crate) fn set_traffic(
        &mut self,
        key: &Key,
        new: Option<TrafficDefaults>,
        to: &mut Changes,
    ) {
        for policy in self.traffic.replace(key, new).into_iter().flatten() {
            self.touch_traffic(&policy, to);
        }
    }

    pub(crate) fn set_authorization(
        &mut self,
        key: &Key,
        new: Option<Selected<Authorization>>,
        to: &mut Changes,
    ) {
        for policy in self.authorization.replace(key, new).into_iter().flatten() {
            self.touch_selves(&policy, to);
        }
    }

    pub(crate) fn set_peers(&mut self, key: &Key, new: Option<Selected<Mtls>>, to: &mut Changes) {
        for policy in self.peers.replace(key, new).into_iter().flatten() {
            self.touch_selves(&policy, to);
        }
    }

    pub(crate) fn set_egress(
        &mut self,
        key: &Key,
        new: Option<Selected<Egress>>,
        to: &mut Changes,
    ) {
        for policy in self.egress.replace(key, new).into_iter().flatten() {
            self.touch_egress(&policy, to);
        }
    }

    pub(crate) fn set_telemetry(
        &mut self,
        key: &Key,
        new: Option<Selected<Reporting>>,
        to: &mut Changes,
    ) {
        for policy in self.telemetry.replace(key, new).into_iter().flatten() {
            self.touch_selves(&policy, to);
        }
    }

    pub(crate) fn set_mesh(&mut self, new: Mesh, to: &mut Changes) {
        if self.mesh != new {
            self.mesh = new;
            self.touch_mesh(to);
        }
    }

    /// Every pod's own configuration carries a part of it.
    pub(crate) fn touch_mesh(&self, to: &mut Changes) {
        to.touch(ResourceType::Members, self.members_name(STATIC));
        for pod in self.pods.all() {
            to.touch(ResourceType::SelfConfig, pod.uid.clone());
        }
    }

    pub(crate) fn touch_route(&self, route: &Route, to: &mut Changes) {
        for Parent { service, .. } in &route.parents {
            if service.namespace == route.key.namespace {
                self.touch_service(service, to);
            } else {
                let name = self.consumer_name(service, &route.key.namespace);
                to.touch(ResourceType::Service, name);
            }
        }
    }

    pub(crate) fn touch_traffic(&self, policy: &TrafficDefaults, to: &mut Changes) {
        policy
            .targets
            .iter()
            .for_each(|target| self.touch_service(target, to));
    }

    pub(crate) fn touch_egress(&self, policy: &Selected<Egress>, to: &mut Changes) {
        for pod in self.pods.select(policy.scope.as_deref(), &policy.selector) {
            self.touch_outbound(&pod, to);
        }
    }

    pub(crate) fn touch_pod(&self, pod: &Pod, to: &mut Changes) {
        self.touch_inbound(pod, to);
        self.touch_outbound(pod, to);
    }

    /// What says how to call it and how it is called.
    fn touch_inbound(&self, pod: &Pod, to: &mut Changes) {
        to.touch(ResourceType::SelfConfig, pod.uid.clone());
        pod.own_addresses()
            .iter()
            .for_each(|address| self.touch_address(address, to));
    }

    /// What its node knows of it.
    fn touch_outbound(&self, pod: &Pod, to: &mut Changes) {
        if pod.networked_on().is_some() {
            let name: Arc<str> = self.pod_name(&pod.key).into();
            to.touch(ResourceType::PodNetwork, name.clone());
            to.touch(ResourceType::PodEgress, name);
        }
    }

    pub(crate) fn touch_selves<P>(&self, policy: &Selected<P>, to: &mut Changes) {
        for pod in self.pods.select(policy.scope.as_deref(), &policy.selector) {
            to.touch(ResourceType::SelfConfig, pod.uid.clone());
        }
    }

    fn touch_membership(&self, old: Option<&Pod>, new: Option<&Pod>, to: &mut Changes) {
        let at = |pod: &Pod| Some((pod.node.clone()?, pod.own_addresses().to_vec()));
        let (old, new) = (old.and_then(at), new.and_then(at));
        if old != new {
            for (node, _) in old.iter().chain(&new) {
                to.touch(ResourceType::Members, self.members_name(node));
            }
        }
    }

    fn touch_address(&self, address: &IpAddr, to: &mut Changes) {
        to.touch(ResourceType::Address, self.address_name(address));
    }

    /// The Service and each consumer's view of it.
    pub(crate) fn touch_service(&self, service: &Key, to: &mut Changes) {
        to.touch(ResourceType::Service, self.service_name(service));
        for consumer in self.routes.consumers(service) {
            to.touch(
                ResourceType::Service,
                self.consumer_name(service, &consumer),
            );
        }
    }

    fn refresh_slices(&mut self, slices: BTreeSet<Key>, to: &mut Changes) {
        for slice in slices {
            if let Some(service) = self.slices.get(&slice).map(|s| s.service.clone()) {
                self.refresh(&service, [Source::Slice(slice)], to);
            }
        }
    }

    /// Derives all endpoints of a Service anew.
    fn refresh_all(&mut self, service: &Key, to: &mut Changes) {
        let known = self
            .services
            .shards(service)
            .into_iter()
            .flat_map(|s| s.sources().cloned());
        let mut sources: BTreeSet<Source> = known.collect();
        sources.extend(
            self.slices
                .of(service)
                .map(|slice| Source::Slice(slice.key.clone())),
        );
        if let Some(selector) = self.services.get(service).and_then(|s| s.selector.as_ref()) {
            let pods = self.pods.select(Some(&service.namespace), selector);
            sources.extend(pods.iter().map(|pod| Source::Pod(pod.key.clone())));
        }
        self.refresh(service, sources, to);
    }

    /// Derives what `sources` contribute to a Service anew.
    fn refresh(
        &mut self,
        service: &Key,
        sources: impl IntoIterator<Item = Source>,
        to: &mut Changes,
    ) {
        let mut touched = Touched::default();
        for source in sources {
            let contribution = self.contribution(service, &source);
            self.services
                .shards_mut(service)
                .replace(&source, contribution, &mut touched);
        }
        self.services.settle(service);
        for suffix in &touched.shards {
            to.touch(ResourceType::Endpoints, self.shard_name(service, suffix));
        }
        if touched.layout {
            self.touch_service(service, to);
        }
    }

    /// What a source contributes now: nothing where it is gone, or where the Service is, or for a
    /// pod where slices speak for the Service.
    fn contribution(&self, service: &Key, source: &Source) -> Contribution {
        let mut contribution = Contribution::default();
        let Some(service) = self.services.get(service) else {
            return contribution;
        };
        match source {
            Source::Slice(key) => {
                if let Some(slice) = self.slices.get(key).filter(|s| s.service == service.key) {
                    self.contribute_slice(service, slice, &mut contribution);
                }
            }
            Source::Pod(key) => {
                let pod = self.pods.get(key).filter(|pod| service.selects(pod));
                if let Some(pod) = pod.filter(|_| !self.slices.any_of(&service.key)) {
                    self.contribute_pod(service, pod, &mut contribution);
                }
            }
        }
        contribution
    }

    fn contribute_pod(&self, service: &Service, pod: &Pod, to: &mut Contribution) {
        let mapping = service.mapping(pod);
        let Some(state) = pod
            .state(service.unready_too)
            .filter(|_| !mapping.is_empty())
        else {
            return;
        };
        for address in &pod.addresses {
            let endpoint = Endpoint {
                uid: pod.uid.clone(),
                address: *address,
                identity: pod.mesh_identity(),
                zone: self.pods.zone(pod),
                state,
                names: Some(pod.names.clone()),
            };
            to.add(mapping.clone(), endpoint);
        }
    }

    fn contribute_slice(&self, service: &Service, slice: &Slice, to: &mut Contribution) {
        let mapping = slice.mapping(service);
        if mapping.is_empty() {
            return;
        }
        for entry in &slice.endpoints {
            let Some(state) = entry.state else { continue };
            for address in &entry.addresses {
                let pod = self.pod_behind(entry, address);
                let zone = entry
                    .zone
                    .clone()
                    .or_else(|| pod.map(|pod| self.pods.zone(pod)));
                let endpoint = Endpoint {
                    uid: pod.map_or_else(|| address.to_string().into(), |pod| pod.uid.clone()),
                    address: *address,
                    identity: pod.and_then(|pod| pod.mesh_identity()),
                    zone: zone.unwrap_or_default(),
                    state,
                    names: pod.map(|pod| pod.names.clone()),
                };
                to.add(mapping.clone(), endpoint);
            }
        }
    }

    /// The pod that an entry of a slice stands for: the one it names, if it still has the address,
    /// else the one at the address. So a meshed pod is never called in plaintext.
    fn pod_behind(&self, entry: &Entry, address: &IpAddr) -> Option<&Arc<Pod>> {
        let named = entry.pod.as_ref().and_then(|key| self.pods.get(key));
        named
            .filter(|pod| !pod.finished && pod.addresses.contains(address))
            .or_else(|| self.pods.at(address))
    }

    fn named_by(&self, slice: &Slice) -> Vec<Arc<Pod>> {
        let entries = slice.endpoints.iter();
        let pods = entries.flat_map(|entry| {
            let named = entry.pod.as_ref().and_then(|key| self.pods.get(key));
            named
                .into_iter()
                .chain(entry.addresses.iter().flat_map(|a| self.pods.claiming(a)))
        });
        pods.cloned().collect()
    }

    fn zones_of(&self, nodes: &BTreeSet<Arc<str>>) -> Vec<Option<Arc<str>>> {
        nodes.iter().map(|node| self.pods.node_zone(node)).collect()
    }

    /// A node's zone became known or another: its pods stand in it.
    fn follow_zones(
        &mut self,
        nodes: &BTreeSet<Arc<str>>,
        before: &[Option<Arc<str>>],
        to: &mut Changes,
    ) {
        for (node, before) in nodes.iter().zip(before) {
            if self.pods.node_zone(node) == *before {
                continue;
            }
            let pods: Vec<Arc<Pod>> = self.pods.on_node(node).cloned().collect();
            for pod in &pods {
                to.touch(ResourceType::SelfConfig, pod.uid.clone());
                for service in self.services.selecting(pod) {
                    self.refresh(&service, [Source::Pod(pod.key.clone())], to);
                }
                self.refresh_slices(self.slices.naming(pod), to);
            }
        }
    }
}

fn nodes<'a>(of: impl Iterator<Item = Option<&'a Arc<str>>>) -> BTreeSet<Arc<str>> {
    of.flatten().cloned().collect()
}
