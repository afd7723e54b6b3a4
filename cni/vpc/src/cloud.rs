//! The one owner of what EC2 knows and of the fabric behind it.
//!
//! A change is made on a copy of the world, carried into the fabric, and only then becomes the
//! world; so the API's answer, the world and the kernel agree. Readers see the world as it was a
//! while ago, where the spec asks for lag. [`Cloud::settle`] carries out what EC2 does on its own:
//! pending becomes available, attaching attached.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use time::OffsetDateTime;
use tokio::sync::Notify;

use crate::{
    credentials::Issuer,
    fabric::{Error, Fabric},
    spec::{Faults, Span, Spec},
    throttle::Buckets,
    world::{Now, Refusal, World},
};

#[derive(Debug)]
pub struct Cloud {
    began: Instant,
    began_at: OffsetDateTime,
    faults: Faults,
    /// Held while the kernel is changed, so that changes reach it in order.
    live: tokio::sync::Mutex<Live>,
    history: Mutex<History>,
    changed: Notify,
    rng: Mutex<fastrand::Rng>,
    pub(crate) credentials: Issuer,
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Live {
    world: Arc<World>,
    fabric: Fabric,
}

impl Cloud {
    /// Plugs in what runs from the start.
    pub async fn start(spec: &Spec, mut fabric: Fabric) -> Result<Self, StartError> {
        let world = Arc::new(World::new(spec)?);
        fabric.apply(&world.ports()).await?;
        let faults = spec.faults().clone();
        let longest = faults.describe_lag.max_ms.max(faults.metadata_lag.max_ms);
        Ok(Self {
            began: Instant::now(),
            began_at: OffsetDateTime::now_utc(),
            live: tokio::sync::Mutex::new(Live {
                world: Arc::clone(&world),
                fabric,
            }),
            history: Mutex::new(History::new(world, Duration::from_millis(longest))),
            changed: Notify::new(),
            rng: Mutex::new(fastrand::Rng::with_seed(faults.seed ^ 0x5eed)),
            credentials: Issuer::default(),
            buckets: Mutex::new(Buckets::default()),
            faults,
        })
    }

    pub fn now(&self) -> Now {
        self.began.elapsed()
    }

    /// The calendar's time for a time of the box.
    pub fn wall(&self, now: Now) -> OffsetDateTime {
        self.began_at + now
    }

    /// Makes one change, in the world and in the fabric, or none.
    pub async fn change<T>(
        &self,
        operation: impl FnOnce(&mut World, Now) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let mut live = self.live.lock().await;
        let now = self.now();
        let mut next = World::clone(&live.world);
        next.advance(now);
        let result = operation(&mut next, now)?;
        if let Err(error) = live.fabric.apply(&next.ports()).await {
            tracing::error!(%error, "the fabric could not follow a change");
            return Err(Refusal::internal());
        }
        self.publish(&mut live, next, now);
        Ok(result)
    }

    /// The world as it is.
    pub fn current(&self) -> Arc<World> {
        self.history.lock().at(Now::MAX)
    }

    /// The world as Describe calls see it now.
    pub fn described(&self) -> Arc<World> {
        self.lagging(self.faults.describe_lag)
    }

    /// The world as the metadata service sees it now.
    pub fn metadata(&self) -> Arc<World> {
        self.lagging(self.faults.metadata_lag)
    }

    /// Whether an action may be called once more now.
    pub fn admit(&self, action: &str) -> bool {
        let Some(throttle) = self.faults.throttle else {
            return true;
        };
        self.buckets.lock().take(action, self.now(), &throttle)
    }

    /// Waits as long as the spec has calls take; true: this one is to fail.
    pub async fn misbehave(&self) -> bool {
        let delay = self.draw(self.faults.latency);
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        self.faults.failures > 0.0 && self.rng.lock().f64() < self.faults.failures
    }

    /// Carries out transitions when they are due, for ever.
    pub async fn settle(&self) {
        loop {
            let next = self.current().next_change();
            let wait = next.map_or(Duration::MAX, |due| due.saturating_sub(self.now()));
            let changed = self.changed.notified();
            if !wait.is_zero() && tokio::time::timeout(wait, changed).await.is_ok() {
                continue;
            }
            if self.change(|_, _| Ok(())).await.is_err() {
                // Said already; not in a tight loop.
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }

    fn publish(&self, live: &mut Live, next: World, now: Now) {
        live.world = Arc::new(next);
        self.history.lock().push(now, Arc::clone(&live.world));
        self.changed.notify_one();
    }

    fn lagging(&self, span: Span) -> Arc<World> {
        let lag = self.draw(span);
        self.history.lock().at(self.now().saturating_sub(lag))
    }

    fn draw(&self, Span { min_ms, max_ms }: Span) -> Duration {
        if max_ms == 0 {
            return Duration::ZERO;
        }
        Duration::from_millis(self.rng.lock().u64(min_ms..=max_ms))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the spec's instances cannot be launched: {0}")]
    Launch(#[from] Refusal),
    #[error(transparent)]
    Fabric(#[from] Error),
}

/// Earlier worlds, as far back as the longest lag reaches.
#[derive(Debug)]
struct History {
    /// Never empty; oldest first.
    versions: VecDeque<(Now, Arc<World>)>,
    first: Arc<World>,
    reach: Duration,
}

impl History {
    fn new(world: Arc<World>, reach: Duration) -> Self {
        Self {
            versions: VecDeque::new(),
            first: world,
            reach,
        }
    }

    fn push(&mut self, now: Now, world: Arc<World>) {
        self.versions.push_back((now, world));
        // One older than the reach stays: it is what was true at its far end.
        while self
            .versions
            .get(1)
            .is_some_and(|(at, _)| *at + self.reach < now)
        {
            self.versions.pop_front();
        }
        if self.versions.len() > 1
            && let Some((at, world)) = self.versions.front()
            && *at + self.reach < now
        {
            self.first = Arc::clone(world);
        }
    }

    fn at(&self, when: Now) -> Arc<World> {
        let version = self.versions.iter().rev().find(|(at, _)| *at <= when);
        Arc::clone(version.map_or(&self.first, |(_, world)| world))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::DEFAULT;

    #[test]
    fn a_reader_sees_what_was_true_then() {
        let base = World::new(&Spec::parse(DEFAULT).unwrap()).unwrap();
        let reach = Duration::from_secs(5);
        let world = |n: u64| {
            let mut world = base.clone();
            world.owner = n.to_string();
            Arc::new(world)
        };
        let mut history = History::new(world(0), reach);
        for second in 1..=60 {
            history.push(Duration::from_secs(second), world(second));
            for lag in 0..=5.min(second) {
                let seen = history.at(Duration::from_secs(second - lag));
                assert_eq!(seen.owner, (second - lag).to_string());
            }
        }
        assert!(
            history.versions.len() <= 7,
            "kept {} versions",
            history.versions.len()
        );
        assert_eq!(history.at(Now::MAX).owner, "60");
    }
}
