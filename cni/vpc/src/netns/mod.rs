//! Named network namespaces: made, entered, filled with processes, and removed without a trace.
//!
//! A namespace is a file in `/run/netns`, as `ip netns` keeps them, so every tool that takes a
//! name there works on ours. [`Namespace::create`] makes one, [`Namespace::run`] calls a closure
//! inside it on a thread of its own, [`Command`] starts a process in it (user, mounts, files),
//! [`processes`] lists who lives in it, and [`Namespace::remove`] kills those and takes it away.

mod child;
mod command;
mod process;

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

pub use self::{
    command::{Command, Output},
    process::{Process, kill_all, processes},
};

/// Where named namespaces are kept; shared with iproute2.
pub const DIRECTORY: &str = "/run/netns";

const NO_TYPE: Option<&str> = None;

/// What went wrong with a namespace or with starting something in it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{0}` is not a namespace name: use 1 to 200 letters, digits, `-`, `_` or `.`")]
    Name(String),
    #[error("network namespace `{0}` does not exist")]
    NotFound(String),
    #[error("network namespace `{0}` exists already; remove it first")]
    Exists(String),
    #[error("{action}: {source}{}", root_hint(source))]
    System { action: String, source: io::Error },
    #[error("the mount point `{0}` does not exist; create it or mount a tmpfs above it first")]
    MountPoint(PathBuf),
    #[error("the work inside network namespace `{0}` panicked")]
    Panicked(String),
    #[error("processes {1:?} in network namespace `{0}` survived SIGKILL")]
    Immortal(String, Vec<i32>),
}

fn root_hint(source: &io::Error) -> &'static str {
    if source.kind() == io::ErrorKind::PermissionDenied && !nix::unistd::geteuid().is_root() {
        " (run as root: namespaces need CAP_SYS_ADMIN)"
    } else {
        ""
    }
}

/// Turns an I/O error into ours, naming what was tried.
pub(crate) fn system<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |source| Error::System {
        action: action.into(),
        source: source.into(),
    }
}

/// A handle on a named namespace. Dropping it leaves the namespace alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes a namespace with loopback up and nothing forwarded between its links.
    pub fn create(name: &str) -> Result<Self, Error> {
        let namespace = Self::handle(name)?;
        prepare_directory().map_err(system(format!("preparing {DIRECTORY}")))?;
        match fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(namespace.path())
        {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::Exists(name.into()));
            }
            Err(error) => return Err(system(format!("creating namespace `{name}`"))(error)),
        }
        let path = namespace.path();
        let made = on_thread(name, move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let own = format!("/proc/self/task/{}/ns/net", nix::unistd::gettid());
            mount(
                Some(own.as_str()),
                &path,
                NO_TYPE,
                MsFlags::MS_BIND,
                NO_TYPE,
            )
        })?;
        if let Err(error) = made {
            // The file is ours and empty; nothing else could be lost.
            let _ = fs::remove_file(namespace.path());
            return Err(system(format!("creating namespace `{name}`"))(error));
        }
        namespace.set_forwarding(false)?;
        namespace.set_loopback_up()?;
        Ok(namespace)
    }

    /// A namespace that exists.
    pub fn open(name: &str) -> Result<Self, Error> {
        let namespace = Self::handle(name)?;
        if namespace.exists() {
            Ok(namespace)
        } else {
            Err(Error::NotFound(name.into()))
        }
    }

    /// A name that may or may not exist yet, checked for form alone.
    pub fn handle(name: &str) -> Result<Self, Error> {
        let form = !name.is_empty()
            && name.len() <= 200
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && !name.starts_with('.');
        if form {
            Ok(Self { name: name.into() })
        } else {
            Err(Error::Name(name.into()))
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that a CNI plugin gets as `CNI_NETNS`.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Calls `work` inside the namespace on a thread of its own, and waits for it. Sockets made
    /// there stay in the namespace wherever they are used afterwards.
    pub fn run<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send,
        F: FnOnce() -> T + Send,
    {
        let target = self.fd()?;
        let entered = on_thread(&self.name, move || {
            setns(&target, CloneFlags::CLONE_NEWNET)?;
            Ok::<_, Errno>(work())
        })?;
        entered.map_err(system(format!("entering namespace `{}`", self.name)))
    }

    /// Writes a sysctl below `/proc/sys/net` of this namespace, e.g. `ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<(), Error> {
        let path = Path::new("/proc/sys/net").join(key);
        let written = self.run(|| fs::write(&path, value))?;
        written.map_err(system(format!(
            "setting {} in `{}`",
            path.display(),
            self.name
        )))
    }

    /// Whether packets may pass from one link to another, for both families.
    pub fn set_forwarding(&self, on: bool) -> Result<(), Error> {
        let value = if on { "1" } else { "0" };
        self.sysctl("ipv4/ip_forward", value)?;
        self.sysctl("ipv6/conf/all/forwarding", value)
    }

    /// Kills every process inside (SIGTERM, and SIGKILL after `grace`), then takes the name away.
    /// Done already is done: a namespace that does not exist is no error.
    pub fn remove(&self, grace: Duration) -> Result<(), Error> {
        if self.exists() {
            kill_all(self, grace)?;
        }
        let path = self.path();
        match umount2(&path, MntFlags::MNT_DETACH) {
            // EINVAL: the file is there, but creation stopped before the mount.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(system(format!("unmounting {}", path.display()))(error)),
        }
        match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(system(format!("removing {}", path.display()))(error)),
        }
    }

    /// An open handle, for `setns` and for moving links.
    pub fn fd(&self) -> Result<OwnedFd, Error> {
        match fs::File::open(self.path()) {
            Ok(file) => Ok(file.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::NotFound(self.name.clone()))
            }
            Err(error) => Err(system(format!("opening {}", self.path().display()))(error)),
        }
    }

    fn set_loopback_up(&self) -> Result<(), Error> {
        let raised = self.run(child::raise_loopback)?;
        raised.map_err(system(format!("raising loopback in `{}`", self.name)))
    }
}

/// `/run/netns` as a mount point of its own that shares its mounts, so that a namespace removed
/// here is also let go by private mount namespaces elsewhere. The same as `ip netns add` does.
fn prepare_directory() -> io::Result<()> {
    fs::create_dir_all(DIRECTORY)?;
    // Two at once would mount over each other; iproute2 takes the same lock.
    let lock = fs::File::open(DIRECTORY)?;
    lock.lock()?;
    let share = MsFlags::MS_SHARED | MsFlags::MS_REC;
    match mount(Some(""), DIRECTORY, NO_TYPE, share, NO_TYPE) {
        Ok(()) => return Ok(()),
        Err(Errno::EINVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(DIRECTORY), DIRECTORY, NO_TYPE, bind, NO_TYPE)?;
    mount(Some(""), DIRECTORY, NO_TYPE, share, NO_TYPE)?;
    Ok(())
}

/// A thread whose namespaces may be changed: it ends with the work and is never reused.
fn on_thread<T: Send, F: FnOnce() -> T + Send>(name: &str, work: F) -> Result<T, Error> {
    thread::scope(|scope| {
        let spawned = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work);
        let thread = spawned.map_err(system(format!("starting a thread for `{name}`")))?;
        thread.join().map_err(|_| Error::Panicked(name.into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            ".hidden",
            "a b",
            &"n".repeat(201),
        ] {
            assert!(Namespace::handle(name).is_err(), "{name:?} was taken");
        }
        assert!(Namespace::handle("tpt-1.pod_a").is_ok());
    }
}
