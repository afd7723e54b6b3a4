//! A token bucket: EC2 throttles per account, so one node takes only its small share.

use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Bucket {
    capacity: f64,
    per_second: f64,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    pub(crate) fn new(capacity: u32, per_second: f64, now: Instant) -> Self {
        let capacity = f64::from(capacity);
        Self {
            capacity,
            per_second,
            tokens: capacity,
            at: now,
        }
    }

    /// Takes a token; the caller owes it the wait that is returned. Callers that come while the
    /// bucket is empty queue up in the order in which they asked.
    pub(crate) fn take(&mut self, now: Instant) -> Duration {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + gained).min(self.capacity) - 1.0;
        self.at = self.at.max(now);
        Duration::from_secs_f64((-self.tokens / self.per_second).max(0.0))
    }

    /// EC2 throttled: what is left is given up.
    pub(crate) fn drain(&mut self) {
        self.tokens = self.tokens.min(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_goes_at_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(3, 2.0, start);
        let waits: Vec<_> = (0..5).map(|_| bucket.take(start).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 500, 1000]);
        assert_eq!(bucket.take(start + Duration::from_secs(60)), Duration::ZERO);
        bucket.drain();
        assert_eq!(
            bucket.take(start + Duration::from_secs(60)).as_millis(),
            500
        );
    }
}
