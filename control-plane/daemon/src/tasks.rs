//! Tasks that are to run for as long as the process does: their owner learns when one does not.

use std::{any::Any, collections::HashMap};

use tokio::task::{Id, JoinError, JoinSet};

/// A task ended that should not have.
#[derive(Debug, thiserror::Error)]
#[error("the task `{task}` ended: {why}")]
pub struct Ended {
    pub task: &'static str,
    pub why: String,
}

/// Tasks by name. Dropping it ends them.
#[derive(Debug, Default)]
pub struct Tasks {
    running: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.running.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Returns when one of them ends, by a panic or of itself. May be dropped and called again.
    pub async fn ended(&mut self) -> Ended {
        let Some(ended) = self.running.join_next_with_id().await else {
            // There is none to end.
            return std::future::pending().await;
        };
        let (id, why) = match ended {
            Ok((id, ())) => (id, "it has nothing left to do".to_owned()),
            Err(error) => (error.id(), reason(error)),
        };
        let task = self.names.remove(&id).unwrap_or("unnamed");
        Ended { task, why }
    }

    /// Returns when all have ended.
    pub async fn drained(&mut self) {
        while self.running.join_next().await.is_some() {}
    }
}

/// Why a task did not come to its end.
pub fn reason(error: JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => format!("it panicked: {}", message(&*panic)),
        Err(error) => error.to_string(),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&'static str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("(no message)")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn whichever_ends_is_named_with_the_reason() {
        let mut tasks = Tasks::default();
        let (fault, faulty) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn("fine", std::future::pending());
        tasks.spawn("faulty", async {
            faulty.await.expect("as if there were a fault in it");
        });
        let early = timeout(Duration::from_millis(50), tasks.ended()).await;
        assert!(early.is_err(), "{early:?}");
        drop(fault);
        let ended = tasks.ended().await.to_string();
        assert!(
            ended.starts_with("the task `faulty` ended: it panicked: as if there were a fault"),
            "{ended}"
        );
        tasks.spawn("short", std::future::ready(()));
        assert_eq!(tasks.ended().await.task, "short");
    }
}
