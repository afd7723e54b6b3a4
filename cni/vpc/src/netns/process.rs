//! Who lives in a namespace, and making them leave.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{Error, Namespace, system};

/// A process, told apart from a later one with the same number by when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Process {
    pub pid: i32,
    /// In clock ticks since boot, from `/proc/PID/stat`.
    pub started: u64,
}

impl Process {
    pub fn current() -> Self {
        let pid = Pid::this().as_raw();
        Self {
            pid,
            started: started(pid).unwrap_or_default(),
        }
    }

    /// The process that has this number now; none for a zombie.
    pub fn with_pid(pid: i32) -> Option<Self> {
        started(pid).map(|started| Self { pid, started })
    }

    pub fn is_alive(self) -> bool {
        started(self.pid) == Some(self.started)
    }

    /// Sends a signal unless the process is gone already.
    pub fn signal(self, signal: Signal) -> Result<(), Error> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(system(format!("sending {signal} to process {}", self.pid))(
                error,
            )),
        }
    }
}

/// Every process whose network namespace is this one; not this process, whose threads may visit.
pub fn processes(namespace: &Namespace) -> Result<Vec<Process>, Error> {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let path = namespace.path();
    let target = fs::metadata(&path)
        .map(identity)
        .map_err(system(format!("reading {}", path.display())))?;
    let entries = fs::read_dir("/proc").map_err(system("listing /proc"))?;
    let own = Pid::this().as_raw();
    let inhabitants = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        // A process that ends meanwhile has no namespace any more.
        .filter(|pid| {
            fs::metadata(format!("/proc/{pid}/ns/net"))
                .map(identity)
                .ok()
                == Some(target)
        })
        .filter_map(Process::with_pid);
    Ok(inhabitants.collect())
}

/// SIGTERM to all, SIGKILL to whoever is left after `grace`; returns when nobody is.
pub fn kill_all(namespace: &Namespace, grace: Duration) -> Result<(), Error> {
    const LAST_WAIT: Duration = Duration::from_secs(5);
    let begun = Instant::now();
    let mut asked: Vec<Process> = Vec::new();
    loop {
        let alive = processes(namespace)?;
        if alive.is_empty() {
            return Ok(());
        }
        let elapsed = begun.elapsed();
        if elapsed > grace + LAST_WAIT {
            let left = alive.iter().map(|process| process.pid).collect();
            return Err(Error::Immortal(namespace.name().into(), left));
        }
        for process in alive {
            if elapsed >= grace {
                process.signal(Signal::SIGKILL)?;
            } else if !asked.contains(&process) {
                process.signal(Signal::SIGTERM)?;
                asked.push(process);
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Field 22 of `/proc/PID/stat`, after the name in parentheses; none when gone or a zombie.
fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let mut sleeper = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(sleeper.id()).unwrap();
        let process = Process::with_pid(pid).unwrap();
        assert!(process.is_alive());
        let impostor = Process {
            pid,
            started: process.started + 1,
        };
        assert!(!impostor.is_alive());
        impostor.signal(Signal::SIGKILL).unwrap();
        assert!(
            sleeper.try_wait().unwrap().is_none(),
            "another process was killed"
        );
        process.signal(Signal::SIGKILL).unwrap();
        sleeper.wait().unwrap();
        assert!(!process.is_alive());
    }
}
