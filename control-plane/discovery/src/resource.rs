//! Resources of the model in the form in which they travel.

use std::sync::Arc;

use sha2::{Digest, Sha256};
use turnpike_model::{Model, ResourceType};
use turnpike_rules::{
    pod::{Members, PodEgress, PodNetwork},
    service::{EndpointShard, Service},
    workload::{Destination, SelfConfig},
};
use turnpike_wire::resource::Resource;

/// A type and a name.
pub(crate) type ResourceKey = (ResourceType, Arc<str>);

/// Encoded once, however many watch it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Encoded {
    /// A hash of the bytes: equal resources have equal versions, also after a restart.
    pub(crate) version: Arc<str>,
    pub(crate) bytes: Arc<[u8]>,
}

pub(crate) fn type_url(kind: ResourceType) -> &'static str {
    match kind {
        ResourceType::SelfConfig => SelfConfig::TYPE_URL,
        ResourceType::Address => Destination::TYPE_URL,
        ResourceType::Service => Service::TYPE_URL,
        ResourceType::Endpoints => EndpointShard::TYPE_URL,
        ResourceType::PodNetwork => PodNetwork::TYPE_URL,
        ResourceType::PodEgress => PodEgress::TYPE_URL,
        ResourceType::Members => Members::TYPE_URL,
    }
}

pub(crate) fn by_type_url(url: &str) -> Option<ResourceType> {
    ResourceType::ALL
        .into_iter()
        .find(|kind| type_url(*kind) == url)
}

pub(crate) fn encode(model: &Model, kind: ResourceType, name: &str) -> Option<Encoded> {
    let bytes = match kind {
        ResourceType::SelfConfig => model.self_config(name)?.encode(),
        ResourceType::Address => model.destination(name)?.encode(),
        ResourceType::Service => model.service(name)?.encode(),
        ResourceType::Endpoints => model.endpoints(name)?.encode(),
        ResourceType::PodNetwork => model.pod_network(name)?.encode(),
        ResourceType::PodEgress => model.pod_egress(name)?.encode(),
        ResourceType::Members => model.members(name)?.encode(),
    };
    let digest = Sha256::digest(&bytes);
    Some(Encoded {
        version: hex::encode(&digest[..12]).into(),
        bytes: bytes.into(),
    })
}
