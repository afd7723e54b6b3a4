//! The retry budget: a share of the requests of the last ten seconds.

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Relaxed},
};

use turnpike_rules::traffic::RetryBudget;

const SECONDS: u64 = 10;

/// Counts requests and retries by second, shared by all workers without locks.
///
/// When a second's slot is reused, a count made by another thread at that very moment may be
/// lost: the budget is exact within a few requests per second.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    slots: [Slot; SECONDS as usize],
}

#[derive(Debug, Default)]
struct Slot {
    /// The second that the counts are of, plus one: zero is none.
    second: AtomicU64,
    requests: AtomicU32,
    retries: AtomicU32,
}

impl Budget {
    /// Counts a request, not its retries. `now_ms` is monotonic.
    pub(crate) fn request(&self, now_ms: u64) {
        self.slot(now_ms).requests.fetch_add(1, Relaxed);
    }

    /// Takes one retry from the budget, if there is one left.
    pub(crate) fn try_retry(&self, now_ms: u64, policy: &RetryBudget) -> bool {
        let slot = self.slot(now_ms);
        let retries = self.sum(now_ms, |slot| &slot.retries);
        let share = self.sum(now_ms, |slot| &slot.requests) as f64 * policy.percent / 100.0;
        let floor = SECONDS * u64::from(policy.min_per_second);
        let allowed = retries < floor || ((retries + 1) as f64) <= share;
        if allowed {
            slot.retries.fetch_add(1, Relaxed);
        }
        allowed
    }

    fn slot(&self, now_ms: u64) -> &Slot {
        let second = now_ms / 1000;
        let slot = &self.slots[(second % SECONDS) as usize];
        let seen = slot.second.load(Relaxed);
        if seen != second + 1
            && slot
                .second
                .compare_exchange(seen, second + 1, AcqRel, Relaxed)
                .is_ok()
        {
            slot.requests.store(0, Relaxed);
            slot.retries.store(0, Relaxed);
        }
        slot
    }

    fn sum(&self, now_ms: u64, count: impl Fn(&Slot) -> &AtomicU32) -> u64 {
        let now = now_ms / 1000 + 1;
        let recent = |slot: &&Slot| {
            let second = slot.second.load(Relaxed);
            second <= now && second + SECONDS > now
        };
        self.slots
            .iter()
            .filter(recent)
            .map(|slot| u64::from(count(slot).load(Relaxed)))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: RetryBudget = RetryBudget {
        percent: 20.0,
        min_per_second: 1,
    };

    #[test]
    fn retries_end_with_the_budget_and_come_back_with_time() {
        let budget = Budget::default();
        for _ in 0..100 {
            budget.request(500);
        }
        let granted = (0..50).filter(|_| budget.try_retry(600, &POLICY)).count();
        assert_eq!(granted, 20, "20 percent of 100 requests");
        assert!(
            !budget.try_retry(9_999, &POLICY),
            "still within ten seconds"
        );
        assert!(
            budget.try_retry(10_000, &POLICY),
            "the floor of one per second is free again"
        );
    }

    proptest! {
        #[test]
        fn never_above_the_greater_of_share_and_floor(
            steps in proptest::collection::vec((0u64..400, any::<bool>()), 1..400),
            percent in 0.0f64..100.0,
            min_per_second in 0u32..4,
        ) {
            let policy = RetryBudget { percent, min_per_second };
            let budget = Budget::default();
            let mut now = 0;
            let (mut requests, mut retries) = (Vec::new(), Vec::new());
            for (pause, retry) in steps {
                now += pause;
                let oldest = (now / 1000 + 1).saturating_sub(SECONDS);
                let recent = |times: &[u64]| times.iter().filter(|t| *t / 1000 >= oldest).count();
                if retry && budget.try_retry(now, &policy) {
                    retries.push(now);
                    let share = recent(&requests) as f64 * percent / 100.0;
                    let floor = f64::from(min_per_second) * SECONDS as f64;
                    prop_assert!(recent(&retries) as f64 <= share.max(floor));
                } else if !retry {
                    budget.request(now);
                    requests.push(now);
                }
            }
        }
    }
}
