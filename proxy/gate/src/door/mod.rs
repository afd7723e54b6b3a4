//! The one door out: connections of selected pods, taken transparently.
//!
//! 1. [`accept`] takes a permit, then a connection; its local address is where the pod wanted to go.
//! 2. The first bytes say what it is; whatever claims a name is held to the rules and to the DNS
//!    ledger by [`judge`].
//! 3. What is denied is answered in its own protocol, and recorded.
//! 4. What is allowed is recorded and dialled at the same time ([`forward`]); its first byte leaves
//!    when the record is on disk. Plaintext HTTP is judged request by request ([`http`]).
//! 5. A change of policy or pod has the open connections that it concerns judged again; what is no
//!    longer allowed is aborted.

pub mod accept;
pub mod dial;
mod forward;
mod http;
mod judge;
mod relay;
mod scanned;
mod tcp_info;

use std::{sync::Arc, time::Duration};

use tokio_util::task::TaskTracker;
use turnpike_ledger::{Event, record};

use crate::{
    metrics::{Judged, Metrics},
    spool::Spool,
    state::{Pod, State},
};

/// The door's limits; what one pod may take is in [`crate::state::PodLimits`].
#[derive(Clone, Copy, Debug)]
pub struct DoorConfig {
    /// Connections of all pods; further ones wait in the kernel's queue.
    pub connections: usize,
    /// For the first bytes to say what they are.
    pub first_bytes: Duration,
    pub dial: Duration,
    /// For a request's head, and between requests.
    pub http_idle: Duration,
}

impl Default for DoorConfig {
    fn default() -> Self {
        Self {
            connections: 16_384,
            first_bytes: Duration::from_secs(10),
            dial: Duration::from_secs(10),
            http_idle: Duration::from_secs(75),
        }
    }
}

/// What all connections share.
#[derive(Debug)]
pub struct Door {
    pub config: DoorConfig,
    pub state: State,
    pub spool: Spool,
    pub metrics: Arc<Metrics>,
    /// Connections, and what must come to its end after one.
    pub tasks: TaskTracker,
}

impl Door {
    /// Records a denial within the pod's budget. The denial stands whether or not it is recorded.
    async fn record_denial(&self, pod: Option<&Pod>, attempt: record::Attempt) {
        self.count(&attempt);
        if !self.spool.may_record_denial(pod, std::time::Instant::now()) {
            return;
        }
        if let Err(error) = self.spool.record(Event::Denied(attempt)).await {
            tracing::debug!(%error, "a denial was not recorded");
        }
    }

    fn count(&self, attempt: &record::Attempt) {
        let protocol = match attempt.protocol {
            record::Protocol::Tls => "tls",
            record::Protocol::Http => "http",
            _ => "tcp",
        };
        let judged = Judged {
            protocol,
            verdict: attempt.verdict.as_str(),
        };
        self.metrics.connections.get_or_create(&judged).inc();
    }
}
