//! A token bucket: so many a second, with a burst.

use std::time::Instant;

#[derive(Clone, Debug)]
pub struct Bucket {
    per_second: f64,
    burst: f64,
    tokens: f64,
    last: Option<Instant>,
}

impl Bucket {
    pub fn new(per_second: u32, burst: u32) -> Self {
        let burst = f64::from(burst);
        Self {
            per_second: per_second.into(),
            burst,
            tokens: burst,
            last: None,
        }
    }

    /// Takes one, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        if let Some(last) = self.last {
            let grown = now.saturating_duration_since(last).as_secs_f64() * self.per_second;
            self.tokens = (self.tokens + grown).min(self.burst);
        }
        self.last = Some(now);
        let taken = self.tokens >= 1.0;
        if taken {
            self.tokens -= 1.0;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, 3);
        assert_eq!((0..5).filter(|_| bucket.take(start)).count(), 3);
        let later = start + Duration::from_millis(200);
        assert_eq!((0..5).filter(|_| bucket.take(later)).count(), 2);
        assert_eq!(
            (0..9)
                .filter(|_| bucket.take(start + Duration::from_secs(60)))
                .count(),
            3
        );
    }
}
