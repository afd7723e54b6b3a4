use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use turnpike_rules::pod::{InboundPort, Members, PodEgress, PodNetwork};

use crate::{
    Model, ResourceType,
    facts::pod::Pod,
    names::{STATIC, api_server},
};

impl Model {
    /// How the network of the pod `cluster/namespace/pod` is set up.
    pub fn pod_network(&self, name: &str) -> Option<PodNetwork> {
        let pod = self.networked(name)?;
        let policies = self.egress.selecting(pod);
        let inbound = policies.iter().flat_map(|policy| &policy.content.inbound);
        let inbound: BTreeSet<InboundPort> = inbound.copied().collect();
        Some(PodNetwork {
            uid: pod.uid.clone(),
            namespace: pod.key.namespace.clone(),
            name: pod.key.name.clone(),
            identity: pod.identity.clone(),
            capture: pod.capture.clone(),
            selected: !policies.is_empty(),
            inbound: inbound.into_iter().collect(),
        })
    }

    /// What the pod `cluster/namespace/pod` may reach outside the cluster.
    pub fn pod_egress(&self, name: &str) -> Option<PodEgress> {
        let pod = self.networked(name)?;
        let mut policies = self.egress.selecting(pod);
        policies.sort_by_key(|policy| &policy.key);
        Some(PodEgress {
            uid: pod.uid.clone(),
            namespace: pod.key.namespace.clone(),
            name: pod.key.name.clone(),
            identity: pod.identity.clone(),
            policies: policies
                .iter()
                .map(|policy| policy.content.policy.clone())
                .collect(),
        })
    }

    /// Addresses of the pods of `cluster/node`, or what `cluster/static` adds to them: the API server
    /// and what the MeshConfig lists.
    pub fn members(&self, name: &str) -> Option<Members> {
        let node = self.in_cluster(name)?;
        if node == STATIC {
            let Self { mesh, slices, .. } = self;
            let api_server = api_server();
            let slices = slices.of(&api_server).flat_map(|slice| &slice.endpoints);
            let api_server = slices.flat_map(|entry| &entry.addresses);
            let addresses: BTreeSet<IpAddr> = mesh
                .cluster_addresses
                .iter()
                .chain(api_server)
                .copied()
                .collect();
            return Some(Members {
                name: name.into(),
                addresses: addresses.into_iter().collect(),
                services: self.service_ranges(),
            });
        }
        let pods = self.pods.on_node(node);
        let addresses: BTreeSet<IpAddr> =
            pods.flat_map(|pod| pod.own_addresses()).copied().collect();
        (!addresses.is_empty()).then(|| Members {
            name: name.into(),
            addresses: addresses.into_iter().collect(),
            services: Vec::new(),
        })
    }

    /// Where Services have their addresses: as the MeshConfig says, and where it does not, the
    /// address of each, the cluster's DNS among them.
    fn service_ranges(&self) -> Vec<IpNet> {
        if !self.mesh.service_cidrs.is_empty() {
            return self.mesh.service_cidrs.clone();
        }
        let vips: BTreeSet<IpAddr> = self.services.vips().copied().collect();
        vips.into_iter().map(IpNet::from).collect()
    }

    /// The node that a PodNetwork or PodEgress is meant for.
    pub fn node_of(&self, name: &str) -> Option<&Arc<str>> {
        self.networked(name)?.networked_on()
    }

    /// The names of PodNetwork (and equally PodEgress) of a node's pods.
    pub fn pods_of(&self, node: &str) -> Vec<Arc<str>> {
        let pods = self
            .pods
            .on_node(node)
            .filter(|pod| pod.networked_on().is_some());
        pods.map(|pod| self.pod_name(&pod.key).into()).collect()
    }

    /// Every resource of a type. It walks the whole mesh: for tests, tools and small types.
    pub fn names(&self, kind: ResourceType) -> Vec<Arc<str>> {
        match kind {
            ResourceType::SelfConfig => self.pods.all().map(|pod| pod.uid.clone()).collect(),
            ResourceType::Address => {
                let addresses = self.pods.addresses().chain(self.services.vips());
                let names = addresses.map(|address| self.address_name(address).into());
                names.collect::<BTreeSet<_>>().into_iter().collect()
            }
            ResourceType::Service => {
                let keys = self.services.all().map(|service| &service.key);
                let names = keys.flat_map(|key| {
                    let consumers = self.routes.consumers(key).into_iter();
                    let views = consumers.map(|consumer| self.consumer_name(key, &consumer));
                    std::iter::once(self.service_name(key)).chain(views.collect::<Vec<_>>())
                });
                names.map(Arc::from).collect()
            }
            ResourceType::Endpoints => {
                let services = self.services.all();
                let names = services.flat_map(|service| {
                    let shards = self.services.shards(&service.key);
                    let suffixes = shards.map(|shards| shards.suffixes()).unwrap_or_default();
                    let names = suffixes
                        .into_iter()
                        .map(|s| self.shard_name(&service.key, &s));
                    names.collect::<Vec<_>>()
                });
                names.map(Arc::from).collect()
            }
            ResourceType::PodNetwork | ResourceType::PodEgress => {
                let pods = self.pods.all().filter(|pod| pod.networked_on().is_some());
                pods.map(|pod| self.pod_name(&pod.key).into()).collect()
            }
            ResourceType::Members => {
                let nodes = self.pods.nodes().filter(|node| &***node != STATIC);
                let names = nodes
                    .map(|node| self.members_name(node))
                    .chain([self.members_name(STATIC)]);
                names
                    .filter(|name| self.members(name).is_some())
                    .map(Arc::from)
                    .collect()
            }
        }
    }

    fn networked(&self, name: &str) -> Option<&Arc<Pod>> {
        let pod = self.pods.get(&self.read_name(name)?)?;
        pod.networked_on().is_some().then_some(pod)
    }
}
