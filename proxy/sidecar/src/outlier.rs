//! Outlier ejection: endpoints that fail in a row are taken out for a while. Pure on `now`.

use std::{
    sync::{
        Arc, Weak,
        atomic::{
            AtomicU32, AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::Duration,
};

use parking_lot::Mutex;
use turnpike_rules::traffic::OutlierEjection;

/// How one endpoint has been doing, over all workers. Times are milliseconds on one monotonic
/// clock.
#[derive(Debug, Default)]
pub(crate) struct Health {
    failures_in_a_row: AtomicU32,
    /// 0: never.
    ejected_until: AtomicU64,
    /// Ejections that still count for the length of the next.
    ejections: AtomicU32,
}

impl Health {
    pub(crate) fn is_ejected(&self, now_ms: u64) -> bool {
        let until = self.ejected_until.load(Acquire);
        until != 0 && now_ms < until
    }

    /// When its last ejection ended, where it has ended; 0 where there was none. Tells apart how
    /// often an endpoint has come back.
    pub(crate) fn readmission(&self, now_ms: u64) -> u64 {
        match self.ejected_until.load(Acquire) {
            until if until <= now_ms => until,
            _ => 0,
        }
    }

    pub(crate) fn success(&self) {
        // A plain load first: the line is shared by workers and rarely changes.
        if self.failures_in_a_row.load(Relaxed) != 0 {
            self.failures_in_a_row.store(0, Relaxed);
        }
    }

    /// Counts a failure; says whether the endpoint is now due for ejection.
    fn failure(&self, now_ms: u64, policy: &OutlierEjection) -> bool {
        let failures = self.failures_in_a_row.fetch_add(1, Relaxed) + 1;
        failures >= policy.consecutive_failures && !self.is_ejected(now_ms)
    }

    fn eject(&self, now_ms: u64, policy: &OutlierEjection) {
        let base = policy.base_ejection.max(Duration::from_millis(1));
        let since = now_ms.saturating_sub(self.ejected_until.load(Acquire));
        // One ejection is forgiven for each base time spent in.
        let forgiven = since / as_ms(base).max(1);
        let before = u64::from(self.ejections.load(Relaxed)).saturating_sub(forgiven);
        let ejections = u32::try_from(before + 1).unwrap_or(u32::MAX);
        let length = base
            .saturating_mul(ejections)
            .min(policy.max_ejection.max(base));
        self.ejections.store(ejections, Relaxed);
        self.failures_in_a_row.store(0, Relaxed);
        self.ejected_until.store(now_ms + as_ms(length), Release);
    }
}

fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX / 2)
}

/// The endpoints of one Service, for the share that may be out at once.
#[derive(Debug, Default)]
pub(crate) struct Outliers {
    /// Locked when an endpoint is met for the first time and when one is due for ejection.
    members: Mutex<Vec<(Arc<str>, Weak<Health>)>>,
    /// How many are out, as last told.
    out: AtomicUsize,
}

impl Outliers {
    /// The health of the endpoint with this uid, one for all workers.
    pub(crate) fn health(&self, uid: &Arc<str>) -> Arc<Health> {
        let mut members = self.members.lock();
        let known = members.iter().find(|(name, _)| name == uid);
        if let Some(health) = known.and_then(|(_, health)| health.upgrade()) {
            return health;
        }
        members.retain(|(_, health)| health.strong_count() > 0);
        let health = Arc::new(Health::default());
        members.push((uid.clone(), Arc::downgrade(&health)));
        health
    }

    /// Counts a failure of `health`; ejects it if it is due and the share allows. Where it was
    /// ejected just now: how many are out with it.
    pub(crate) fn failure(
        &self,
        health: &Health,
        now_ms: u64,
        endpoints: usize,
        policy: &OutlierEjection,
    ) -> Option<usize> {
        if !health.failure(now_ms, policy) {
            return None;
        }
        let members = self.members.lock();
        let out = count(&members, now_ms);
        let percent = policy.max_percent.min(100) as usize;
        let may_be_out = (endpoints * percent / 100).max(1);
        let eject = out < may_be_out && !health.is_ejected(now_ms);
        eject.then(|| {
            health.eject(now_ms, policy);
            self.out.store(out + 1, Relaxed);
            out + 1
        })
    }

    /// How many are out now, where that has changed since it was told last.
    pub(crate) fn changed(&self, now_ms: u64) -> Option<usize> {
        let told = self.out.load(Relaxed);
        if told == 0 {
            return None;
        }
        let members = self.members.lock();
        let out = count(&members, now_ms);
        self.out.store(out, Relaxed);
        (out != told).then_some(out)
    }

    pub(crate) fn any_out(&self) -> bool {
        self.out.load(Relaxed) > 0
    }
}

fn count(members: &[(Arc<str>, Weak<Health>)], now_ms: u64) -> usize {
    let out = members.iter().filter_map(|(_, health)| health.upgrade());
    out.filter(|health| health.is_ejected(now_ms)).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: OutlierEjection = OutlierEjection {
        consecutive_failures: 3,
        base_ejection: Duration::from_millis(100),
        max_ejection: Duration::from_millis(250),
        max_percent: 50,
    };

    fn fail(outliers: &Outliers, health: &Health, now: u64, times: usize) -> bool {
        (0..times).any(|_| outliers.failure(health, now, 4, &POLICY).is_some())
    }

    #[test]
    fn a_row_of_failures_ejects_and_time_readmits() {
        let outliers = Outliers::default();
        let health = outliers.health(&"a".into());
        assert!(!fail(&outliers, &health, 10, 2));
        health.success();
        assert!(!fail(&outliers, &health, 10, 2), "a success ends the row");
        assert!(fail(&outliers, &health, 10, 1));
        assert!(health.is_ejected(109));
        assert_eq!((health.readmission(109), outliers.changed(109)), (0, None));
        assert!(!health.is_ejected(110));
        assert_eq!(
            (health.readmission(110), outliers.changed(110)),
            (110, Some(0))
        );
        assert!(!outliers.any_out());
    }

    #[test]
    fn each_further_ejection_is_longer_up_to_the_most_and_good_time_shortens_it() {
        let outliers = Outliers::default();
        let health = outliers.health(&"a".into());
        let mut now = 1000;
        for length in [100, 200, 250, 250] {
            assert!(fail(&outliers, &health, now, 3));
            assert!(health.is_ejected(now + length - 1) && !health.is_ejected(now + length));
            now += length;
        }
        now += 10_000;
        assert!(fail(&outliers, &health, now, 3));
        assert!(
            !health.is_ejected(now + 100),
            "after long good behaviour it starts over"
        );
    }

    #[test]
    fn no_more_than_the_share_is_out() {
        let outliers = Outliers::default();
        let healths: Vec<_> = ["a", "b", "c", "d"]
            .iter()
            .map(|uid| outliers.health(&Arc::from(*uid)))
            .collect();
        let ejected = healths
            .iter()
            .filter(|health| fail(&outliers, health, 5, 3))
            .count();
        assert_eq!(ejected, 2);
    }

    proptest! {
        #[test]
        fn the_share_holds_whatever_fails(
            count in 1usize..12,
            percent in 0u32..=100,
            steps in proptest::collection::vec((0usize..12, 0u64..80, any::<bool>()), 0..300),
        ) {
            let policy = OutlierEjection { max_percent: percent, ..POLICY };
            let outliers = Outliers::default();
            let healths: Vec<_> =
                (0..count).map(|n| outliers.health(&n.to_string().into())).collect();
            let mut now = 0;
            for (index, pause, good) in steps {
                now += pause;
                let health = &healths[index % count];
                if good {
                    health.success();
                } else {
                    outliers.failure(health, now, count, &policy);
                }
                let out = healths.iter().filter(|health| health.is_ejected(now)).count();
                prop_assert!(out <= (count * percent as usize / 100).max(1));
            }
            let later = now + as_ms(POLICY.max_ejection);
            prop_assert!(healths.iter().all(|health| !health.is_ejected(later)));
        }
    }
}
