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
    _tasks: JoinSet<()>,
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
            _tasks: tasks,
        }
    }

    pub fn stores(&self) -> &Stores {
        &self.stores
    }
}

impl Source for ClusterSource {
    async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.due.pop_front() {
                return event;
            }
            match self.messages.recv().await {
                Some(Message::Event(event)) => return event,
                Some(Message::Listed(kind)) => {
                    if self.awaited.remove(&kind) && self.awaited.is_empty() {
                        self.due.push_back(Event::Synced);
                    }
                }
                // The tasks end only after this receiver; should they have died, nothing comes.
                None => {
                    tracing::error!("the watches have ended; changes are not seen");
                    std::future::pending().await
                }
            }
        }
    }
}
