//! Token buckets by key.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// Each key may do `burst` things at once, and one more every `interval`.
#[derive(Debug)]
pub(crate) struct RateLimit<K> {
    burst: u32,
    interval: Duration,
    /// When the key's bucket is full again. A key whose bucket is full is forgotten.
    full_at: HashMap<K, Instant>,
}

impl<K: Eq + Hash> RateLimit<K> {
    /// Keys with a bucket that is not full; when as many are held and none has filled up, a new
    /// key is refused.
    const KEYS: usize = 100_000;

    pub(crate) fn new(burst: u32, interval: Duration) -> Self {
        Self {
            burst,
            interval,
            full_at: HashMap::new(),
        }
    }

    /// Takes one; `Err` says how long to wait for it.
    pub(crate) fn take(&mut self, key: K, now: Instant) -> Result<(), Duration> {
        if self.full_at.len() >= Self::KEYS && !self.full_at.contains_key(&key) {
            self.full_at.retain(|_, full_at| *full_at > now);
            if self.full_at.len() >= Self::KEYS {
                return Err(self.interval);
            }
        }
        let full_at = self.full_at.get(&key).copied().unwrap_or(now).max(now);
        let after = full_at + self.interval;
        let most = now + self.interval * self.burst;
        if after > most {
            return Err(after - most);
        }
        self.full_at.insert(key, after);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_an_interval() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut limit = RateLimit::new(3, second);
        for _ in 0..3 {
            assert_eq!(limit.take("a", start), Ok(()));
        }
        assert_eq!(limit.take("a", start), Err(second));
        assert_eq!(limit.take("b", start), Ok(()), "others are not held up");
        assert_eq!(limit.take("a", start + second), Ok(()));
        assert_eq!(limit.take("a", start + second), Err(second));
        let later = start + 60 * second;
        for _ in 0..3 {
            assert_eq!(limit.take("a", later), Ok(()));
        }
        assert!(
            limit.take("a", later).is_err(),
            "what is saved up is bounded"
        );
    }
}
