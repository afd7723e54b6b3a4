//! A cluster that is taken down leaves nothing; what a killed run leaves, the next clean-up removes.

use std::{process::Stdio, time::Duration};

use anyhow::{Result, ensure};
use turnpike_cluster::{Cluster, build::Cache};
use turnpike_rig::{Traces, wait_for, world::program};

/// Killed while its nodes boot: their processes, mounts and groups are there by then.
pub(crate) fn of_a_killed_run() -> Result<()> {
    let name = "tpt-killed";
    Cluster::clean(name)?;
    let before = Traces::of(name);
    let mut run = std::process::Command::new(program("turnpike-cluster")?)
        .args(["up", "--name", name])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let disk = Cache::locate()?.disk(name);
    let booted = wait_for(Duration::from_secs(120), || {
        disk.join("node-b/var/log/kubelet.log")
            .exists()
            .then_some(())
    });
    run.kill()?;
    run.wait()?;
    ensure!(booted.is_some(), "its second node did not boot");
    ensure!(
        Traces::of(name) != before,
        "a killed run leaves something to clean"
    );
    Cluster::clean(name)?;
    nothing_of(name, &before)
}

/// Fails with what there is now and was not before.
pub(crate) fn nothing_of(name: &str, before: &Traces) -> Result<()> {
    let left = before.added_since();
    ensure!(left.is_empty(), "left behind: {left:#?}");
    let disk = Cache::locate()?.disk(name);
    ensure!(!disk.exists(), "{} is left", disk.display());
    Ok(())
}
