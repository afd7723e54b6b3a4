//! The parts that run for as long as the gate does: when one ends, it can be seen.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A part ended that should not have: the gate would go on without it, and nobody would know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the gate's part `{0}` ended by itself; the log says why, and a new gate is to take over")]
pub struct PartEnded(pub &'static str);

/// Knows which part ended first. Clones are one.
#[derive(Clone, Debug)]
pub struct Parts(Arc<watch::Sender<Option<PartEnded>>>);

impl Default for Parts {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }
}

impl Parts {
    /// `work`, watched: where it returns or panics before `stop`, it is missing.
    pub fn watched<T, F: Future<Output = T>>(
        &self,
        name: &'static str,
        stop: CancellationToken,
        work: F,
    ) -> impl Future<Output = T> + use<T, F> {
        let guard = Guard {
            name,
            stop,
            parts: self.clone(),
        };
        async move {
            let _guard = guard;
            work.await
        }
    }

    /// Returns when a part has ended.
    pub async fn ended(&self) -> PartEnded {
        let mut ended = self.0.subscribe();
        let found = ended.wait_for(Option::is_some).await;
        let found = found.ok().and_then(|ended| *ended);
        match found {
            Some(ended) => ended,
            // The sender is `self`, so it outlives this wait.
            None => std::future::pending().await,
        }
    }

    pub fn missing(&self) -> Option<PartEnded> {
        *self.0.borrow()
    }
}

struct Guard {
    name: &'static str,
    stop: CancellationToken,
    parts: Parts,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.stop.is_cancelled() {
            return;
        }
        let ended = PartEnded(self.name);
        tracing::error!("{ended}");
        self.parts.0.send_if_modified(|first| {
            let news = first.is_none();
            first.get_or_insert(ended);
            news
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_that_returns_or_panics_is_missing_and_one_that_was_stopped_is_not() {
        let (parts, stop) = (Parts::default(), CancellationToken::new());
        let waiting = stop.clone();
        let fine = parts.watched(
            "fine",
            stop.clone(),
            async move { waiting.cancelled().await },
        );
        let fine = tokio::spawn(fine);
        tokio::task::yield_now().await;
        assert_eq!(parts.missing(), None);
        stop.cancel();
        fine.await.unwrap();
        assert_eq!(parts.missing(), None);

        let faulty = parts.watched("faulty", CancellationToken::new(), async {
            panic!("as if there were a fault in it")
        });
        tokio::spawn(faulty).await.unwrap_err();
        assert_eq!(parts.ended().await, PartEnded("faulty"));
        let short = parts.watched("short", CancellationToken::new(), std::future::ready(()));
        tokio::spawn(short).await.unwrap();
        assert_eq!(
            parts.missing(),
            Some(PartEnded("faulty")),
            "the first is told"
        );
    }
}
