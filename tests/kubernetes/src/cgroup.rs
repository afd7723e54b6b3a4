//! The control groups that a node's pods live in: made in every hierarchy, and taken away.
//!
//! Machines have one hierarchy for all controllers (version 2), one for each (version 1), or both
//! (hybrid), where a kubelet asks for its group in all of them.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const ROOT: &str = "/sys/fs/cgroup";
/// Above all groups of all boxes.
const OURS: &str = "turnpike-box";

/// The group of one node, as a kubelet is told it.
pub fn of_node(name: &str, node: &str) -> String {
    format!("/{OURS}/{name}/{node}")
}

/// Makes a group in every hierarchy.
pub fn make(group: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        let mut path = hierarchy.clone();
        for part in group.trim_start_matches('/').split('/') {
            delegate(&path)?;
            path.push(part);
            if !path.is_dir() {
                fs::create_dir(&path).with_context(|| path.display().to_string())?;
            }
            inherit_cpus(&path)?;
        }
        delegate(&path)?;
    }
    Ok(())
}

/// Takes away all groups of a box. What runs in one is the box's, and is killed.
pub fn remove(name: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        let ours = hierarchy.join(OURS);
        let group = ours.join(name);
        if group.is_dir() {
            empty(&group)?;
        }
        // Another box may have groups there.
        let _ = fs::remove_dir(&ours);
    }
    Ok(())
}

fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .filter(|path| path.join("cgroup.procs").exists())
        .collect();
    found.sort();
    found
}

/// Version 2: what a group may use, its children may.
fn delegate(group: &Path) -> Result<()> {
    let Ok(controllers) = fs::read_to_string(group.join("cgroup.controllers")) else {
        return Ok(());
    };
    for controller in controllers.split_whitespace() {
        // Some cannot be delegated; a kubelet names those that it misses.
        let _ = fs::write(
            group.join("cgroup.subtree_control"),
            format!("+{controller}"),
        );
    }
    Ok(())
}

/// Version 1: a new cpuset is empty, and nothing can run in it.
fn inherit_cpus(group: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = group.join(file);
        // Version 2 has the file too, where empty means what the parent has.
        let version_1 = group.join("tasks").exists();
        if !version_1 || !fs::read_to_string(&own).is_ok_and(|set| set.trim().is_empty()) {
            continue;
        }
        let parent = group
            .parent()
            .map(|parent| parent.join(file))
            .unwrap_or_default();
        fs::write(&own, fs::read_to_string(&parent)?).with_context(|| own.display().to_string())?;
    }
    Ok(())
}

fn empty(group: &Path) -> Result<()> {
    for child in fs::read_dir(group).into_iter().flatten().flatten() {
        if child.path().is_dir() {
            empty(&child.path())?;
        }
    }
    for _ in 0..250 {
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines().filter_map(|line| line.parse().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        match fs::remove_dir(group) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
    bail!(
        "the control group {} could not be taken away",
        group.display()
    )
}
