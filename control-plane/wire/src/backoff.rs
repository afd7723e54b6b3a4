//! How long to wait before the next attempt.

use std::time::Duration;

/// Exponential and fully jittered, so that many clients of one server do not return at once.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    pub fn new(base: Duration, max: Duration) -> Self {
        Self {
            base,
            max,
            failures: 0,
        }
    }

    /// The next pause: at random between half of and the whole current ceiling, which doubles
    /// with each call up to the maximum.
    pub fn next_pause(&mut self) -> Duration {
        let ceiling = self
            .base
            .saturating_mul(1 << self.failures.min(20))
            .min(self.max);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(0.5 + 0.5 * fastrand::f64())
    }

    /// Begins anew after a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_maximum_and_begins_anew() {
        let (base, max) = (Duration::from_millis(100), Duration::from_secs(5));
        let mut backoff = Backoff::new(base, max);
        let first = backoff.next_pause();
        assert!(first >= base / 2 && first <= base, "{first:?}");
        let last = (0..100).map(|_| backoff.next_pause()).last().unwrap();
        assert!(last >= max / 2 && last <= max, "{last:?}");
        backoff.reset();
        assert!(backoff.next_pause() <= base);
    }
}
