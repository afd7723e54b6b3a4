//! Services and their endpoints.

use std::{collections::BTreeSet, sync::Arc};

use turnpike_rules::{
    route::RouteTable,
    service::{Endpoint, EndpointShard, EndpointState, Service, ServicePort},
    workload::Names,
};

use super::{
    field::{
        FieldError, Read, each, identity, ip, ip_bytes, key, mapping, messages, optional, port,
        protocol, protocol_number, required, strings, text, within,
    },
    route, traffic, understood, workload,
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
    let pb::Endpoints {
        ports,
        endpoints,
        names,
    } = message;
    let names: Vec<Arc<Names>> = names.into_iter().map(workload::names).collect();
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
        endpoints: each("endpoints", endpoints, |message| endpoint(message, &names))?,
    })
}

fn endpoint(message: pb::Endpoint, listed: &[Arc<Names>]) -> Read<Endpoint> {
    let pb::Endpoint {
        uid,
        address,
        identity: peer,
        zone,
        terminating,
        names,
    } = message;
    let names = match usize::try_from(names).ok().and_then(|n| n.checked_sub(1)) {
        None => None,
        Some(index) => Some(listed.get(index).cloned().ok_or_else(|| {
            FieldError::new("names", format!("{names} of {} are listed", listed.len()))
        })?),
    };
    Ok(Endpoint {
        names,
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
        // Sorted, so that the same endpoints have the same bytes.
        let listed: BTreeSet<&Arc<Names>> = shard
            .endpoints
            .iter()
            .filter_map(|endpoint| endpoint.names.as_ref())
            .collect();
        let listed: Vec<&Arc<Names>> = listed.into_iter().collect();
        let endpoint = |endpoint| endpoint_message(endpoint, &listed);
        Self {
            ports: messages(&shard.ports),
            endpoints: shard.endpoints.iter().map(endpoint).collect(),
            names: listed.iter().map(|names| (&***names).into()).collect(),
        }
    }
}

fn endpoint_message(endpoint: &Endpoint, listed: &[&Arc<Names>]) -> pb::Endpoint {
    let Endpoint {
        uid,
        address,
        identity,
        zone,
        state,
        names,
    } = endpoint;
    let index = names
        .as_ref()
        .and_then(|own| listed.binary_search(&own).ok());
    pb::Endpoint {
        uid: uid.to_string(),
        address: ip_bytes(*address),
        identity: identity.as_ref().map(Into::into),
        zone: zone.to_string(),
        terminating: *state == EndpointState::Terminating,
        names: index.map_or(0, |index| u32::try_from(index + 1).unwrap_or(0)),
    }
}
