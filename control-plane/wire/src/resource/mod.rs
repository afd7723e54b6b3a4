//! The types of `turnpike-rules` to and from the wire.
//!
//! Decoding checks everything that a consumer relies on, so that a wrong resource is refused at
//! the edge with the field that is wrong, and never met again further in. What a newer control
//! plane adds is ignored where leaving it out is safe; a resource whose `must_understand` names a
//! feature unknown here is refused, and so is an unknown variant of anything that restricts.

mod authz;
mod field;
mod pod;
mod route;
mod service;
mod traffic;
mod workload;

use prost::Message;
use turnpike_rules::{
    pod::{Members, PodEgress, PodNetwork},
    service::{EndpointShard, Service},
    workload::{Destination, SelfConfig},
};

use crate::mesh as pb;
use field::{FieldError, Read};

/// Features that a `must_understand` may name.
const UNDERSTOOD: &[&str] = &[];

/// Why bytes are not the resource they are said to be.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{kind} `{name}`: {field}: {reason}")]
pub struct InvalidResource {
    /// `Service`, `Self`…
    pub kind: &'static str,
    /// The resource's name.
    pub name: String,
    /// Where in the message: `ports[0].routes[2].hosts[0]`.
    pub field: String,
    pub reason: String,
}

/// A type that travels as a resource.
pub trait Resource: Sized {
    /// As in a subscription.
    const TYPE_URL: &'static str;

    /// Reads a resource of this name, and checks everything that its consumers rely on.
    fn decode(name: &str, bytes: &[u8]) -> Result<Self, InvalidResource>;

    fn encode(&self) -> Vec<u8>;
}

macro_rules! resource {
    ($type:ty, $message:ty, $kind:literal, $read:path) => {
        impl Resource for $type {
            const TYPE_URL: &'static str = concat!("type.googleapis.com/turnpike.mesh.v1.", $kind);

            fn decode(name: &str, bytes: &[u8]) -> Result<Self, InvalidResource> {
                <$message>::decode(bytes)
                    .map_err(|error| FieldError::new("", error.to_string()))
                    .and_then(|message| $read(name, message))
                    .map_err(|error| error.into_invalid($kind, name))
            }

            fn encode(&self) -> Vec<u8> {
                <$message>::from(self).encode_to_vec()
            }
        }
    };
}

resource!(SelfConfig, pb::Self_, "Self", workload::self_config);
resource!(Destination, pb::Address, "Address", workload::destination);
resource!(Service, pb::Service, "Service", service::service);
resource!(EndpointShard, pb::Endpoints, "Endpoints", service::shard);
resource!(PodNetwork, pb::PodNetwork, "PodNetwork", pod::network);
resource!(PodEgress, pb::PodEgress, "PodEgress", pod::egress);
resource!(Members, pb::Members, "Members", pod::members);

/// Puts a resource into a response.
pub fn pack<R: Resource>(
    name: impl Into<String>,
    version: impl Into<String>,
    resource: &R,
) -> crate::discovery::Resource {
    let value = resource.encode();
    crate::discovery::Resource {
        name: name.into(),
        version: version.into(),
        resource: Some(prost_types::Any {
            type_url: R::TYPE_URL.to_owned(),
            value,
        }),
    }
}

fn understood(features: &[String]) -> Read<()> {
    match features
        .iter()
        .find(|feature| !UNDERSTOOD.contains(&feature.as_str()))
    {
        None => Ok(()),
        Some(feature) => Err(FieldError::new(
            "must_understand",
            format!("`{feature}` is not known to this version; update it before using the feature"),
        )),
    }
}
