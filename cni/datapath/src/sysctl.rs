//! Kernel settings of the network namespace that the calling thread is in.

use std::{fs, io, path::Path};

use crate::Error;

/// Writes one, named by its path below `/proc/sys/net`, unless it already has the value.
pub(crate) fn set(name: &str, value: &str) -> Result<(), Error> {
    write(name, value).map_err(Error::kernel(format!("setting net/{name} to {value}")))
}

/// The same for a setting of IPv6, which a kernel may lack.
pub(crate) fn set_ipv6(name: &str, value: &str) -> Result<(), Error> {
    match write(name, value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(Error::kernel(format!("setting net/{name} to {value}"))),
    }
}

fn write(name: &str, value: &str) -> io::Result<()> {
    let path = Path::new("/proc/sys/net").join(name);
    // Some are read-only where they cannot differ from what is wanted; and most are set already.
    if fs::read_to_string(&path)?.trim() == value {
        Ok(())
    } else {
        fs::write(&path, value)
    }
}
