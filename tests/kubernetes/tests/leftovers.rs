//! A cluster that is taken down leaves nothing; what a killed run leaves, the next clean-up removes.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
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
        .stderr(Stdio::piped())
        .spawn()?;
    // The machine's turn may be another world's for long; only then does the time begin.
    let mut said = BufReader::new(run.stderr.take().context("its standard error")?).lines();
    let begun = said.any(|line| line.is_ok_and(|line| line.starts_with("VPC")));
    thread::spawn(move || said.for_each(drop));
    let disk = Cache::locate()?.disk(name);
    let booted = wait_for(Duration::from_secs(120), || {
        disk.join("node-b/var/log/kubelet.log")
            .exists()
            .then_some(())
    });
    run.kill()?;
    run.wait()?;
    ensure!(begun, "it ended before it began");
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
