//! Work inside a pod's network namespace.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

use crate::Error;

/// A pod's namespace, held open.
#[derive(Clone, Debug)]
pub(crate) struct Netns {
    path: PathBuf,
    file: Arc<File>,
}

impl Netns {
    /// Opens it and makes sure that it is one, and not the node's own: the rules meant for a pod
    /// would turn the node's traffic.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let refused = |source| Error::Netns {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(refused)?;
        let theirs = file.metadata().map_err(refused)?;
        let ours = std::fs::metadata("/proc/thread-self/ns/net").map_err(refused)?;
        if theirs.dev() != ours.dev() {
            return Err(refused(io::Error::other("it is an ordinary file")));
        }
        if kind(&file).map_err(refused)? != CloneFlags::CLONE_NEWNET {
            return Err(refused(io::Error::other(
                "it is a namespace of another kind",
            )));
        }
        if theirs.ino() == ours.ino() {
            return Err(refused(io::Error::other("it is the node's own")));
        }
        Ok(Self {
            path: path.to_owned(),
            file: Arc::new(file),
        })
    }

    /// For messages that name a namespace by descriptor; valid while `self` lives.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Runs `work` on a thread of its own in the namespace. The thread ends with it: none that once
    /// stood in a pod ever does anything else.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (sender, receiver) = oneshot::channel();
        let inside = self.clone();
        std::thread::Builder::new()
            .name("pod-netns".to_owned())
            .spawn(move || {
                // A caller that went away takes the result with it.
                let _ = sender.send(inside.enter().and_then(|()| work()));
            })
            .map_err(Error::kernel("starting a thread for a pod's namespace"))?;
        receiver.await.unwrap_or(Err(Error::Closed))
    }

    fn enter(&self) -> Result<(), Error> {
        setns(&*self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| Error::Netns {
            path: self.path.clone(),
            source: errno.into(),
        })
    }
}

/// What kind of namespace a descriptor stands for.
#[expect(unsafe_code, reason = "nix has no function for this ioctl")]
fn kind(file: &File) -> io::Result<CloneFlags> {
    nix::ioctl_none!(ns_get_nstype, 0xb7, 0x3);
    // SAFETY: the ioctl takes no argument and touches no memory of ours; the descriptor is open.
    let kind = unsafe { ns_get_nstype(file.as_raw_fd()) }?;
    Ok(CloneFlags::from_bits_retain(kind))
}
