//! One worker for what many ask, so that those who wait together are served together.

use tokio::sync::{mpsc, oneshot};

use crate::Error;

/// Callers that may wait before the next one waits to be let in.
const WAITING: usize = 256;
/// Callers that are served together.
const TOGETHER: usize = 64;

/// What one caller asks.
#[derive(Debug)]
pub(crate) struct Job<W> {
    pub(crate) wish: W,
    /// Whoever stopped waiting is not told.
    pub(crate) done: oneshot::Sender<Result<(), Error>>,
}

/// The worker's mailbox. The worker ends when the last clone is gone, and before that by a fault
/// alone, see [`ended`](Self::ended).
#[derive(Debug)]
pub(crate) struct Worker<W>(mpsc::Sender<Job<W>>);

impl<W> Clone for Worker<W> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<W: Send + 'static> Worker<W> {
    /// `serve` works on a thread that may block.
    pub(crate) fn start<S: Send + 'static>(mut state: S, serve: fn(&mut S, Vec<Job<W>>)) -> Self {
        let (sender, mut waiting) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            let mut batch = Vec::with_capacity(TOGETHER);
            while waiting.recv_many(&mut batch, TOGETHER).await > 0 {
                let jobs = std::mem::take(&mut batch);
                let served = tokio::task::spawn_blocking(move || {
                    serve(&mut state, jobs);
                    state
                });
                match served.await {
                    Ok(back) => state = back,
                    // What it knew of the kernel is lost with it.
                    Err(reason) => {
                        tracing::error!(%reason, "a worker of the datapath broke");
                        return;
                    }
                }
            }
        });
        Self(sender)
    }

    /// Returns when it is done.
    pub(crate) async fn ask(&self, wish: W) -> Result<(), Error> {
        let (done, outcome) = oneshot::channel();
        let job = Job { wish, done };
        self.0.send(job).await.map_err(|_| Error::Closed)?;
        outcome.await.map_err(|_| Error::Closed)?
    }

    /// Returns when the worker has broken, so that nobody is served any more.
    pub(crate) async fn ended(&self) {
        self.0.closed().await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn serve(served: &mut Vec<u32>, jobs: Vec<Job<u32>>) {
        for job in jobs {
            assert_ne!(job.wish, 13, "a fault");
            served.push(job.wish);
            job.done.send(Ok(())).unwrap();
        }
    }

    #[tokio::test]
    async fn a_worker_that_breaks_is_noticed_and_leaves_nobody_waiting() {
        let worker = Worker::start(Vec::new(), serve);
        worker.ask(1).await.unwrap();
        assert!(
            futures_util::poll!(std::pin::pin!(worker.ended())).is_pending(),
            "it works"
        );
        let broken = worker.ask(13).await;
        assert!(matches!(broken, Err(Error::Closed)), "{broken:?}");
        tokio::time::timeout(Duration::from_secs(20), worker.ended())
            .await
            .expect("its end is told");
        assert!(matches!(worker.ask(2).await, Err(Error::Closed)));
    }
}
