//! The end of the proxy: stop accepting, let what runs finish, force what does not.

use tokio::sync::watch;

/// How far the shutdown has come; each stage includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) enum Stage {
    #[default]
    Running,
    /// Inbound: no new connections, connections end with the request they carry. Outbound works
    /// as before: the application may have last calls to make.
    Inbound,
    /// Outbound too.
    All,
    /// The deadline has passed: everything is cut.
    Cut,
}

/// Tells every connection and listener of the stage.
#[derive(Clone, Debug)]
pub(crate) struct Drain(watch::Receiver<Stage>);

/// The one that decides.
#[derive(Debug)]
pub(crate) struct Drainer(watch::Sender<Stage>);

pub(crate) fn channel() -> (Drainer, Drain) {
    let (sender, receiver) = watch::channel(Stage::Running);
    (Drainer(sender), Drain(receiver))
}

impl Drainer {
    pub(crate) fn enter(&self, stage: Stage) {
        self.0.send_modify(|now| *now = stage.max(*now));
    }
}

impl Drain {
    /// Returns when `stage` is reached. A dropped [`Drainer`] has reached all of them.
    pub(crate) async fn reached(&self, stage: Stage) {
        let _ = self.0.clone().wait_for(|now| *now >= stage).await;
    }
}
