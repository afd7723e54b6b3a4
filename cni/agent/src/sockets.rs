//! Unix sockets with an owner and a mode from their first instant.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::unistd::{Gid, Uid, User, chown};
use tokio::net::UnixListener;

/// Who may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Mode 0600.
    RootOnly,
    /// Mode 0660, with the group of this user.
    GroupOf(u32),
}

#[derive(Debug, thiserror::Error)]
#[error("socket {path}: {source}", path = path.display())]
pub struct SocketError {
    path: PathBuf,
    source: io::Error,
}

/// Binds a fresh socket. It is made under another name and renamed when its mode is right, so that
/// nobody finds it earlier, and one left by a killed process is replaced.
pub fn bind(path: &Path, access: Access) -> Result<UnixListener, SocketError> {
    bind_inner(path, access).map_err(|source| SocketError {
        path: path.to_owned(),
        source,
    })
}

fn bind_inner(path: &Path, access: Access) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder)?;
    }
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    let mode = match access {
        Access::RootOnly => 0o600,
        Access::GroupOf(user) => {
            let uid = Uid::from_raw(user);
            // A user that is only a number has the group of the same number.
            let gid = User::from_uid(uid)?.map_or(Gid::from_raw(user), |user| user.gid);
            chown(&new, None, Some(gid))?;
            0o660
        }
    };
    fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
    fs::rename(&new, path)?;
    Ok(listener)
}
