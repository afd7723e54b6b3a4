//! Connection limits of what is called, and those who wait for a connection.

use std::{cell::Cell, sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};
use turnpike_rules::traffic::Timeouts;

use crate::{
    error::ProxyError,
    limits::{Gauge, Permit},
    shared::SharedService,
};

/// How often a waiting request looks again whether another worker gave a connection back.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Connection limits of what is called, and those who wait for one.
#[derive(Debug)]
pub(crate) struct Circuit {
    /// As errors name it.
    pub(crate) name: String,
    pub(crate) connections: Arc<Gauge>,
    pub(crate) pending: Arc<Gauge>,
    pub(crate) max_connections: Cell<u32>,
    pub(crate) max_pending: Cell<u32>,
    pub(crate) connect: Cell<Duration>,
    pub(crate) pool_idle: Duration,
    /// Told when a connection came back or ended.
    pub(crate) released: Notify,
}

impl Circuit {
    /// Counts in `shared`, without a limit, with the mesh's default connect timeout.
    pub(crate) fn unlimited(name: &str, shared: &SharedService, pool_idle: Duration) -> Self {
        Self {
            name: name.to_owned(),
            connections: shared.connections.clone(),
            pending: shared.pending.clone(),
            max_connections: Cell::new(u32::MAX),
            max_pending: Cell::new(u32::MAX),
            connect: Cell::new(Timeouts::default().connect),
            pool_idle,
            released: Notify::new(),
        }
    }

    pub(crate) fn pending(&self) -> Result<Permit, ProxyError> {
        let limit = self.max_pending.get();
        self.pending
            .try_acquire(limit)
            .ok_or_else(|| self.overflow("waiting requests", limit))
    }

    pub(crate) fn overflow(&self, what: &'static str, limit: u32) -> ProxyError {
        ProxyError::Overflow {
            service: self.name.clone(),
            what,
            limit,
        }
    }

    pub(crate) fn try_connection(&self) -> Option<Permit> {
        self.connections.try_acquire(self.max_connections.get())
    }

    /// Waits until a connection may have come free, or it is time to look whether one has. After
    /// `deadline` there is none.
    pub(crate) async fn wait_for_connection(&self, deadline: Instant) -> Result<(), ProxyError> {
        let limit = self.max_connections.get();
        if limit == 0 || Instant::now() >= deadline {
            return Err(self.overflow("connections", limit));
        }
        // Another worker's connections do not notify this one.
        let look = deadline.min(Instant::now() + LOOK_AGAIN);
        let _ = timeout_at(look, self.released.notified()).await;
        Ok(())
    }
}
