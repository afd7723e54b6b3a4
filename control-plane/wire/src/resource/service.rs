//! Services and their endpoints.

use turnpike_rules::{
    route::RouteTable,
    service::{Endpoint, EndpointShard, EndpointState, Service, ServicePort},
};

use super::{
    field::{
        FieldError, Read, each, identity, ip, ip_bytes, key, mapping, messages, optional, port,
        protocol, protocol_number, required, strings, text, within,
    },
    route, traffic, understood,
};
use crate::{mesh as pb, names};

pub(super) fn service(name: &str, message: pb::Service) -> Read<Service> {
    let pb::Service {
        key: own_key,
        consumer,
        vips,
        ports,
        traffic,
        shards,
        must_understand,
    } = message;
    understood(&must_understand)?;
    let own_key = required("key", own_key, key)?;
    let Some((asked, view)) = names::parse_service(name) else {
        return Err(FieldError::new(
            "",
            "the name is not cluster/namespace/name[@consumer]",
        ));
    };
    if own_key != asked {
        return Err(FieldError::new(
            "key",
            format!("`{own_key}` is not what the name says"),
        ));
    }
    // The plain Service answers where a consumer has no view of its own.
    if !consumer.is_empty() && view != Some(&consumer) {
        return Err(FieldError::new(
            "consumer",
            format!("`{consumer}` is not what the name says"),
        ));
    }
    let shards = each("shards", shards, |shard| match names::parse_shard(&shard) {
        Some((of, _)) if of == own_key => Ok(shard.into()),
        _ => Err(FieldError::new(
            "",
            format!("`{shard}` is no shard of `{own_key}`"),
        )),
    })?;
    Ok(Service {
        key: own_key,
        consumer: (!consumer.is_empty()).then(|| consumer.into()),
        vips: each("vips", vips, ip)?,
        ports: each("ports", ports, service_port)?,
        traffic: optional("traffic", traffic, traffic::policy)?.unwrap_or_default(),
        shards,
    })
}

fn service_port(message: pb::ServicePort) -> Read<ServicePort> {
    let pb::ServicePort {
        port: number,
        name,
        protocol: spoken,
        routes,
    } = message;
    // In precedence order: the control plane sorts once for all.
    let routes = each("routes", routes, |message| {
        route::route(message).map(Into::into)
    })?;
    Ok(ServicePort {
        port: within("port", port(number))?,
        name: name.into(),
        protocol: protocol(spoken),
        routes: RouteTable { routes },
    })
}

pub(super) fn shard(name: &str, message: pb::Endpoints) -> Read<EndpointShard> {
    let pb::Endpoints { ports, endpoints } = message;
    if names::parse_shard(name).is_none() {
        return Err(FieldError::new(
            "",
            "the name is not cluster/namespace/name/shard",
        ));
    }
    if endpoints.len() > EndpointShard::LIMIT {
        let reason = format!(
            "{} endpoints; at most {}",
            endpoints.len(),
            EndpointShard::LIMIT
        );
        return Err(FieldError::new("endpoints", reason));
    }
    Ok(EndpointShard {
        name: name.into(),
        ports: each("ports", ports, mapping)?,
        endpoints: each("endpoints", endpoints, endpoint)?,
    })
}

fn endpoint(message: pb::Endpoint) -> Read<Endpoint> {
    let pb::Endpoint {
        uid,
        address,
        identity: peer,
        zone,
        terminating,
    } = message;
    Ok(Endpoint {
        uid: text("uid", uid)?,
        address: within("address", ip(address))?,
        identity: optional("identity", peer, identity)?,
        zone: zone.into(),
        state: if terminating {
            EndpointState::Terminating
        } else {
            EndpointState::Serving
        },
    })
}

impl From<&Service> for pb::Service {
    fn from(service: &Service) -> Self {
        let Service {
            key,
            consumer,
            vips,
            ports,
            traffic,
            shards,
        } = service;
        Self {
            key: Some(key.into()),
            consumer: consumer.as_deref().unwrap_or_default().to_owned(),
            vips: vips.iter().copied().map(ip_bytes).collect(),
            ports: messages(ports),
            traffic: Some(traffic.into()),
            shards: strings(shards),
            must_understand: Vec::new(),
        }
    }
}

impl From<&ServicePort> for pb::ServicePort {
    fn from(port: &ServicePort) -> Self {
        let ServicePort {
            port,
            name,
            protocol,
            routes,
        } = port;
        Self {
            port: (*port).into(),
            name: name.to_string(),
            protocol: protocol_number(*protocol),
            routes: messages(&routes.routes),
        }
    }
}

impl From<&EndpointShard> for pb::Endpoints {
    fn from(shard: &EndpointShard) -> Self {
        Self {
            ports: messages(&shard.ports),
            endpoints: messages(&shard.endpoints),
        }
    }
}

impl From<&Endpoint> for pb::Endpoint {
    fn from(endpoint: &Endpoint) -> Self {
        let Endpoint {
            uid,
            address,
            identity,
            zone,
            state,
        } = endpoint;
        Self {
            uid: uid.to_string(),
            address: ip_bytes(*address),
            identity: identity.as_ref().map(Into::into),
            zone: zone.to_string(),
            terminating: *state == EndpointState::Terminating,
        }
    }
}
