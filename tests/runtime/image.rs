//! One image made by hand of Debian's static busybox; no registry is asked.

use std::{fs, path::Path, process::Command};

use anyhow::{Result, ensure};
use serde_json::json;
use sha2::{Digest as _, Sha256};

pub(crate) const NAME: &str = "box.local/busybox:1";
const APPLETS: [&str; 5] = ["sh", "sleep", "wget", "ip", "cat"];

/// Writes an archive that `ctr images import` takes.
pub(crate) fn write(folder: &Path, archive: &Path) -> Result<()> {
    let root = folder.join("root");
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")?;
    for applet in APPLETS {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
    }
    let content = folder.join("content");
    fs::create_dir_all(&content)?;
    tar(&root, &content.join("layer.tar"), ".")?;
    let layer = hex::encode(Sha256::digest(fs::read(content.join("layer.tar"))?));
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Entrypoint": ["/bin/busybox", "sleep", "100000"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]},
    });
    fs::write(content.join("config.json"), config.to_string())?;
    let manifest = json!([{"Config": "config.json", "RepoTags": [NAME], "Layers": ["layer.tar"]}]);
    fs::write(content.join("manifest.json"), manifest.to_string())?;
    tar(&content, archive, ".")
}

fn tar(folder: &Path, archive: &Path, what: &str) -> Result<()> {
    let status = Command::new("tar")
        .args(["--owner=0", "--group=0", "-C"])
        .arg(folder)
        .arg("-cf")
        .arg(archive)
        .arg(what)
        .status()?;
    ensure!(status.success(), "tar ended with {status}");
    Ok(())
}
