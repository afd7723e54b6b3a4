//! Kernel settings of the network namespace that the calling thread is in.

use std::{fs, io, path::Path, sync::Arc};

use crate::Error;

/// Where they are: `/proc/sys/net`, or where else that is mounted. A container's own is read-only,
/// unless it is privileged. Whichever mount it is, the kernel shows the caller's namespace in it.
#[derive(Clone, Debug)]
pub(crate) struct Sysctls(Arc<Path>);

impl Sysctls {
    pub(crate) fn at(folder: &Path) -> Self {
        Self(folder.into())
    }

    /// Writes one, named by its path below `net`, unless it already has the value.
    pub(crate) fn set(&self, name: &str, value: &str) -> Result<(), Error> {
        let path = self.0.join(name);
        write(&path, value).map_err(failed(&path, value))
    }

    /// The same for a setting of IPv6, which a kernel may lack.
    pub(crate) fn set_ipv6(&self, name: &str, value: &str) -> Result<(), Error> {
        let path = self.0.join(name);
        match write(&path, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(failed(&path, value)),
        }
    }
}

fn failed(path: &Path, value: &str) -> impl FnOnce(io::Error) -> Error {
    Error::kernel(format!("setting {} to {value}", path.display()))
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    // Some are read-only where they cannot differ from what is wanted; and most are set already.
    if fs::read_to_string(path)?.trim() == value {
        Ok(())
    } else {
        fs::write(path, value)
    }
}
