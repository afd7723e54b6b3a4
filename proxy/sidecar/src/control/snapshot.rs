//! The last state on disk: what was in effect, without keys.
//!
//! The file is a sequence of length-delimited `DeltaDiscoveryResponse`s behind a line that names
//! the format. It is written beside the old one and renamed over it, so that there is always one
//! whole file; one that cannot be read is as good as none.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use bytes::Buf;
use prost::Message;
use turnpike_wire::{
    ads::{Added, Update},
    discovery::{DeltaDiscoveryResponse, Resource},
};

/// The file's name in the state directory.
pub const FILE: &str = "mesh.snapshot";
const HEADER: &[u8] = b"turnpike mesh snapshot 1\n";
/// Above any real state, below what would hurt.
const MAX_BYTES: u64 = 256 * 1024 * 1024;

/// The last state, if there is one.
pub fn read(path: &Path) -> io::Result<Option<Vec<Update>>> {
    let bytes = match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_BYTES => return Err(invalid("it is too large")),
        Ok(_) => fs::read(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut rest = bytes
        .strip_prefix(HEADER)
        .ok_or_else(|| invalid("it is not of a format known to this version"))?;
    let mut updates = Vec::new();
    while rest.has_remaining() {
        let response = DeltaDiscoveryResponse::decode_length_delimited(&mut rest)
            .map_err(|error| invalid(&error.to_string()))?;
        updates.push(update(response));
    }
    Ok(Some(updates))
}

/// Replaces the last state; makes the directory if it is not there.
pub fn write(path: &Path, updates: &[Update]) -> io::Result<()> {
    let mut bytes = HEADER.to_vec();
    for update in updates {
        bytes.extend(response(update).encode_length_delimited_to_vec());
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let beside = path.with_extension("new");
    let mut file = File::create(&beside)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

fn update(response: DeltaDiscoveryResponse) -> Update {
    let added = |resource: Resource| {
        let bytes = resource.resource.map(|any| any.value).unwrap_or_default();
        Added {
            name: resource.name,
            version: resource.version,
            bytes,
        }
    };
    Update {
        type_url: response.type_url,
        added: response.resources.into_iter().map(added).collect(),
        removed: Vec::new(),
    }
}

fn response(update: &Update) -> DeltaDiscoveryResponse {
    let resource = |added: &Added| Resource {
        name: added.name.clone(),
        version: added.version.clone(),
        resource: Some(prost_types::Any {
            type_url: update.type_url.clone(),
            value: added.bytes.clone(),
        }),
    };
    DeltaDiscoveryResponse {
        type_url: update.type_url.clone(),
        resources: update.added.iter().map(resource).collect(),
        ..Default::default()
    }
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
