//! Which endpoint is next: the better of two random ones by peak EWMA. Pure on `now`.
//!
//! The estimate jumps to a latency above it at once and comes down slowly, so that one slow answer
//! turns traffic away and many fast ones bring it back; multiplied by what is in flight.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// How fast an estimate forgets.
const DECAY: Duration = Duration::from_secs(10);
/// What an endpoint without any history is taken to cost.
const UNKNOWN: Duration = Duration::from_millis(2);
/// Draws before every endpoint is looked at.
const DRAWS: usize = 4;

/// One endpoint's estimate, of one worker.
#[derive(Debug)]
pub(crate) struct Load {
    /// Nanoseconds.
    cost: Cell<f64>,
    stamp: Cell<Instant>,
    in_flight: Cell<u32>,
}

impl Load {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            cost: Cell::new(UNKNOWN.as_nanos() as f64),
            stamp: Cell::new(now),
            in_flight: Cell::new(0),
        }
    }

    pub(crate) fn begin(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    /// Ends what [`Load::begin`] began.
    pub(crate) fn end(&self) {
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
    }

    /// Learns from one answer. A failure is told with what it would have cost to wait it out, or
    /// an endpoint that fails fast would draw all traffic.
    pub(crate) fn observe(&self, now: Instant, latency: Duration) {
        let latency = latency.as_nanos() as f64;
        let cost = self.cost.get();
        let cost = if latency > cost {
            latency
        } else {
            let keep = self.keep(now);
            cost * keep + latency * (1.0 - keep)
        };
        self.cost.set(cost);
        self.stamp.set(now);
    }

    /// What one more request would cost: lower is better.
    pub(crate) fn estimate(&self, now: Instant) -> f64 {
        // An endpoint that is asked nothing is forgiven slowly, or it would never be asked again.
        self.cost.get() * self.keep(now) * f64::from(self.in_flight.get() + 1)
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    fn keep(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.stamp.get());
        if age.is_zero() {
            1.0
        } else {
            (-age.as_secs_f64() / DECAY.as_secs_f64()).exp()
        }
    }
}

/// The index of the better of two random candidates that may be `used`; looks at all of them where
/// draws do not find one.
pub(crate) fn pick<T>(
    candidates: &[T],
    random: &mut impl FnMut(usize) -> usize,
    used: impl Fn(&T) -> bool,
    cost: impl Fn(&T) -> f64,
) -> Option<usize> {
    let count = candidates.len();
    if count > 2 {
        for _ in 0..DRAWS {
            let first = random(count);
            let second = (first + 1 + random(count - 1)) % count;
            match (used(&candidates[first]), used(&candidates[second])) {
                (true, true) => {
                    let second_wins = cost(&candidates[second]) < cost(&candidates[first]);
                    return Some(if second_wins { second } else { first });
                }
                (true, false) => return Some(first),
                (false, true) => return Some(second),
                (false, false) => {}
            }
        }
    }
    // Starts anywhere, so that equals share.
    let start = if count == 0 { 0 } else { random(count) };
    let all = (0..count)
        .map(|n| (start + n) % count)
        .filter(|n| used(&candidates[*n]));
    all.min_by(|a, b| cost(&candidates[*a]).total_cmp(&cost(&candidates[*b])))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_slow_endpoint_gets_little_and_recovers() {
        let start = Instant::now();
        let loads: Vec<Load> = (0..3).map(|_| Load::new(start)).collect();
        let mut random = fastrand::Rng::with_seed(7);
        let mut counts = [0u32; 3];
        let mut now = start;
        for _ in 0..3000 {
            now += Duration::from_millis(1);
            let chosen = pick(
                &loads,
                &mut |n| random.usize(..n),
                |_| true,
                |l| l.estimate(now),
            )
            .unwrap();
            counts[chosen] += 1;
            let latency = if chosen == 1 { 100 } else { 1 };
            loads[chosen].observe(now, Duration::from_millis(latency));
        }
        assert!(counts[1] < 30, "{counts:?}");
        assert!(counts[0] > 1000 && counts[2] > 1000, "{counts:?}");
        let later = now + Duration::from_secs(60);
        assert!(loads[1].estimate(later) < Duration::from_millis(1).as_nanos() as f64);
    }

    #[test]
    fn what_is_in_flight_counts() {
        let now = Instant::now();
        let loads = [Load::new(now), Load::new(now)];
        loads[0].begin();
        assert_eq!(
            pick(&loads, &mut |_| 0, |_| true, |l| l.estimate(now)),
            Some(1)
        );
        loads[0].end();
        assert_eq!(loads[0].in_flight(), 0);
    }

    proptest! {
        #[test]
        fn picks_one_that_may_be_used_whenever_there_is_one(
            usable in proptest::collection::vec(any::<bool>(), 0..40),
            seed: u64,
        ) {
            let mut random = fastrand::Rng::with_seed(seed);
            let picked = pick(&usable, &mut |n| random.usize(..n), |used| *used, |_| 1.0);
            prop_assert_eq!(picked.is_some(), usable.contains(&true));
            if let Some(index) = picked {
                prop_assert!(usable[index]);
            }
        }

        #[test]
        fn an_estimate_stays_within_what_was_observed(
            latencies in proptest::collection::vec((0u64..5_000, 0u64..5_000), 1..50),
        ) {
            let mut now = Instant::now();
            let load = Load::new(now);
            let mut most = UNKNOWN;
            for (pause, latency) in latencies {
                now += Duration::from_millis(pause);
                let latency = Duration::from_millis(latency);
                most = most.max(latency);
                load.observe(now, latency);
                let estimate = load.estimate(now);
                prop_assert!(estimate >= 0.0 && estimate <= most.as_nanos() as f64 + 1.0);
            }
        }
    }
}
