//! Circuit limits: how many of something may exist at once, over all workers.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed},
};

/// A count with a limit that is given at each use, since policy may change while permits are out.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicU32);

/// One unit of a [`Gauge`], given back on drop.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Gauge>);

impl Gauge {
    /// A permit, unless `limit` are out.
    pub(crate) fn try_acquire(self: &Arc<Self>, limit: u32) -> Option<Permit> {
        let permit = self.acquire();
        (self.0.load(Relaxed) <= limit).then_some(permit)
    }

    /// A permit, whatever is out: for what is counted but not limited.
    pub(crate) fn acquire(self: &Arc<Self>) -> Permit {
        self.0.fetch_add(1, Relaxed);
        Permit(self.clone())
    }

    pub(crate) fn count(&self) -> u32 {
        self.0.load(Relaxed)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn never_more_than_the_limit_and_all_come_back(
            limit in 0u32..8,
            steps in proptest::collection::vec(any::<bool>(), 0..60),
        ) {
            let gauge = Arc::new(Gauge::default());
            let mut held = Vec::new();
            for take in steps {
                if take {
                    let free = u32::try_from(held.len()).unwrap() < limit;
                    let permit = gauge.try_acquire(limit);
                    prop_assert_eq!(permit.is_some(), free);
                    held.extend(permit);
                } else {
                    held.pop();
                }
                prop_assert_eq!(gauge.count() as usize, held.len());
            }
            drop(held);
            prop_assert_eq!(gauge.count(), 0);
        }
    }
}
