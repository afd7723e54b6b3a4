//! Steady traffic from inside a pod while something else happens to the system.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use turnpike_vpc::netns::{Command, Namespace};

use crate::{
    pods::{APP_USER, Pod},
    world::World,
};

/// The most requests one run sends, however long it lasts.
const LIMIT: usize = 5_000;

/// What curl says of one request: its status, `000` for none, and why there is none.
const CURL: [&str; 8] = [
    "curl",
    "-sk",
    "-o",
    "/dev/null",
    "-w",
    "%{http_code} %{exitcode} %{errormsg}",
    "--max-time",
    "2",
];

/// One request: when it began and ended, the status (0: none came), and all that was said.
#[derive(Clone, Debug)]
pub struct Sample {
    pub at: Instant,
    pub end: Instant,
    pub status: u16,
    pub said: String,
}

/// Requests one after the other until [`stop`](Self::stop).
#[derive(Debug)]
pub struct Traffic {
    running: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Sample>>,
}

impl Traffic {
    /// Asks for `url` every 30 ms or so, with the pod's own resolver.
    pub fn start(world: &World, pod: &Pod, url: &str) -> Result<Self> {
        Self::repeat(world, pod, &[&CURL[..], &[url]].concat())
    }

    /// Runs any command line, as often; what it prints is taken for a status.
    pub fn repeat(world: &World, pod: &Pod, line: &[&str]) -> Result<Self> {
        let command = world.command_in(pod, APP_USER, line)?;
        let running = Arc::new(AtomicBool::new(true));
        let (namespace, goes_on) = (pod.namespace.clone(), running.clone());
        let thread = thread::spawn(move || run(&command, &namespace, &goes_on));
        Ok(Self { running, thread })
    }

    pub fn stop(self) -> Result<Vec<Sample>> {
        self.running.store(false, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the traffic's thread panicked"))
    }
}

fn run(command: &Command, namespace: &Namespace, goes_on: &AtomicBool) -> Vec<Sample> {
    let mut samples = Vec::new();
    while goes_on.load(Ordering::Relaxed) && samples.len() < LIMIT {
        let at = Instant::now();
        let said = command
            .output(namespace)
            .map(|output| output.stdout)
            .unwrap_or_default();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        let status = said.split(' ').next().unwrap_or_default();
        let status = status.parse().unwrap_or(0);
        samples.push(Sample {
            at,
            end: Instant::now(),
            status,
            said,
        });
        thread::sleep(Duration::from_millis(30));
    }
    samples
}

/// How many were not answered 200.
pub fn failed(samples: &[Sample]) -> usize {
    samples.iter().filter(|sample| sample.status != 200).count()
}
