//! A long-running program of the world: started, watched, killed and started again.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Child,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use turnpike_vpc::netns::{self, Namespace, Output, Process};

/// One program in one namespace, with a log file of its own.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    command: netns::Command,
    namespace: Namespace,
    log: PathBuf,
    child: Option<Child>,
    recorded: PathBuf,
}

impl Daemon {
    /// Starts the program. `folder` receives its log and a note of its process, by which a later
    /// run finds it if this one is killed.
    pub fn start(
        name: &str,
        command: netns::Command,
        namespace: &Namespace,
        folder: &Path,
        keep: bool,
    ) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let file = name.replace('/', "-");
        let log = folder.join(format!("{file}.log"));
        let mut command = command
            .env("RUST_BACKTRACE", "0")
            .stdout(Output::File(folder.join(format!("{file}.out"))))
            .stderr(Output::File(log.clone()));
        command = if keep {
            command.new_session()
        } else {
            command.die_with_parent()
        };
        let recorded = folder.join(format!("{file}.process"));
        let mut daemon = Self {
            name: name.to_owned(),
            command,
            namespace: namespace.clone(),
            log,
            child: None,
            recorded,
        };
        daemon.restart()?;
        Ok(daemon)
    }

    /// Starts it again after [`kill`](Self::kill) or [`stop`](Self::stop).
    pub fn restart(&mut self) -> Result<()> {
        ensure!(!self.is_running(), "{} is running already", self.name);
        let child = self
            .command
            .spawn(&self.namespace)
            .context(self.name.clone())?;
        if let Some(process) = Process::with_pid(child.id() as i32) {
            std::fs::write(&self.recorded, serde_json::to_vec(&process)?)?;
        }
        self.child = Some(child);
        Ok(())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where its log is.
    pub fn folder(&self) -> &Path {
        self.log.parent().unwrap_or(&self.log)
    }

    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub fn is_running(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// SIGKILL, at once.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// SIGTERM, and SIGKILL after `grace`. Whether it ended by itself with status 0.
    pub fn stop(&mut self, grace: Duration) -> Result<bool> {
        let Some(mut child) = self.child.take() else {
            return Ok(true);
        };
        if let Some(process) = Process::with_pid(child.id() as i32) {
            process.signal(Signal::SIGTERM)?;
        }
        let deadline = Instant::now() + grace;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait()? {
                return Ok(status.success());
            }
            thread::sleep(Duration::from_millis(10));
        }
        child.kill()?;
        child.wait()?;
        Ok(false)
    }

    /// Everything it wrote to standard error so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Everything it wrote to standard output so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.log.with_extension("out")).unwrap_or_default()
    }

    /// Waits until `GET path` at `address`, asked inside its namespace, answers 200.
    pub fn ready(&mut self, address: SocketAddr, path: &str, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut last = String::from("nothing was asked");
        while Instant::now() < deadline {
            if !self.is_running() {
                bail!(
                    "{} ended at once; its log:\n{}",
                    self.name,
                    tail(&self.log())
                );
            }
            match crate::http::get(&self.namespace, address, path) {
                Ok(response) if response.status == 200 => return Ok(()),
                Ok(response) => last = format!("{} {}", response.status, response.body),
                Err(error) => last = error.to_string(),
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!(
            "{} is not ready after {limit:?} ({last}); its log:\n{}",
            self.name,
            tail(&self.log())
        )
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // A kept world outlives us; any other is taken down by its owner before this.
        if let Some(child) = &mut self.child {
            let _ = child.try_wait();
        }
    }
}

/// Kills what an earlier run recorded in `folder` and below, if it is still the same process.
pub fn kill_recorded(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            kill_recorded(&path);
        } else if path
            .extension()
            .is_some_and(|extension| extension == "process")
        {
            let process = std::fs::read(&path)
                .ok()
                .and_then(|bytes| serde_json::from_slice::<Process>(&bytes).ok());
            if let Some(process) = process {
                let _ = process.signal(Signal::SIGKILL);
            }
        }
    }
}

/// The last lines of a log, for an error message.
pub fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}
