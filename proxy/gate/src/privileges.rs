//! From root with a few capabilities to an ordinary user with one.

use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};

#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    #[error("cannot become user {uid}: {source}")]
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
