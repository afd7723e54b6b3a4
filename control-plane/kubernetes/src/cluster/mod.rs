//! The Kubernetes API as a source.
//!
//! A task of the source's own watches each kind, and one asks whether the API server answers:
//!
//! 1. [`kinds`] lists and watches one kind, retries with growing, jittered pauses, and says what is
//!    wrong and what to do about it ([`trouble`]); a kind that does not exist is waited for
//!    without holding up the others;
//! 2. each object is trimmed ([`trim`]), read and judged as a folder's document is
//!    (`crate::reading`), and [`holdings`] says what follows: applied, refused, deleted;
//! 3. [`store`] keeps what others than the model need to know of it.
//!
//! What was read stays in force while the API server is away or refuses to be read.

mod client;
mod holdings;
mod kinds;
mod reach;
mod store;
mod trim;
mod trouble;

use std::collections::{BTreeSet, VecDeque};

use kube::Client;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use turnpike_api::Kind;

pub use client::{ClientError, connect};
pub use store::{Namespace, Namespaces, Outsider, Outsiders, PolicyObject, PolicyStore, Stores};

use crate::{Event, Source};

/// When it is full the watches wait for the consumer, and their connections for them; the API
/// server then ends a watch that reads too slowly, which is followed by a new list.
const QUEUE: usize = 256;

/// Events from the Kubernetes API. Its tasks end when this is dropped.
#[derive(Debug)]
pub struct ClusterSource {
    messages: mpsc::Receiver<Message>,
    /// Kinds whose first list has not come.
    awaited: BTreeSet<Kind>,
    due: VecDeque<Event>,
    stores: Stores,
    tasks: JoinSet<()>,
}

#[derive(Debug)]
enum Message {
    Event(Event),
    /// All that there was of a kind has been told.
    Listed(Kind),
}

impl ClusterSource {
    /// Begins to read from the API that `client` leads to, named `server` in messages.
    pub fn start(client: &Client, server: &str) -> Self {
        let (sender, messages) = mpsc::channel(QUEUE);
        let stores = Stores::default();
        let (reachable, reach) = watch::channel(true);
        let mut tasks = JoinSet::new();
        tasks.spawn(reach::run(
            client.clone(),
            server.to_owned(),
            sender.clone(),
            reachable,
        ));
        for kind in Kind::ALL {
            let watched = kinds::Watched::new(
                *kind,
                client.clone(),
                stores.clone(),
                sender.clone(),
                reach.clone(),
            );
            tasks.spawn(watched.run());
        }
        Self {
            messages,
            awaited: Kind::ALL.iter().copied().collect(),
            due: VecDeque::new(),
            stores,
            tasks,
        }
    }

    pub fn stores(&self) -> &Stores {
        &self.stores
    }
}

impl Source for ClusterSource {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.due.pop_front() {
                return Some(event);
            }
            let message = tokio::select! {
                message = self.messages.recv() => message,
                // They end only after the receiver, unless one dies.
                ended = self.tasks.join_next() => {
                    tracing::error!(?ended, "a watch has ended");
                    None
                }
            };
            match message? {
                Message::Event(event) => return Some(event),
                Message::Listed(kind) => {
                    if self.awaited.remove(&kind) && self.awaited.is_empty() {
                        self.due.push_back(Event::Synced);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_source_without_one_of_its_watches_is_at_its_end() {
        let (sender, messages) = mpsc::channel(QUEUE);
        let mut source = ClusterSource {
            messages,
            awaited: BTreeSet::from([Kind::Pod]),
            due: VecDeque::new(),
            stores: Stores::default(),
            tasks: JoinSet::new(),
        };
        source.tasks.spawn(std::future::pending());
        sender.send(Message::Listed(Kind::Pod)).await.unwrap();
        assert_eq!(source.next().await, Some(Event::Synced));
        source
            .tasks
            .spawn(async { panic!("as if there were a fault in it") });
        assert_eq!(source.next().await, None);
    }
}
