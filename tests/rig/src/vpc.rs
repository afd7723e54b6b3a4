//! The VPC's own process: started, waited for, taken down.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use turnpike_vpc::{
    fabric::isolation,
    netns::{Namespace, Process},
    run::Ready,
};

use crate::{daemon, world::program};

const READY: Duration = Duration::from_secs(30);

/// A VPC in a box that runs. It outlives this process unless it is stopped.
#[derive(Debug)]
pub struct Vpc {
    child: Child,
    /// What it says of itself.
    pub ready: Ready,
}

impl Vpc {
    /// Starts the built-in VPC; its log and its process are noted in `folder`.
    pub fn start(name: &str, folder: &Path) -> Result<Self> {
        let state = folder.join("vpc");
        fs::create_dir_all(&state)?;
        let log = fs::File::create(folder.join("vpc.log"))?;
        let mut child = Command::new(program("turnpike-vpc")?)
            .args(["run", "--name", name, "--state"])
            .arg(&state)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        if let Some(process) = Process::with_pid(child.id() as i32) {
            fs::write(folder.join("vpc.process"), serde_json::to_vec(&process)?)?;
        }
        let deadline = Instant::now() + READY;
        while !state.join("ready").exists() {
            let ended = child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(folder.join("vpc.log")).unwrap_or_default();
                let _ = child.kill();
                bail!(
                    "the VPC did not come up ({ended:?}); its log:\n{}",
                    daemon::tail(&log)
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
        let ready = serde_json::from_slice(&fs::read(state.join("ready"))?)?;
        Ok(Self { child, ready })
    }

    /// Asks it to take its namespaces away and waits until it has.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(process) = Process::with_pid(self.child.id() as i32) {
            process.signal(Signal::SIGTERM)?;
        }
        self.child.wait()?;
        Ok(())
    }
}

/// Removes whatever a VPC of this name left, in whatever state.
pub fn down(name: &str) -> Result<()> {
    let down = Command::new(program("turnpike-vpc")?)
        .args(["down", "--name", name])
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&down.stderr);
    ensure!(
        down.status.success(),
        "`turnpike-vpc down --name {name}`: {said}"
    );
    Ok(())
}

/// Fails unless neither the fabric nor an instance nor a pod has a way out to the machine's own network.
pub async fn prove_isolation(
    ready: &Ready,
    pods: impl IntoIterator<Item = Namespace>,
) -> Result<()> {
    let router = Namespace::open(&ready.router)?;
    let instances = ready.instances.values();
    let names = instances.map(|instance| &instance.namespace);
    let mut all = vec![router.clone(), Namespace::open(&ready.internet)?];
    for name in names {
        all.push(Namespace::open(name)?);
    }
    all.extend(pods);
    Ok(isolation::prove(&router, &all, ready.cidr.parse()?).await?)
}
