//! Puts the CNI executable and its configuration where the container runtime looks for them.
//!
//! The executable comes first. The configuration comes once ADDs can be served, since a node with a
//! configuration counts as ready; whoever takes it away or changes it finds it written again. Both
//! are written whole beside their place and renamed, so that a runtime never reads half of one.
//! Neither goes when the agent does: pods keep their network, and a DEL needs its executable.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::json;

use crate::node::Node;

pub const PLUGIN: &str = "turnpike-cni";
pub const CONFLIST: &str = "10-turnpike.conflist";
/// Of the reference plugins: makes hostPorts.
const PORTMAP: &str = "portmap";
/// What a runtime takes for a configuration; it reads them by name and uses the first.
const READ_BY_RUNTIMES: [&str; 3] = ["conf", "conflist", "json"];

const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Where the container runtime looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folders {
    pub bin: PathBuf,
    pub conf: PathBuf,
}

/// How far it is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Standing {
    /// Nothing is to be installed, or everything stands.
    #[default]
    Fine,
    Pending,
    /// Why the runtime does not call us.
    Hindered(String),
}

#[derive(Debug, thiserror::Error)]
#[error("{path} cannot be written: {source}", path = path.display())]
pub struct InstallError {
    path: PathBuf,
    source: io::Error,
}

/// Installs, and sees that it stays, until the node stops.
pub async fn keep(node: Arc<Node>, folders: Folders) {
    let stop = node.stop.clone();
    stop.run_until_cancelled(install(&node, folders)).await;
}

async fn install(node: &Node, folders: Folders) {
    let mut installer = Installer {
        folders,
        socket: node.settings.cni_socket.clone(),
        copied: None,
    };
    loop {
        let serving = node.is_warm();
        let work = move || {
            let standing = installer.install(serving);
            (installer, standing)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok((back, standing)) => {
                installer = back;
                stand(node, standing);
            }
            Err(error) => {
                tracing::error!(%error, "writing the CNI's files broke off");
                return;
            }
        }
        let pause = tokio::time::sleep(LOOK_EVERY);
        if serving {
            pause.await;
        } else {
            tokio::select! {
                () = node.warm() => {}
                () = pause => {}
            }
        }
    }
}

#[derive(Debug)]
struct Installer {
    folders: Folders,
    /// Where the executable finds the agent.
    socket: PathBuf,
    /// The executable as it was left: it is large, and not read again while it is the same file.
    copied: Option<Seen>,
}

/// What changes when a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    inode: u64,
    length: u64,
    mode: u32,
    changed: (i64, i64),
}

impl Installer {
    /// Makes both files be what they should. A runtime may call the executable as soon as it finds
    /// the configuration, so that comes last, and only if ADDs can be served.
    fn install(&mut self, serving: bool) -> Standing {
        match self.write(serving) {
            Err(error) => Standing::Hindered(error.to_string()),
            Ok(()) if !serving => Standing::Pending,
            Ok(()) => match rival(&self.folders.conf) {
                Some(rival) => Standing::Hindered(outdone(&self.folders.conf, &rival)),
                None => Standing::Fine,
            },
        }
    }

    fn write(&mut self, serving: bool) -> Result<(), InstallError> {
        let path = self.folders.bin.join(PLUGIN);
        if self.copied.is_none() || self.copied != Seen::at(&path) {
            plugin(&path)?;
            self.copied = Seen::at(&path);
        }
        if serving {
            conflist(&self.folders, &self.socket)?;
        }
        Ok(())
    }
}

impl Seen {
    fn at(path: &Path) -> Option<Self> {
        let found = fs::symlink_metadata(path).ok()?;
        Some(Self {
            inode: found.ino(),
            length: found.len(),
            mode: found.mode(),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// Says what changed, once.
fn stand(node: &Node, standing: Standing) {
    let told = standing.clone();
    let changed = node.installed.send_if_modified(|before| {
        let changed = *before != standing;
        *before = standing;
        changed
    });
    match told {
        Standing::Hindered(why) if changed => {
            tracing::error!("the container runtime does not call this agent: {why}");
        }
        Standing::Fine if changed => {
            tracing::info!("plugin and configuration are where the container runtime looks");
        }
        _ => {}
    }
}

fn outdone(conf: &Path, rival: &str) -> String {
    format!(
        "{rival} comes before {CONFLIST} in {conf}, and the container runtime uses the first: new pods \
         get another CNI's network, without any policy. Remove that CNI, then its file",
        conf = conf.display()
    )
}

/// Copies the executable that lies beside this one.
fn plugin(path: &Path) -> Result<(), InstallError> {
    let ours = std::env::current_exe()
        .map(|agent| agent.with_file_name(PLUGIN))
        .and_then(|path| fs::read(&path).map_err(|error| naming(&path, &error)));
    let failed = |source| InstallError {
        path: path.to_owned(),
        source,
    };
    replace(path, &ours.map_err(failed)?, 0o755).map_err(failed)
}

fn naming(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("its original {}: {error}", path.display()),
    )
}

/// Whatever stands under our own name is made what this version says.
fn conflist(folders: &Folders, socket: &Path) -> Result<(), InstallError> {
    let path = folders.conf.join(CONFLIST);
    let text = render(socket, folders.bin.join(PORTMAP).exists());
    replace(&path, text.as_bytes(), 0o644).map_err(|source| InstallError { path, source })
}

fn render(socket: &Path, portmap: bool) -> String {
    let mut plugins = vec![json!({"type": PLUGIN, "agentSocket": socket})];
    if portmap {
        plugins.push(json!({"type": PORTMAP, "capabilities": {"portMappings": true}}));
    }
    let list = json!({"cniVersion": "1.0.0", "name": "turnpike", "plugins": plugins});
    format!("{list:#}\n")
}

/// Another CNI's configuration that the runtime prefers.
fn rival(conf: &Path) -> Option<String> {
    let names = fs::read_dir(conf).ok()?.flatten().filter_map(|entry| {
        let path = entry.path();
        let kind = path.extension()?.to_str()?;
        READ_BY_RUNTIMES
            .contains(&kind)
            .then(|| entry.file_name().to_string_lossy().into_owned())
    });
    names.min().filter(|first| first.as_str() < CONFLIST)
}

/// Makes a file be this, in one step and durably; does nothing if it is.
fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let is_so = fs::symlink_metadata(path).is_ok_and(|found| {
        found.is_file()
            && found.permissions().mode() & 0o777 == mode
            && found.len() == content.len() as u64
    });
    if is_so && fs::read(path)? == content {
        return Ok(());
    }
    // Runtimes read neither a name like this nor, in the folder of executables, one they do not ask
    // for. One left by a killed run is replaced.
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    remove(&new)?;
    let written = write_durably(&new, content, mode).and_then(|()| {
        step("renamed");
        fs::rename(&new, path)
    });
    if written.is_err() {
        // The first error is the one to tell: on a full disk this makes room again.
        remove(&new).ok();
    }
    written?;
    step("synced");
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

fn write_durably(new: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(new)?;
    step("written");
    let (first, rest) = content.split_at(content.len() / 2);
    file.write_all(first)?;
    step("written whole");
    file.write_all(rest)?;
    step("executable");
    file.set_permissions(Permissions::from_mode(mode))?;
    step("durable");
    file.sync_all()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A place where a test ends the process: before it is what the word says.
#[cfg(not(test))]
const fn step(_: &str) {}
#[cfg(test)]
use tests::step;

#[cfg(test)]
mod tests;
