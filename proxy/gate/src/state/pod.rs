//! One pod: who it is, and what the gate keeps for it.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use turnpike_rules::host::HostName;

use crate::{bucket::Bucket, dns::names::Names};

/// What one pod may take of the gate.
#[derive(Clone, Copy, Debug)]
pub struct PodLimits {
    /// Connections at a time; each holds two sockets and at most 128 KiB of buffers.
    pub connections: usize,
    pub dns_per_second: u32,
    pub dns_burst: u32,
    /// Questions over UDP waiting for an answer.
    pub dns_in_work: usize,
    /// TCP connections that ask: few, since all pods share the places for them.
    pub dns_connections: usize,
    /// Refusals written down one by one; more become a `gap`.
    pub denials_per_second: u32,
    /// Addresses remembered as answers to this pod.
    pub names: usize,
}

impl Default for PodLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            dns_per_second: 200,
            dns_burst: 1000,
            dns_in_work: 64,
            dns_connections: 8,
            denials_per_second: 50,
            names: 4096,
        }
    }
}

/// A pod of this node as the agent knows it.
#[derive(Clone, Debug)]
pub struct Pod {
    pub uid: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub container_id: Arc<str>,
    pub addresses: Vec<IpAddr>,
    /// The agent's word on whether an egress policy selects it.
    pub selected: bool,
    /// Lives as long as the pod, whatever is learned about it.
    pub runtime: Arc<PodRuntime>,
}

/// What the gate itself keeps per pod; bounded by [`PodLimits`].
#[derive(Debug)]
pub struct PodRuntime {
    pub connections: Arc<Semaphore>,
    pub questions: Arc<Semaphore>,
    pub dns_connections: Arc<Semaphore>,
    pub queries: Mutex<Bucket>,
    pub denials: Mutex<Bucket>,
    pub names: Mutex<Names>,
}

impl PodRuntime {
    pub fn new(limits: &PodLimits) -> Arc<Self> {
        Arc::new(Self {
            connections: Arc::new(Semaphore::new(limits.connections)),
            questions: Arc::new(Semaphore::new(limits.dns_in_work)),
            dns_connections: Arc::new(Semaphore::new(limits.dns_connections)),
            queries: Mutex::new(Bucket::new(limits.dns_per_second, limits.dns_burst)),
            denials: Mutex::new(Bucket::new(
                limits.denials_per_second,
                limits.denials_per_second.saturating_mul(10),
            )),
            names: Mutex::new(Names::new(limits.names)),
        })
    }
}

impl PodRuntime {
    pub(super) fn recall(&self, answers: Vec<Answer>) {
        let mut names = self.names.lock();
        for Answer {
            name,
            chain,
            addresses,
            left,
        } in answers
        {
            // As much as fits; the pod asks again for the rest.
            let _ = names.learn(&name, &chain, &addresses, left, Instant::now());
        }
    }
}

/// An answer that a pod was given before the gate restarted, and that it may still use.
#[derive(Clone, Debug)]
pub struct Answer {
    pub name: HostName,
    pub chain: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub left: Duration,
}
