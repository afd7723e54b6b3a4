//! Programs made ready for an image: stripped, and with the libraries that they load.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::archive::File;
use crate::build::Cache;

/// Where stripped copies are kept.
#[derive(Debug)]
pub(super) struct Workshop {
    folder: PathBuf,
}

impl Workshop {
    pub(super) fn open(cache: &Cache) -> Result<Self> {
        let folder = cache.root().join("stripped");
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    /// One of our programs, at `/usr/local/bin`, without what only a debugger reads.
    pub(super) fn own(&self, path: &Path, name: &str) -> Result<Vec<File>> {
        let stripped = self.strip(path, name)?;
        with_libraries(
            path,
            File::copy(&stripped, &format!("/usr/local/bin/{name}")),
        )
    }

    /// A program of the machine, where the machine has it.
    pub(super) fn program(&self, name: &str) -> Result<Vec<File>> {
        let places = std::env::var("PATH").unwrap_or_default();
        let path = places
            .split(':')
            .chain(["/usr/sbin", "/usr/bin"])
            .map(|folder| Path::new(folder).join(name))
            .find(|path| path.is_file())
            .with_context(|| format!("{name} is not installed"))?;
        let path = path.to_string_lossy().into_owned();
        self.at(&path, &path)
    }

    /// A program of the machine, elsewhere in the image.
    pub(super) fn at(&self, path: &str, place: &str) -> Result<Vec<File>> {
        with_libraries(Path::new(path), File::copy(Path::new(path), place))
    }

    /// A file that needs nothing else.
    pub(super) fn whole(&self, path: &Path, place: &str) -> File {
        File::copy(path, place)
    }

    /// A copy without debug information, made again when the program is.
    fn strip(&self, path: &Path, name: &str) -> Result<PathBuf> {
        let about = fs::metadata(path).with_context(|| path.display().to_string())?;
        let stamp = format!("{}-{}-{}", about.size(), about.mtime(), about.mtime_nsec());
        let stripped = self.folder.join(format!("{name}-{stamp}"));
        if stripped.exists() {
            return Ok(stripped);
        }
        self.forget(name)?;
        let fresh = self.folder.join(format!("{name}.new"));
        let status = Command::new("strip")
            .arg("-o")
            .arg(&fresh)
            .arg(path)
            .status()
            .context("strip, of the package binutils")?;
        ensure!(
            status.success(),
            "strip {} ended with {status}",
            path.display()
        );
        fs::rename(&fresh, &stripped)?;
        Ok(stripped)
    }

    fn forget(&self, name: &str) -> Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let other = entry.file_name();
            let rest = other
                .to_string_lossy()
                .strip_prefix(name)
                .map(str::to_owned);
            // turnpike-node is not a copy of turnpike.
            if rest.is_some_and(|rest| {
                rest.starts_with('-') && rest.as_bytes().get(1).is_some_and(u8::is_ascii_digit)
            }) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

fn with_libraries(path: &Path, file: File) -> Result<Vec<File>> {
    let libraries = libraries(path)?;
    let copies = libraries
        .iter()
        .map(|library| File::copy(Path::new(library), library));
    Ok(std::iter::once(file).chain(copies).collect())
}

/// What the loader would load, and the loader, at the places where it found them.
fn libraries(path: &Path) -> Result<BTreeSet<String>> {
    let said = Command::new("ldd")
        .arg(path)
        .env("LC_ALL", "C")
        .output()
        .context("ldd, of the package libc-bin")?;
    if !said.status.success() {
        // "not a dynamic executable": it needs none.
        return Ok(BTreeSet::new());
    }
    parse(&String::from_utf8_lossy(&said.stdout)).with_context(|| path.display().to_string())
}

/// `name => /path (0x…)`, `/loader (0x…)`, and `linux-vdso.so.1 (0x…)`, which is in the kernel.
fn parse(said: &str) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for line in said.lines().map(str::trim) {
        let place = line.split_once(" => ").map_or(line, |(_, place)| place);
        ensure!(
            !place.starts_with("not found"),
            "a library is missing: {line}"
        );
        if let Some(path) = place
            .split_whitespace()
            .next()
            .filter(|path| path.starts_with('/'))
        {
            found.insert(path.to_owned());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_what_ldd_says() {
        let said = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found: Vec<_> = parse(said).unwrap().into_iter().collect();
        assert_eq!(
            found,
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
        assert_eq!(parse("\tstatically linked\n").unwrap().len(), 0);
        assert!(parse("\tlibgone.so => not found\n").is_err());
    }
}
