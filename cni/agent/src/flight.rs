//! One operation at a time on an attachment; a DEL calls off the ADD that it finds under way.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio_util::sync::CancellationToken;
use turnpike_ipam::Attachment;

/// Attachments with operations under way. An entry lives as long as somebody holds or awaits it.
#[derive(Clone, Debug, Default)]
pub struct Flights {
    entries: Arc<Mutex<HashMap<Attachment, Flight>>>,
}

#[derive(Clone, Debug, Default)]
struct Flight {
    turn: Arc<AsyncMutex<()>>,
    called_off: CancellationToken,
    users: usize,
}

/// The right to work on an attachment.
#[derive(Debug)]
pub struct Turn {
    flights: Flights,
    attachment: Attachment,
    /// Cancelled when a DEL waits for this turn to end.
    pub called_off: CancellationToken,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Flights {
    /// For an ADD, which a DEL may call off.
    pub async fn begin(&self, attachment: &Attachment) -> Turn {
        let (turn, lock) = self.enter(attachment, false);
        turn.hold(lock).await
    }

    /// For a DEL: whoever has the turn, and whoever waited for it before, gives up.
    pub async fn end(&self, attachment: &Attachment) -> Turn {
        let (turn, lock) = self.enter(attachment, true);
        turn.hold(lock).await
    }

    fn enter(&self, attachment: &Attachment, call_off: bool) -> (Turn, Arc<AsyncMutex<()>>) {
        let mut entries = self.entries.lock();
        let flight = entries.entry(attachment.clone()).or_default();
        flight.users += 1;
        if call_off {
            std::mem::take(&mut flight.called_off).cancel();
        }
        let turn = Turn {
            flights: self.clone(),
            attachment: attachment.clone(),
            called_off: flight.called_off.clone(),
            guard: None,
        };
        (turn, Arc::clone(&flight.turn))
    }
}

impl Turn {
    async fn hold(mut self, lock: Arc<AsyncMutex<()>>) -> Self {
        self.guard = Some(lock.lock_owned().await);
        self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.guard = None;
        let mut entries = self.flights.entries.lock();
        if let Entry::Occupied(mut entry) = entries.entry(self.attachment.clone()) {
            entry.get_mut().users -= 1;
            if entry.get().users == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment() -> Attachment {
        Attachment {
            container_id: "c".into(),
            ifname: "eth0".into(),
        }
    }

    #[tokio::test]
    async fn a_del_calls_off_the_add_before_it_and_not_the_one_after() {
        let flights = Flights::default();
        let add = flights.begin(&attachment()).await;
        let del = tokio::spawn({
            let flights = flights.clone();
            async move { flights.end(&attachment()).await }
        });
        add.called_off.cancelled().await;
        drop(add);
        let del = del.await.unwrap();
        let later = tokio::spawn({
            let flights = flights.clone();
            async move { flights.begin(&attachment()).await }
        });
        tokio::task::yield_now().await;
        drop(del);
        let later = later.await.unwrap();
        assert!(!later.called_off.is_cancelled());
        drop(later);
        assert!(flights.entries.lock().is_empty());
    }

    #[tokio::test]
    async fn a_turn_that_is_given_up_while_it_waits_leaves_nothing() {
        let flights = Flights::default();
        let first = flights.begin(&attachment()).await;
        {
            let same = attachment();
            let second = flights.begin(&same);
            tokio::pin!(second);
            assert!(futures_util::poll!(second.as_mut()).is_pending());
        }
        drop(first);
        assert!(flights.entries.lock().is_empty());
    }
}
