//! From root with a few capabilities to an ordinary user with one.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};

#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    #[error("cannot become user {uid} (it takes CAP_SETUID and CAP_SETGID): {source}")]
    User { uid: u32, source: nix::Error },
    #[error("cannot give up capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    #[error(
        "CAP_NET_RAW is missing: without it the gate can neither take nor dial connections with \
         the pods' addresses"
    )]
    NoNetRaw,
    #[error("the gate must not run as root; give --uid")]
    Root,
    #[error(
        "giving {path} to user {uid} (it takes CAP_CHOWN, and CAP_DAC_READ_SEARCH to look into what \
         is that user's): {source}"
    )]
    Give {
        path: PathBuf,
        uid: u32,
        source: io::Error,
    },
    #[error("closing {path} to others: {source}")]
    Close { path: PathBuf, source: io::Error },
}

/// Makes the record's folder, readable by nobody else, and gives it with what is in it to the user
/// that the gate becomes. That user may have put anything there: only plain files with no other name
/// change hands, or a link to a file of root's would be a way to have it.
pub fn give(dir: &Path, uid: u32) -> Result<(), PrivilegeError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| PrivilegeError::Give { path, uid, source }
    };
    let mut make = DirBuilder::new();
    make.recursive(true).mode(0o700);
    make.create(dir).map_err(failed(dir))?;
    if !geteuid().is_root() {
        return Ok(());
    }
    let open = |path: &Path| {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        OpenOptions::new().read(true).custom_flags(flags).open(path)
    };
    let folder = open(dir).map_err(failed(dir))?;
    fchown(&folder, Some(uid), Some(uid)).map_err(failed(dir))?;
    for entry in fs::read_dir(dir).map_err(failed(dir))? {
        let path = entry.map_err(failed(dir))?.path();
        let file = match open(&path) {
            Ok(file) => file,
            // A link, a socket.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO)) => {
                tracing::warn!(path = %path.display(), "left alone: it is no file");
                continue;
            }
            Err(error) => return Err(failed(&path)(error)),
        };
        let found = file.metadata().map_err(failed(&path))?;
        if found.is_file() && found.nlink() == 1 {
            fchown(&file, Some(uid), Some(uid)).map_err(failed(&path))?;
        } else if found.uid() != uid {
            tracing::warn!(path = %path.display(), "left alone: it is no plain file of one name");
        }
    }
    Ok(())
}

/// Nobody else looks into the record's folder, whoever made it. After [`drop_to`]: only who owns it may
/// say so without a capability more.
pub fn close(dir: &Path) -> Result<(), PrivilegeError> {
    let closed = fs::set_permissions(dir, fs::Permissions::from_mode(0o700));
    closed.map_err(|source| PrivilegeError::Close {
        path: dir.to_owned(),
        source,
    })
}

/// Becomes `uid` and keeps CAP_NET_RAW alone (`IP_TRANSPARENT` and `SO_MARK` need it). To be called
/// before any thread is started: capabilities belong to threads.
pub fn drop_to(uid: u32) -> Result<(), PrivilegeError> {
    if uid == 0 {
        return Err(PrivilegeError::Root);
    }
    let kept: CapsHashSet = [Capability::CAP_NET_RAW].into();
    if geteuid().is_root() {
        let user = |source| PrivilegeError::User { uid, source };
        caps::securebits::set_keepcaps(true)?;
        setgroups(&[]).map_err(user)?;
        let gid = Gid::from_raw(uid);
        setresgid(gid, gid, gid).map_err(user)?;
        let id = Uid::from_raw(uid);
        setresuid(id, id, id).map_err(user)?;
    }
    if !caps::has_cap(None, CapSet::Permitted, Capability::CAP_NET_RAW)? {
        return Err(PrivilegeError::NoNetRaw);
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    caps::clear(None, CapSet::Inheritable)?;
    nix::sys::prctl::set_no_new_privs().map_err(|source| PrivilegeError::User { uid, source })
}
