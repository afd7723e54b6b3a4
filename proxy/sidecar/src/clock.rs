//! One monotonic clock in milliseconds, for what threads share.

use std::time::Instant;

use tokio::time::Instant as TokioInstant;

/// Copies tell the same time. Follows tokio's clock, so that tests can pause it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(TokioInstant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(TokioInstant::now())
    }

    pub(crate) fn now(&self) -> Instant {
        TokioInstant::now().into_std()
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.ms(self.now())
    }

    /// Never 0, which stands for "not".
    pub(crate) fn ms(&self, instant: Instant) -> u64 {
        let since = instant.saturating_duration_since(self.0.into_std());
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX - 1) + 1
    }
}
