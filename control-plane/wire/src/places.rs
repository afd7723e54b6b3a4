//! Bounded room for a server's connections, which nobody can keep from others.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    net::IpAddr,
};

use tokio::task::{AbortHandle, JoinSet};

/// Connections, each a task, that end with this.
///
/// Who comes when all places are taken gets one of whoever has most, the oldest. So a caller that
/// holds what it can only displaces itself, and others are displaced by many callers at once alone.
#[derive(Debug)]
pub struct Places {
    most: usize,
    tasks: JoinSet<()>,
    oldest_first: VecDeque<(IpAddr, AbortHandle)>,
}

impl Places {
    pub fn new(most: usize) -> Self {
        Self {
            most,
            tasks: JoinSet::new(),
            oldest_first: VecDeque::new(),
        }
    }

    /// Runs `connection`, which comes from `peer`.
    pub fn take(&mut self, peer: IpAddr, connection: impl Future<Output = ()> + Send + 'static) {
        while self.tasks.try_join_next().is_some() {}
        self.oldest_first.retain(|(_, task)| !task.is_finished());
        if self.oldest_first.len() >= self.most {
            self.give_up_one();
        }
        let task = self.tasks.spawn(connection);
        self.oldest_first.push_back((peer, task));
    }

    /// Returns when all have ended by themselves.
    pub async fn drained(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }

    fn give_up_one(&mut self) {
        let mut held = HashMap::<IpAddr, usize>::new();
        for (peer, _) in &self.oldest_first {
            *held.entry(*peer).or_default() += 1;
        }
        let most = held.values().copied().max();
        let greedy = |(peer, _): &(IpAddr, _)| held.get(peer).copied() == most;
        if let Some(oldest) = self.oldest_first.iter().position(greedy)
            && let Some((_, task)) = self.oldest_first.remove(oldest)
        {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    /// Takes a place for good; what is returned says when it is lost.
    fn hold(places: &mut Places, peer: [u8; 4]) -> oneshot::Receiver<()> {
        let (held, lost) = oneshot::channel();
        places.take(peer.into(), async move {
            std::future::pending::<()>().await;
            drop(held);
        });
        lost
    }

    #[tokio::test]
    async fn who_holds_most_gives_way() {
        let (quiet, greedy) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        let mut places = Places::new(4);
        let mut first = hold(&mut places, quiet);
        let mut others: Vec<_> = (0..7).map(|_| hold(&mut places, greedy)).collect();
        for displaced in &mut others[..4] {
            displaced.await.unwrap_err();
        }
        for kept in &mut others[4..] {
            kept.try_recv().unwrap_err();
        }
        assert_eq!(
            first.try_recv(),
            Err(oneshot::error::TryRecvError::Empty),
            "it has but one"
        );
    }

    #[tokio::test]
    async fn who_has_gone_takes_no_place() {
        let mut places = Places::new(2);
        let mut held = hold(&mut places, [10, 0, 0, 1]);
        for _ in 0..8 {
            places.take([10, 0, 0, 1].into(), async {});
            tokio::task::yield_now().await;
        }
        assert_eq!(held.try_recv(), Err(oneshot::error::TryRecvError::Empty));
    }
}
