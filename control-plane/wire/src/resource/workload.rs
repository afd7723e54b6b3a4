//! What is at an address, and what a sidecar knows of its own pod.

use std::sync::Arc;

use turnpike_rules::workload::{
    BackedService, Destination, MtlsMode, Names, SelfConfig, Telemetry, Workload,
};

use super::{
    authz,
    field::{
        FieldError, Read, each, identity, ip, ip_bytes, key, mapping, messages, optional, port,
        port_numbers, ports, prefix, prefix_messages, required, text, within, workload_port,
    },
    understood,
};
use crate::{mesh as pb, names};

pub(super) fn destination(name: &str, message: pb::Address) -> Read<Destination> {
    use pb::address::Kind;
    let Some((_, asked)) = names::parse_address(name) else {
        return Err(FieldError::new("", "the name is not network/address"));
    };
    match message.kind {
        Some(Kind::Service(service)) => Ok(Destination::Service(within("service", key(service))?)),
        Some(Kind::Workload(message)) => {
            let workload = within("workload", workload(message))?;
            if workload.address.to_canonical() == asked {
                Ok(Destination::Workload(workload))
            } else {
                let reason = format!("{} is not what the name says", workload.address);
                Err(FieldError::new("workload.address", reason))
            }
        }
        None => Err(FieldError::new(
            "kind",
            "this kind of destination is not known",
        )),
    }
}

fn workload(message: pb::Workload) -> Read<Workload> {
    let pb::Workload {
        uid,
        namespace,
        name,
        address,
        identity: peer,
        service,
        ports,
        names,
    } = message;
    Ok(Workload {
        names: names.map(self::names),
        uid: text("uid", uid)?,
        namespace: text("namespace", namespace)?,
        name: text("name", name)?,
        address: within("address", ip(address))?,
        identity: optional("identity", peer, identity)?,
        service: optional("service", service, key)?,
        ports: each("ports", ports, workload_port)?,
    })
}

pub(super) fn names(message: pb::Names) -> Arc<Names> {
    let pb::Names {
        workload,
        namespace,
        service,
        revision,
        app,
        version,
    } = message;
    Arc::new(Names {
        workload: workload.into(),
        namespace: namespace.into(),
        service: service.into(),
        revision: revision.into(),
        app: app.into(),
        version: version.into(),
    })
}

impl From<&Names> for pb::Names {
    fn from(names: &Names) -> Self {
        let Names {
            workload,
            namespace,
            service,
            revision,
            app,
            version,
        } = names;
        Self {
            workload: workload.to_string(),
            namespace: namespace.to_string(),
            service: service.to_string(),
            revision: revision.to_string(),
            app: app.to_string(),
            version: version.to_string(),
        }
    }
}

pub(super) fn self_config(asked: &str, message: pb::Self_) -> Read<SelfConfig> {
    let pb::Self_ {
        uid,
        namespace,
        name,
        identity: own,
        workload,
        zone,
        ports: own_ports,
        probe_ports,
        mtls,
        port_mtls,
        authorization,
        backs,
        telemetry,
        mesh_prefixes,
        must_understand,
        names,
    } = message;
    understood(&must_understand)?;
    // An older control plane says the workload alone.
    let names = match names {
        Some(names) => self::names(names),
        None => Arc::new(Names::unlabelled(workload, namespace.as_str())),
    };
    if uid != asked {
        return Err(FieldError::new(
            "uid",
            format!("`{uid}` is not what the name says"),
        ));
    }
    Ok(SelfConfig {
        uid: text("uid", uid)?,
        namespace: text("namespace", namespace)?,
        name: text("name", name)?,
        identity: required("identity", own, identity)?,
        names,
        zone: zone.into(),
        ports: each("ports", own_ports, workload_port)?,
        probe_ports: ports("probe_ports", probe_ports)?,
        mtls: within("mtls", mode(mtls))?,
        port_mtls: each("port_mtls", port_mtls, |message| {
            Ok((
                within("port", port(message.port))?,
                within("mode", mode(message.mode))?,
            ))
        })?,
        // Absent is not "no policy": what decides on access is never guessed.
        authorization: required("authorization", authorization, authz::authorization)?,
        backs: each("backs", backs, backed)?,
        telemetry: optional("telemetry", telemetry, self::telemetry)?.unwrap_or_default(),
        mesh_prefixes: each("mesh_prefixes", mesh_prefixes, prefix)?,
    })
}

fn mode(mode: i32) -> Read<MtlsMode> {
    match pb::MtlsMode::try_from(mode) {
        Ok(pb::MtlsMode::Permissive) => Ok(MtlsMode::Permissive),
        Ok(pb::MtlsMode::Strict) => Ok(MtlsMode::Strict),
        Err(_) => Err(FieldError::new(
            "",
            format!("mode {mode} is not known to this version"),
        )),
    }
}

fn mode_number(mode: MtlsMode) -> i32 {
    match mode {
        MtlsMode::Permissive => pb::MtlsMode::Permissive.into(),
        MtlsMode::Strict => pb::MtlsMode::Strict.into(),
    }
}

fn backed(message: pb::BackedService) -> Read<BackedService> {
    Ok(BackedService {
        key: required("key", message.key, key)?,
        ports: each("ports", message.ports, mapping)?,
    })
}

fn telemetry(message: pb::Telemetry) -> Read<Telemetry> {
    let pb::Telemetry {
        sampling,
        access_log,
    } = message;
    if !(0.0..=1.0).contains(&sampling) {
        return Err(FieldError::new(
            "sampling",
            format!("{sampling} is not from 0 to 1"),
        ));
    }
    Ok(Telemetry {
        sampling,
        access_log,
    })
}

impl From<&Destination> for pb::Address {
    fn from(destination: &Destination) -> Self {
        use pb::address::Kind;
        let kind = match destination {
            Destination::Service(key) => Kind::Service(key.into()),
            Destination::Workload(workload) => Kind::Workload(workload.into()),
        };
        Self { kind: Some(kind) }
    }
}

impl From<&Workload> for pb::Workload {
    fn from(workload: &Workload) -> Self {
        let Workload {
            uid,
            namespace,
            name,
            address,
            identity,
            service,
            ports,
            names,
        } = workload;
        Self {
            uid: uid.to_string(),
            namespace: namespace.to_string(),
            name: name.to_string(),
            address: ip_bytes(*address),
            identity: identity.as_ref().map(Into::into),
            service: service.as_ref().map(Into::into),
            ports: messages(ports),
            names: names.as_deref().map(Into::into),
        }
    }
}

impl From<&SelfConfig> for pb::Self_ {
    fn from(config: &SelfConfig) -> Self {
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
        } = config;
        Self {
            uid: uid.to_string(),
            namespace: namespace.to_string(),
            name: name.to_string(),
            identity: Some(identity.into()),
            workload: names.workload.to_string(),
            names: Some((&**names).into()),
            zone: zone.to_string(),
            ports: messages(ports),
            probe_ports: port_numbers(probe_ports),
            mtls: mode_number(*mtls),
            port_mtls: port_mtls
                .iter()
                .map(|(port, mode)| pb::PortMtls {
                    port: (*port).into(),
                    mode: mode_number(*mode),
                })
                .collect(),
            authorization: Some(authorization.into()),
            backs: messages(backs),
            telemetry: Some(pb::Telemetry {
                sampling: telemetry.sampling,
                access_log: telemetry.access_log,
            }),
            mesh_prefixes: prefix_messages(mesh_prefixes),
            must_understand: Vec::new(),
        }
    }
}

impl From<&BackedService> for pb::BackedService {
    fn from(backed: &BackedService) -> Self {
        Self {
            key: Some((&backed.key).into()),
            ports: messages(&backed.ports),
        }
    }
}
