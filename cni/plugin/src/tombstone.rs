//! A DEL that found no agent.
//!
//! The folder `removed` beside the agent's socket holds one file for each:
//! `<container id>@<interface>.json`, written whole or not at all:
//!
//! ```json
//! {"container_id": "…", "ifname": "eth0", "network": "turnpike", "netns": "/run/netns/…",
//!  "pod_namespace": "shop", "pod_name": "cart-0", "time_ms": 1767225600000}
//! ```
//!
//! All but `time_ms` (Unix time) are as in the node protocol's `DelRequest`. At its start, before it
//! serves, and whenever it looks, the agent does each DEL and deletes the file after it. Names that
//! begin with `.` are files not yet whole. A DEL is by container, so a late one harms nobody.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::input::Attachment;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    pub container_id: String,
    pub ifname: String,
    pub network: String,
    pub netns: String,
    pub pod_namespace: String,
    pub pod_name: String,
    pub time_ms: u64,
}

#[derive(Debug, thiserror::Error)]
#[error("the removal cannot be noted in {}: {source}", folder.display())]
pub struct WriteError {
    folder: PathBuf,
    source: io::Error,
}

impl Tombstone {
    pub fn new(network: &str, attachment: &Attachment, now: SystemTime) -> Self {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let Attachment {
            container_id,
            ifname,
            netns,
            pod_namespace,
            pod_name,
            pod_uid: _,
        } = attachment.clone();
        Self {
            container_id,
            ifname,
            network: network.to_owned(),
            netns,
            pod_namespace,
            pod_name,
            time_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        }
    }

    pub fn write(&self, socket: &Path) -> Result<(), WriteError> {
        let folder = folder(socket);
        self.write_into(&folder)
            .map_err(|source| WriteError { folder, source })
    }

    fn write_into(&self, folder: &Path) -> io::Result<()> {
        // After a boot nothing is there yet, and the agent's folder is open to the gate as well.
        let mut open = DirBuilder::new();
        open.recursive(true).mode(0o755);
        folder.parent().map_or(Ok(()), |above| open.create(above))?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        let name = format!("{}@{}.json", self.container_id, self.ifname);
        let unfinished = folder.join(format!(".{name}.{}", std::process::id()));
        let mut file = File::create(&unfinished)?;
        let written = file
            .write_all(serde_json::to_string(self)?.as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&unfinished, folder.join(name)));
        if written.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        written?;
        File::open(folder)?.sync_all()
    }
}

/// Where removals are noted for the agent with this socket.
pub fn folder(socket: &Path) -> PathBuf {
    socket.with_file_name("removed")
}
