//! The state directory, and the root in it.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use turnpike_certs::{Authority, AuthorityError, ROOT_LIFETIME};
use zeroize::Zeroizing;

/// The private key, then the certificate, in one file, so that one rename creates both.
const ROOT: &str = "root-key.pem";
const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";
const LOCK: &str = "lock";

#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error("`{}`: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("`{}` is in use by another controller; give each its own --state-dir", .0.display())]
    Locked(PathBuf),
    #[error(
        "`{}` has mode {mode:04o} and owner {owner}: the root's private key must be readable by \
         this process's user ({own}) alone; check who has read it, then chmod 600 and chown it",
        path.display()
    )]
    Exposed {
        path: PathBuf,
        mode: u32,
        owner: u32,
        own: u32,
    },
    #[error(
        "`{}` is not a root: {source}; restore it from a backup (removing it makes a new root, \
         which no running proxy trusts)",
        path.display()
    )]
    Corrupt {
        path: PathBuf,
        source: AuthorityError,
    },
    #[error("cannot make a root: {0}")]
    Generate(AuthorityError),
}

/// The directory of what must outlive the process, held by one controller at a time.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Locked as long as it is open.
    _lock: File,
}

impl StateDir {
    pub fn open(path: &Path) -> Result<Self, RootError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| RootError::Io { path, source }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(at(path))?;
        let lock_path = path.join(LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(at(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                _lock: lock,
            }),
            Err(TryLockError::WouldBlock) => Err(RootError::Locked(path.to_owned())),
            Err(TryLockError::Error(source)) => Err(RootError::Io {
                path: lock_path,
                source,
            }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The root as it was left, or a new one where there is none.
    pub fn root(&self, trust_domain: &str, now: SystemTime) -> Result<Authority, RootError> {
        let path = self.path.join(ROOT);
        let text = match fs::symlink_metadata(&path) {
            Ok(metadata) => {
                check(&path, &metadata)?;
                fs::read_to_string(&path)
                    .map(Zeroizing::new)
                    .map_err(|source| RootError::Io {
                        path: path.clone(),
                        source,
                    })?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return create(&path, trust_domain, now);
            }
            Err(source) => return Err(RootError::Io { path, source }),
        };
        // The certificate is handed out as it stands here: nothing of the key may be with it.
        let (key, certificate) = text.split_at(text.find(CERTIFICATE).unwrap_or(text.len()));
        Authority::from_pem(certificate, key).map_err(|source| RootError::Corrupt { path, source })
    }
}

/// Writes the public root bundle where others read it. What is there already is left alone, so
/// that a full disk does not matter then.
pub fn publish(path: &Path, pem: &str) -> io::Result<()> {
    if fs::read(path).is_ok_and(|current| current == pem.as_bytes()) {
        return Ok(());
    }
    replace(path, pem.as_bytes(), 0o644)
}

fn check(path: &Path, metadata: &fs::Metadata) -> Result<(), RootError> {
    let mode = metadata.permissions().mode() & 0o7777;
    let own = nix::unistd::geteuid().as_raw();
    if !metadata.is_file() || mode & 0o077 != 0 || metadata.uid() != own {
        let owner = metadata.uid();
        return Err(RootError::Exposed {
            path: path.to_owned(),
            mode,
            owner,
            own,
        });
    }
    Ok(())
}

fn create(path: &Path, trust_domain: &str, now: SystemTime) -> Result<Authority, RootError> {
    let authority =
        Authority::generate(trust_domain, ROOT_LIFETIME, now).map_err(RootError::Generate)?;
    let mut text = authority.key_pem();
    text.push_str(authority.certificate_pem());
    replace(path, text.as_bytes(), 0o600).map_err(|source| RootError::Io {
        path: path.to_owned(),
        source,
    })?;
    tracing::info!(path = %path.display(), "made a new root for the mesh; back it up");
    Ok(authority)
}

/// All or nothing, and on disk when it returns.
fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let written = (|| {
        // One that a killed process left behind.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(content)?;
        // The mode given to open is cut by the umask.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> StateDir {
        StateDir::open(path).unwrap()
    }

    #[test]
    fn the_root_survives_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let first = open(folder.path()).root("cluster.local", now).unwrap();
        let mode = fs::metadata(folder.path().join(ROOT))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o600);
        let again = open(folder.path()).root("cluster.local", now).unwrap();
        assert_eq!(first.certificate_pem(), again.certificate_pem());
        assert!(!again.certificate_pem().contains("PRIVATE"));
    }

    #[test]
    fn an_exposed_or_broken_root_stops_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(ROOT);
        let state = open(folder.path());
        state.root("cluster.local", SystemTime::now()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = state
            .root("cluster.local", SystemTime::now())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("0640") && error.contains("chmod 600"),
            "{error}"
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let (key, certificate) = text.split_at(text.find(CERTIFICATE).unwrap());
        let swapped = format!("{certificate}{key}");
        for broken in [
            "",
            "nonsense",
            &text[..text.len() / 2],
            key,
            certificate,
            &swapped,
        ] {
            fs::write(&path, broken).unwrap();
            let error = state.root("cluster.local", SystemTime::now()).unwrap_err();
            assert!(matches!(error, RootError::Corrupt { .. }), "{error}");
        }
    }

    #[test]
    fn one_controller_a_directory() {
        let folder = tempfile::tempdir().unwrap();
        let held = open(folder.path());
        assert!(matches!(
            StateDir::open(folder.path()),
            Err(RootError::Locked(_))
        ));
        drop(held);
        open(folder.path());
    }

    #[test]
    fn what_is_published_already_needs_no_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.pem");
        publish(&path, "one").unwrap();
        let before = fs::metadata(&path).unwrap().ino();
        publish(&path, "one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().ino(), before);
        publish(&path, "two").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
    }
}
