//! Which endpoint is next: the better of two random ones by peak EWMA. Pure on `now`.
//!
//! The estimate of an endpoint's latency jumps to a latency above it at once and comes down
//! slowly, so that one slow answer turns traffic away and many fast ones bring it back. It also
//! comes down while nothing is asked, so that a slow endpoint is looked at again.
//!
//! Estimates that are close count as equal: the noise of a quiet network would otherwise give one
//! of two equal endpoints nearly everything. Between equals, what is in flight decides, then
//! chance.

use std::{
    cell::Cell,
    cmp::Ordering,
    time::{Duration, Instant},
};

/// How fast an estimate forgets.
const DECAY: Duration = Duration::from_secs(3);
/// What an endpoint without any history is taken to need.
const UNKNOWN: Duration = Duration::from_millis(2);
/// Latencies that differ by no more than this are equal: scheduling and a busy core make as much.
const CLOSE: Duration = Duration::from_millis(3);
/// As are those of which neither is more than so many times the other.
const FACTOR: f64 = 2.0;
/// Draws before every endpoint is looked at.
const DRAWS: usize = 4;

/// One endpoint's estimate, of one worker.
#[derive(Debug)]
pub(crate) struct Load {
    /// Nanoseconds, as of `stamp`.
    latency: Cell<f64>,
    stamp: Cell<Instant>,
    in_flight: Cell<u32>,
}

impl Load {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            latency: Cell::new(nanos(UNKNOWN)),
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

    /// Learns from one answer.
    pub(crate) fn observe(&self, now: Instant, latency: Duration) {
        let latency = nanos(latency);
        let keep = self.keep(now);
        let kept = self.latency.get() * keep;
        let next = if latency > kept {
            latency
        } else {
            kept + latency * (1.0 - keep)
        };
        self.latency.set(next);
        self.stamp.set(now);
    }

    /// Learns from a failure, which never makes an endpoint look better: one that fails fast would
    /// draw all traffic. Whether it may stay in is not decided here but by ejection.
    pub(crate) fn observe_failure(&self, now: Instant, latency: Duration) {
        let latency = nanos(latency).max(self.latency(now));
        self.latency.set(latency);
        self.stamp.set(now);
    }

    /// Forgets what was learned: as if it were like its `peers`, or new without any.
    pub(crate) fn start_afresh<'a>(&self, now: Instant, peers: impl Iterator<Item = &'a Self>) {
        let (count, sum) = peers.fold((0u32, 0.0), |(count, sum), peer| {
            (count + 1, sum + peer.latency(now))
        });
        let level = if count == 0 {
            nanos(UNKNOWN)
        } else {
            sum / f64::from(count)
        };
        self.latency.set(level);
        self.stamp.set(now);
    }

    /// Which of two is the better for one more request; `Equal` where chance is to decide.
    pub(crate) fn compare(&self, other: &Self, now: Instant) -> Ordering {
        let (own, others) = (self.latency(now), other.latency(now));
        let (less, more) = (own.min(others), own.max(others));
        if more - less <= nanos(CLOSE) || more <= less * FACTOR {
            return self.in_flight.get().cmp(&other.in_flight.get());
        }
        let cost = |latency: f64, load: &Self| latency * f64::from(load.in_flight.get() + 1);
        cost(own, self).total_cmp(&cost(others, other))
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// Nanoseconds.
    fn latency(&self, now: Instant) -> f64 {
        self.latency.get() * self.keep(now)
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

fn nanos(duration: Duration) -> f64 {
    duration.as_nanos() as f64
}

/// The index of the better of two random candidates that may be `used`; looks at all of them where
/// draws do not find one. Of those that compare equal, either.
pub(crate) fn pick<T>(
    candidates: &[T],
    random: &mut impl FnMut(usize) -> usize,
    used: impl Fn(&T) -> bool,
    compare: impl Fn(&T, &T) -> Ordering,
) -> Option<usize> {
    let count = candidates.len();
    if count > 2 {
        for _ in 0..DRAWS {
            let first = random(count);
            let second = (first + 1 + random(count - 1)) % count;
            match (used(&candidates[first]), used(&candidates[second])) {
                (true, true) => {
                    let second_wins = compare(&candidates[second], &candidates[first]).is_lt();
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
    // Not `min_by`: being close is not transitive, and a fold does not care.
    all.reduce(|best, next| {
        let next_wins = compare(&candidates[next], &candidates[best]).is_lt();
        if next_wins { next } else { best }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Asks one after the other; says who got how many.
    fn ask(
        loads: &[Load],
        now: &mut Instant,
        requests: u32,
        random: &mut fastrand::Rng,
        latency: impl Fn(usize, &mut fastrand::Rng) -> Duration,
    ) -> Vec<u32> {
        let mut counts = vec![0; loads.len()];
        for _ in 0..requests {
            let draw = &mut |n| random.usize(..n);
            let chosen = pick(loads, draw, |_| true, |a, b| a.compare(b, *now)).unwrap();
            counts[chosen] += 1;
            let latency = latency(chosen, random);
            *now += latency.max(ms(1));
            loads[chosen].observe(*now, latency);
        }
        counts
    }

    fn loads(count: usize, now: Instant) -> Vec<Load> {
        (0..count).map(|_| Load::new(now)).collect()
    }

    #[test]
    fn a_slow_endpoint_gets_little_and_recovers() {
        let start = Instant::now();
        let loads = loads(3, start);
        let mut random = fastrand::Rng::with_seed(7);
        let mut now = start;
        let slow = |n, _: &mut fastrand::Rng| ms(if n == 1 { 100 } else { 1 });
        let counts = ask(&loads, &mut now, 3000, &mut random, slow);
        assert!(counts[1] < 30, "{counts:?}");
        assert!(counts[0] > 1000 && counts[2] > 1000, "{counts:?}");
        now += Duration::from_secs(15);
        let counts = ask(&loads, &mut now, 300, &mut random, |_, _| ms(1));
        assert!(counts[1] > 50, "{counts:?}");
    }

    #[test]
    fn what_is_in_flight_counts() {
        let now = Instant::now();
        let loads = [Load::new(now), Load::new(now)];
        loads[0].begin();
        assert_eq!(
            pick(&loads, &mut |_| 0, |_| true, |a, b| a.compare(b, now)),
            Some(1)
        );
        loads[0].end();
        assert_eq!(loads[0].in_flight(), 0);
    }

    #[test]
    fn what_failed_is_no_better_than_before() {
        let now = Instant::now();
        let load = Load::new(now);
        load.observe(now, ms(50));
        load.observe_failure(now, ms(1));
        assert!(load.latency(now) >= nanos(ms(50)));
        load.observe_failure(now, ms(70));
        assert!(load.latency(now) >= nanos(ms(70)));
    }

    #[test]
    fn who_comes_back_starts_at_its_peers_level() {
        let now = Instant::now();
        let [back, peer, other] = [(); 3].map(|()| Load::new(now));
        back.observe(now, ms(5000));
        peer.observe(now, ms(40));
        other.observe(now, ms(60));
        assert!(back.compare(&peer, now).is_gt());
        back.start_afresh(now, [&peer, &other].into_iter());
        assert!(back.compare(&peer, now).is_eq());
        back.start_afresh(now, [].into_iter());
        assert!(back.compare(&Load::new(now), now).is_eq());
    }

    proptest! {
        #[test]
        fn equals_share(
            count in 2usize..6,
            base_us in 50u64..200_000,
            // A first answer may come with a slow start of its own.
            first_ms in proptest::collection::vec(0u64..40, 6),
            seed: u64,
        ) {
            let mut now = Instant::now();
            let loads = loads(count, now);
            for (load, first) in loads.iter().zip(&first_ms) {
                load.observe(now, ms(*first));
            }
            now += Duration::from_secs(10);
            let mut random = fastrand::Rng::with_seed(seed);
            let counts = ask(&loads, &mut now, 200 * count as u32, &mut random, |_, random| {
                Duration::from_micros(base_us + random.u64(..base_us * 9 / 10))
            });
            for each in &counts {
                prop_assert!((70..=400).contains(each), "{counts:?}");
            }
        }

        #[test]
        fn the_slow_one_is_avoided(
            count in 2usize..6,
            fast_ms in 1u64..50,
            times in 4u64..100,
            seed: u64,
        ) {
            let mut now = Instant::now();
            let loads = loads(count, now);
            let mut random = fastrand::Rng::with_seed(seed);
            // Far enough apart not to be noise.
            let slow = ms((fast_ms * times).max(fast_ms + 20));
            let requests = 400 * count as u32;
            let counts = ask(&loads, &mut now, requests, &mut random, |n, _| {
                if n == 0 { slow } else { ms(fast_ms) }
            });
            prop_assert!(counts[0] < requests / 8 / count as u32 + 10, "{counts:?}");
        }

        #[test]
        fn picks_one_that_may_be_used_whenever_there_is_one(
            usable in proptest::collection::vec(any::<bool>(), 0..40),
            seed: u64,
        ) {
            let mut random = fastrand::Rng::with_seed(seed);
            let equal = |_: &bool, _: &bool| Ordering::Equal;
            let picked = pick(&usable, &mut |n| random.usize(..n), |used| *used, equal);
            prop_assert_eq!(picked.is_some(), usable.contains(&true));
            if let Some(index) = picked {
                prop_assert!(usable[index]);
            }
        }

        #[test]
        fn an_estimate_stays_within_what_was_observed(
            latencies in proptest::collection::vec((0u64..5_000, 0u64..5_000, any::<bool>()), 1..50),
        ) {
            let mut now = Instant::now();
            let load = Load::new(now);
            let mut most = UNKNOWN;
            for (pause, latency, good) in latencies {
                now += ms(pause);
                let latency = ms(latency);
                most = most.max(latency);
                if good {
                    load.observe(now, latency);
                } else {
                    load.observe_failure(now, latency);
                }
                let estimate = load.latency(now);
                prop_assert!(estimate >= 0.0 && estimate <= nanos(most) + 1.0);
                prop_assert!(good || estimate >= nanos(latency));
                let forgotten = load.latency(now + Duration::from_secs(60));
                prop_assert!(forgotten < nanos(CLOSE));
            }
        }
    }
}
