//! Bounded room for a server's connections, which nobody can keep from others.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    time::Duration,
};

use tokio::{
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};

/// Connections, each a task, that end with this.
///
/// When all slots are taken, whoever has most of them loses the oldest to the next caller: one that
/// holds what it can displaces itself alone. Where nobody has two, the next waits until one ends or
/// has had its time.
#[derive(Debug)]
pub struct ConnectionSlots {
    most: usize,
    time: Duration,
    tasks: JoinSet<()>,
    oldest_first: VecDeque<Slot>,
}

#[derive(Debug)]
struct Slot {
    peer: IpAddr,
    since: Instant,
    task: AbortHandle,
}

impl ConnectionSlots {
    /// `most` slots; each is its holder's for `time` at least, unless that one has several.
    pub fn new(most: usize, time: Duration) -> Self {
        Self {
            most,
            time,
            tasks: JoinSet::new(),
            oldest_first: VecDeque::new(),
        }
    }

    /// Runs `connection`, which comes from `peer`, as soon as there is a slot for it.
    pub async fn take(
        &mut self,
        peer: IpAddr,
        connection: impl Future<Output = ()> + Send + 'static,
    ) {
        self.make_room().await;
        let task = self.tasks.spawn(connection);
        let since = Instant::now();
        self.oldest_first.push_back(Slot { peer, since, task });
    }

    /// Returns when all have ended by themselves.
    pub async fn drained(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }

    async fn make_room(&mut self) {
        loop {
            while self.tasks.try_join_next().is_some() {}
            self.oldest_first.retain(|slot| !slot.task.is_finished());
            let Some(oldest) = self.oldest_first.front() else {
                return;
            };
            if self.oldest_first.len() < self.most {
                return;
            }
            if let Some(greediest) = self.greediest() {
                return self.evict(greediest);
            }
            let its_time_is_up = sleep_until(oldest.since + self.time);
            tokio::select! {
                _ = self.tasks.join_next() => {}
                () = its_time_is_up => return self.evict(0),
            }
        }
    }

    /// The oldest slot of the peer that has most, if more than one.
    fn greediest(&self) -> Option<usize> {
        let mut held = HashMap::<IpAddr, usize>::new();
        for slot in &self.oldest_first {
            *held.entry(slot.peer).or_default() += 1;
        }
        let most = held.values().copied().max().filter(|most| *most > 1);
        let is_theirs = |slot: &Slot| held.get(&slot.peer).copied() == most;
        most.and_then(|_| self.oldest_first.iter().position(is_theirs))
    }

    fn evict(&mut self, index: usize) {
        if let Some(Slot { peer, task, .. }) = self.oldest_first.remove(index) {
            tracing::debug!(%peer, "a connection gave way to another: all slots were taken");
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        sync::oneshot::{self, error::TryRecvError},
        time::timeout,
    };

    use super::*;

    const TIME: Duration = Duration::from_secs(5);

    /// Takes a slot for good; what is returned says when it is lost.
    async fn hold(slots: &mut ConnectionSlots, last: u8) -> oneshot::Receiver<()> {
        let (held, lost) = oneshot::channel();
        let connection = async move {
            std::future::pending::<()>().await;
            drop(held);
        };
        slots.take([10, 0, 0, last].into(), connection).await;
        lost
    }

    fn is_held(lost: &mut oneshot::Receiver<()>) -> bool {
        lost.try_recv() == Err(TryRecvError::Empty)
    }

    #[tokio::test(start_paused = true)]
    async fn who_holds_most_gives_way_at_once() {
        let mut slots = ConnectionSlots::new(4, TIME);
        let mut quiet = hold(&mut slots, 1).await;
        let mut greedy = Vec::new();
        let begun = Instant::now();
        for _ in 0..7 {
            greedy.push(hold(&mut slots, 2).await);
        }
        assert_eq!(begun.elapsed(), Duration::ZERO);
        for displaced in &mut greedy[..4] {
            displaced.await.unwrap_err();
        }
        assert!(greedy[4..].iter_mut().all(is_held));
        assert!(is_held(&mut quiet), "it has but one");
    }

    #[tokio::test(start_paused = true)]
    async fn of_equals_the_next_waits_until_one_has_ended_or_had_its_time() {
        let mut slots = ConnectionSlots::new(2, TIME);
        let (done, finished) = oneshot::channel::<()>();
        let short = async move { drop(finished.await) };
        slots.take([10, 0, 0, 1].into(), short).await;
        let mut second = hold(&mut slots, 2).await;
        let third = timeout(TIME / 2, hold(&mut slots, 3)).await;
        third.expect_err("all are taken");
        done.send(()).unwrap();
        let _third = timeout(TIME / 4, hold(&mut slots, 3)).await.unwrap();
        assert!(is_held(&mut second));
        let _fourth = timeout(TIME / 2, hold(&mut slots, 4)).await.unwrap();
        second.await.unwrap_err();
    }

    #[tokio::test]
    async fn who_has_gone_takes_no_slot() {
        let mut slots = ConnectionSlots::new(2, TIME);
        let mut held = hold(&mut slots, 1).await;
        for _ in 0..8 {
            slots.take([10, 0, 0, 1].into(), async {}).await;
            tokio::task::yield_now().await;
        }
        assert!(is_held(&mut held));
    }
}
