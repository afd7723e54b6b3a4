//! An update as the index understands it: decoded and checked whole.

use std::{net::IpAddr, sync::Arc};

use turnpike_rules::{
    ServiceKey,
    service::{EndpointShard, Service},
    workload::{Destination, SelfConfig},
};
use turnpike_wire::{ads::Update, names, resource::Resource};

use crate::mesh::Lookup;

/// `None` is: there is no such thing.
#[derive(Debug)]
pub(super) enum Change {
    Own(Option<Box<SelfConfig>>),
    Address(IpAddr, Option<Lookup>),
    Service(ServiceKey, Option<Box<Service>>),
    Shard(ServiceKey, Arc<str>, Option<EndpointShard>),
}

/// Decodes all of an update, or says what of it is wrong.
pub(super) fn changes(update: Update) -> Result<Vec<Change>, String> {
    let Update {
        type_url,
        added,
        removed,
    } = update;
    let present = added
        .iter()
        .map(|added| (added.name.as_str(), Some(added.bytes.as_slice())));
    let absent = removed.iter().map(|name| (name.as_str(), None));
    let read = match type_url.as_str() {
        SelfConfig::TYPE_URL => own,
        Destination::TYPE_URL => address,
        Service::TYPE_URL => service,
        EndpointShard::TYPE_URL => shard,
        other => return Err(format!("`{other}` is not for sidecars")),
    };
    present
        .chain(absent)
        .map(|(name, bytes)| read(name, bytes))
        .collect()
}

fn own(name: &str, bytes: Option<&[u8]>) -> Result<Change, String> {
    Ok(Change::Own(
        decode::<SelfConfig>(name, bytes)?.map(Box::new),
    ))
}

fn address(name: &str, bytes: Option<&[u8]>) -> Result<Change, String> {
    let (_, ip) = names::parse_address(name).ok_or_else(|| unknown(name))?;
    let lookup = decode::<Destination>(name, bytes)?.map(|destination| match destination {
        Destination::Service(key) => Lookup::Service(key),
        Destination::Workload(workload) => Lookup::Workload(Arc::new(workload)),
    });
    Ok(Change::Address(ip, lookup))
}

fn service(name: &str, bytes: Option<&[u8]>) -> Result<Change, String> {
    let (key, _) = names::parse_service(name).ok_or_else(|| unknown(name))?;
    Ok(Change::Service(
        key,
        decode::<Service>(name, bytes)?.map(Box::new),
    ))
}

fn shard(name: &str, bytes: Option<&[u8]>) -> Result<Change, String> {
    let (key, _) = names::parse_shard(name).ok_or_else(|| unknown(name))?;
    Ok(Change::Shard(
        key,
        name.into(),
        decode::<EndpointShard>(name, bytes)?,
    ))
}

fn decode<R: Resource>(name: &str, bytes: Option<&[u8]>) -> Result<Option<R>, String> {
    bytes
        .map(|bytes| R::decode(name, bytes))
        .transpose()
        .map_err(|error| error.to_string())
}

fn unknown(name: &str) -> String {
    format!("`{name}` is not a name of its type")
}
