//! Layers and images, written as `docker save` does and `ctr images import` takes.

use std::{
    collections::BTreeSet,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aws_lc_rs::digest::{Context as Digest, SHA256, digest};
use serde_json::json;

/// One entry of a layer.
#[derive(Clone, Debug)]
pub(super) struct File {
    /// Absolute, in the image.
    place: String,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Text(String),
    /// A file of the machine, executable if it is there.
    Copy(PathBuf),
    Link(String),
}

impl File {
    pub(super) fn text(place: &str, text: &str) -> Self {
        Self {
            place: place.to_owned(),
            content: Content::Text(text.to_owned()),
        }
    }

    pub(super) fn copy(from: &Path, place: &str) -> Self {
        Self {
            place: place.to_owned(),
            content: Content::Copy(from.to_owned()),
        }
    }

    pub(super) fn link(place: &str, to: &str) -> Self {
        Self {
            place: place.to_owned(),
            content: Content::Link(to.to_owned()),
        }
    }
}

/// Folders that programs expect; the second may be written by anybody.
const FOLDERS: [(&str, u32); 9] = [
    ("bin", 0o755),
    ("etc", 0o755),
    ("proc", 0o755),
    ("sys", 0o755),
    ("dev", 0o755),
    ("run", 0o755),
    ("tmp", 0o1777),
    ("usr/local/bin", 0o755),
    ("var/lib", 0o755),
];

#[derive(Clone, Debug)]
pub(super) struct Image {
    name: String,
    layers: Vec<Vec<File>>,
    entrypoint: Vec<String>,
    command: Vec<String>,
    environment: Vec<String>,
    user: String,
    stop_signal: &'static str,
}

impl Image {
    /// An image with the folders and names that programs expect, and nothing else.
    pub(super) fn new(name: &str) -> Self {
        let base = vec![
            File::text(
                "/etc/passwd",
                "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
            ),
            File::text("/etc/group", "root:x:0:\nnogroup:x:65534:\n"),
            File::text("/etc/nsswitch.conf", "hosts: files dns\n"),
        ];
        Self {
            name: name.to_owned(),
            layers: vec![base],
            entrypoint: Vec::new(),
            command: Vec::new(),
            environment: Vec::new(),
            user: String::new(),
            stop_signal: "SIGTERM",
        }
    }

    pub(super) fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    pub(super) fn layer(mut self, files: Vec<File>) -> Self {
        self.layers.push(files);
        self
    }

    pub(super) fn entrypoint(mut self, line: &[&str]) -> Self {
        self.entrypoint = line.iter().map(|&word| word.to_owned()).collect();
        self
    }

    pub(super) fn command(mut self, line: &[&str]) -> Self {
        self.command = line.iter().map(|&word| word.to_owned()).collect();
        self
    }

    pub(super) fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push(format!("{name}={value}"));
        self
    }

    pub(super) fn user(mut self, user: &str) -> Self {
        user.clone_into(&mut self.user);
        self
    }

    /// What asks the program to end.
    pub(super) fn stop_signal(mut self, signal: &'static str) -> Self {
        self.stop_signal = signal;
        self
    }

    /// Writes the archive into a folder, under a name that its content gives, unless it is there.
    pub(super) fn write(&self, folder: &Path) -> Result<PathBuf> {
        let key = self.key().with_context(|| self.name.clone())?;
        let short = self
            .name
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .replace(':', "-");
        let archive = folder.join(format!("{short}-{key}.tar"));
        if !archive.exists() {
            let fresh = archive.with_extension("new");
            self.write_to(&fresh).with_context(|| self.name.clone())?;
            fs::rename(&fresh, &archive)?;
        }
        Ok(archive)
    }

    fn write_to(&self, path: &Path) -> Result<()> {
        let mut archive = tar::Builder::new(fs::File::create(path)?);
        let mut layers = Vec::new();
        for files in &self.layers {
            let layer = layer(files)?;
            let name = sha256(&layer);
            append(&mut archive, &format!("{name}.tar"), &layer)?;
            layers.push(name);
        }
        let diff_ids: Vec<String> = layers.iter().map(|name| format!("sha256:{name}")).collect();
        let history: Vec<_> = layers
            .iter()
            .map(|_| json!({"created_by": "turnpike-cluster"}))
            .collect();
        let config = json!({
            "architecture": architecture(), "os": "linux",
            "config": {
                "Env": self.variables(), "Entrypoint": self.entrypoint, "Cmd": self.command,
                "User": self.user, "WorkingDir": "/", "StopSignal": self.stop_signal,
            },
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": history,
        });
        let config = config.to_string().into_bytes();
        let config_name = format!("{}.json", sha256(&config));
        append(&mut archive, &config_name, &config)?;
        let layers: Vec<String> = layers.iter().map(|name| format!("{name}.tar")).collect();
        let manifest = json!([{"Config": config_name, "RepoTags": [self.name], "Layers": layers}]);
        append(
            &mut archive,
            "manifest.json",
            manifest.to_string().as_bytes(),
        )?;
        archive.finish()?;
        Ok(())
    }

    fn variables(&self) -> Vec<String> {
        if self.environment.is_empty() {
            vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()]
        } else {
            self.environment.clone()
        }
    }

    /// Differs when anything of the image does.
    fn key(&self) -> Result<String> {
        let mut key = Digest::new(&SHA256);
        key.update(format!("{self:?}").as_bytes());
        for file in self.layers.iter().flatten() {
            if let Content::Copy(path) = &file.content {
                let mut opened =
                    fs::File::open(path).with_context(|| path.display().to_string())?;
                let mut piece = vec![0; 1 << 20];
                loop {
                    let length = opened.read(&mut piece)?;
                    if length == 0 {
                        break;
                    }
                    key.update(piece.get(..length).unwrap_or_default());
                }
            }
        }
        let key = key.finish();
        Ok(hex::encode(key.as_ref().get(..8).unwrap_or_default()))
    }
}

/// The same bytes for the same files: no time, no owner.
fn layer(files: &[File]) -> Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    let mut made = BTreeSet::new();
    for (folder, mode) in FOLDERS {
        directories(&mut layer, &mut made, Path::new(folder), mode)?;
    }
    for file in files {
        let place = Path::new(file.place.trim_start_matches('/'));
        if let Some(parent) = place.parent() {
            directories(&mut layer, &mut made, parent, 0o755)?;
        }
        let mut header = tar::Header::new_gnu();
        match &file.content {
            Content::Text(text) => {
                header.set_mode(0o644);
                header.set_size(text.len() as u64);
                layer.append_data(&mut header, place, text.as_bytes())?;
            }
            Content::Copy(path) => {
                let opened = fs::File::open(path).with_context(|| path.display().to_string())?;
                header.set_mode(0o755);
                header.set_size(opened.metadata()?.len());
                layer.append_data(&mut header, place, opened)?;
            }
            Content::Link(to) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_mode(0o777);
                header.set_size(0);
                layer.append_link(&mut header, place, to)?;
            }
        }
    }
    Ok(layer.into_inner()?)
}

/// The folder and those above it, each once.
fn directories(
    layer: &mut tar::Builder<Vec<u8>>,
    made: &mut BTreeSet<PathBuf>,
    folder: &Path,
    mode: u32,
) -> Result<()> {
    let above: Vec<&Path> = folder
        .ancestors()
        .filter(|path| !path.as_os_str().is_empty())
        .collect();
    for path in above.into_iter().rev() {
        if made.insert(path.to_owned()) {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(if path == folder { mode } else { 0o755 });
            header.set_size(0);
            layer.append_data(&mut header, path, std::io::empty())?;
        }
    }
    Ok(())
}

fn append(archive: &mut tar::Builder<fs::File>, name: &str, bytes: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(bytes.len() as u64);
    Ok(archive.append_data(&mut header, name, bytes)?)
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(digest(&SHA256, bytes))
}

/// As Go writes it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(folder: &Path, text: &str) -> PathBuf {
        let image = Image::new("registry.local/a/b:1").layer(vec![
            File::text("/etc/said", text),
            File::link("/bin/sh", "busybox"),
        ]);
        image.write(folder).unwrap()
    }

    #[test]
    fn the_name_follows_the_content() {
        let folder = tempfile::tempdir().unwrap();
        let first = image(folder.path(), "one");
        assert_eq!(image(folder.path(), "one"), first);
        assert_ne!(image(folder.path(), "two"), first);
    }

    #[test]
    fn a_copied_file_counts_by_its_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("program");
        let image = || {
            Image::new("a:1")
                .layer(vec![File::copy(&file, "/program")])
                .key()
                .unwrap()
        };
        fs::write(&file, "one").unwrap();
        let first = image();
        fs::write(&file, "two").unwrap();
        assert_ne!(image(), first);
    }

    #[test]
    fn the_manifest_names_what_is_in_the_archive() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path(), "one");
        let mut archive = tar::Archive::new(fs::File::open(path).unwrap());
        let mut names = BTreeSet::new();
        let mut manifest = String::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_string_lossy().into_owned();
            if name == "manifest.json" {
                entry.read_to_string(&mut manifest).unwrap();
            }
            names.insert(name);
        }
        let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        let said = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        assert!(names.contains(&said(&manifest[0]["Config"])));
        for layer in manifest[0]["Layers"].as_array().unwrap() {
            assert!(names.contains(&said(layer)), "{layer}");
        }
    }
}
