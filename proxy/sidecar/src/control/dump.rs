//! What is known, for people: `/config_dump` and `/clusters`.

use std::fmt::Write;

use serde_json::{Value, json};
use turnpike_rules::{service::EndpointState, workload::SelfConfig};

use super::index::{AddressState, Index};
use crate::mesh::{EndpointView, Lookup, ServiceView};

pub(super) fn config(index: &Index) -> Value {
    let own = index.own.as_ref().map(|own| self_config(&own.borrow()));
    let mut addresses: Vec<_> = index.addresses.iter().collect();
    addresses.sort_by_key(|(ip, _)| **ip);
    let addresses: serde_json::Map<_, _> = addresses
        .into_iter()
        .map(|(ip, entry)| (ip.to_string(), address(&entry.state)))
        .collect();
    let mut services: Vec<_> = index.services.iter().collect();
    services.sort_by_key(|(key, _)| *key);
    let services: serde_json::Map<_, _> = services
        .into_iter()
        .map(|(key, entry)| {
            let view = entry
                .current
                .as_ref()
                .map(|current| service(&current.borrow()));
            (key.to_string(), view.unwrap_or(Value::Null))
        })
        .collect();
    json!({
        "cluster": index.names.cluster,
        "connected": index.connected,
        "self": own,
        "addresses": addresses,
        "services": services,
    })
}

/// Envoy's form: `cluster::address::field::value`.
pub(super) fn clusters(index: &Index) -> String {
    let mut text = String::new();
    let mut services: Vec<_> = index.services.iter().collect();
    services.sort_by_key(|(key, _)| *key);
    for (key, entry) in services {
        let Some(current) = &entry.current else {
            continue;
        };
        let view = current.borrow().clone();
        for EndpointView { endpoint, .. } in &view.endpoints {
            let identity = endpoint
                .identity
                .as_ref()
                .map_or("-".to_owned(), ToString::to_string);
            let state = state(endpoint.state);
            let (address, zone) = (endpoint.address, &endpoint.zone);
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{key}::{address}::state::{state}");
            let _ = writeln!(text, "{key}::{address}::zone::{zone}");
            let _ = writeln!(text, "{key}::{address}::identity::{identity}");
        }
    }
    text
}

fn self_config(own: &SelfConfig) -> Value {
    let SelfConfig {
        uid,
        namespace,
        name,
        identity,
        names,
        zone,
        ports,
        probe_ports,
        mtls,
        port_mtls,
        authorization,
        backs,
        telemetry,
        mesh_prefixes,
    } = own;
    let text = |items: Vec<String>| items;
    json!({
        "uid": &**uid,
        "namespace": &**namespace,
        "name": &**name,
        "identity": identity.to_string(),
        "workload": &*names.workload,
        "canonicalService": format!("{}/{}", names.service, names.revision),
        "zone": &**zone,
        "ports": text(ports.iter().map(|p| format!("{}/{:?}", p.port, p.protocol)).collect()),
        "probePorts": probe_ports,
        "mtls": format!("{mtls:?}"),
        "portMtls": text(port_mtls.iter().map(|(p, mode)| format!("{p}/{mode:?}")).collect()),
        "authorization": {
            "deny": text(authorization.deny.iter().map(|p| format!("{p:?}")).collect()),
            "allow": text(authorization.allow.iter().map(|p| format!("{p:?}")).collect()),
        },
        "backs": text(backs.iter().map(|backed| backed.key.to_string()).collect()),
        "telemetry": {"sampling": telemetry.sampling, "accessLog": telemetry.access_log},
        "meshPrefixes": text(mesh_prefixes.iter().map(ToString::to_string).collect()),
    })
}

fn address(state: &AddressState) -> Value {
    match state {
        AddressState::Asked(_) => json!("asked"),
        AddressState::Missing => json!("not of the mesh"),
        AddressState::Found(Lookup::Service(key)) => json!({"service": key.to_string()}),
        AddressState::Found(Lookup::Workload(workload)) => json!({
            "workload": format!("{}/{}", workload.namespace, workload.name),
            "uid": &*workload.uid,
            "identity": workload.identity.as_ref().map(ToString::to_string),
        }),
        AddressState::Found(_) => Value::Null,
    }
}

fn service(view: &ServiceView) -> Value {
    let ports: Vec<_> = view
        .service
        .ports
        .iter()
        .map(|port| {
            let routes: Vec<_> = port
                .routes
                .routes
                .iter()
                .map(|route| &*route.name)
                .collect();
            json!({
                "port": port.port,
                "name": &*port.name,
                "protocol": format!("{:?}", port.protocol),
                "routes": routes,
            })
        })
        .collect();
    let endpoints: Vec<_> = view
        .endpoints
        .iter()
        .map(|EndpointView { endpoint, .. }| {
            json!({
                "uid": &*endpoint.uid,
                "address": endpoint.address.to_string(),
                "identity": endpoint.identity.as_ref().map(ToString::to_string),
                "zone": &*endpoint.zone,
                "state": state(endpoint.state),
            })
        })
        .collect();
    json!({
        "consumer": view.service.consumer.as_deref(),
        "vips": view.service.vips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "ports": ports,
        "traffic": format!("{:?}", view.service.traffic),
        "endpoints": endpoints,
    })
}

fn state(state: EndpointState) -> &'static str {
    match state {
        EndpointState::Serving => "serving",
        EndpointState::Terminating => "terminating",
    }
}
