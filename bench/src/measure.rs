//! One turn: wrk drives a subject, the kernel says what it cost.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use turnpike_rig::World;

use crate::stage::Subject;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) connections: u32,
    pub(crate) seconds: u32,
}

/// What one turn cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) requests: u64,
    pub(crate) per_second: f64,
    /// User and system CPU time of all the subject's processes.
    pub(crate) user: Duration,
    pub(crate) system: Duration,
    /// Resident memory at the end of the turn, summed, in KiB.
    pub(crate) memory: u64,
}

impl Run {
    /// Microseconds of CPU a request.
    pub(crate) fn cpu(&self) -> f64 {
        (self.user + self.system).as_secs_f64() * 1e6 / self.requests.max(1) as f64
    }

    pub(crate) fn user_cpu(&self) -> f64 {
        self.user.as_secs_f64() * 1e6 / self.requests.max(1) as f64
    }
}

/// Drives a subject for one turn, after a second that does not count.
pub(crate) fn run(world: &World, subject: &Subject, load: &Load) -> Result<Run> {
    drive(
        world,
        subject,
        &Load {
            seconds: 1,
            ..*load
        },
    )?;
    let before = spent(&subject.processes)?;
    let (requests, per_second) = drive(world, subject, load)?;
    let after = spent(&subject.processes)?;
    Ok(Run {
        requests,
        per_second,
        user: after.0 - before.0,
        system: after.1 - before.1,
        memory: resident(&subject.processes)?,
    })
}

fn drive(world: &World, subject: &Subject, load: &Load) -> Result<(u64, f64)> {
    let (namespace, name) = subject.client;
    let (connections, time) = (load.connections.to_string(), format!("{}s", load.seconds));
    let line = [
        "wrk",
        "-t",
        "1",
        "-c",
        &connections,
        "-d",
        &time,
        subject.url,
    ];
    let said = world.exec(namespace, name, &line)?;
    ensure!(
        said.succeeded(),
        "{}: wrk: {}{}",
        subject.name(),
        said.out,
        said.err
    );
    let bad = said
        .out
        .lines()
        .find(|line| line.contains("Non-2xx") || line.contains("Socket errors"));
    ensure!(
        bad.is_none(),
        "{}: a run with errors measures nothing: {bad:?}",
        subject.name()
    );
    let number = |marker: &str, before: bool| -> Result<f64> {
        let line = said
            .out
            .lines()
            .find(|line| line.contains(marker))
            .context(said.out.clone())?;
        let word = if before {
            line.split_whitespace().next()
        } else {
            line.split_whitespace().last()
        };
        word.and_then(|word| word.parse().ok())
            .context(said.out.clone())
    };
    Ok((
        number(" requests in ", true)? as u64,
        number("Requests/sec:", false)?,
    ))
}

/// User and system time of all threads, from `/proc/PID/stat` (fields 14 and 15, in ticks). Peers
/// that fork workers are counted with their children.
fn spent(processes: &[u32]) -> Result<(Duration, Duration)> {
    let mut sum = (0, 0);
    for pid in family(processes)? {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name in parentheses may hold spaces; fields are counted after it.
        let rest = stat.rsplit(')').next().unwrap_or_default();
        let field = |index: usize| {
            rest.split_whitespace()
                .nth(index)
                .and_then(|f| f.parse::<u64>().ok())
        };
        sum.0 += field(11).context("utime")?;
        sum.1 += field(12).context("stime")?;
    }
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100) as u64;
    let time = |ticked: u64| Duration::from_millis(ticked * 1000 / ticks);
    Ok((time(sum.0), time(sum.1)))
}

/// Resident memory in KiB.
pub(crate) fn resident(processes: &[u32]) -> Result<u64> {
    let mut sum = 0;
    for pid in family(processes)? {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .context("VmRSS")?;
        sum += line
            .split_whitespace()
            .nth(1)
            .and_then(|kib| kib.parse::<u64>().ok())
            .context("VmRSS")?;
    }
    Ok(sum)
}

/// The processes and their children.
fn family(processes: &[u32]) -> Result<Vec<u32>> {
    let mut all = processes.to_vec();
    for pid in processes {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
            .with_context(|| format!("process {pid} is gone"))?;
        all.extend(
            children
                .split_whitespace()
                .filter_map(|child| child.parse::<u32>().ok()),
        );
    }
    Ok(all)
}
