//! The credentials in force, swapped while they are in use.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use tokio::sync::watch;

use crate::{Credentials, InvalidCredentials, TrustBundle};

/// Holds a process's current [`Credentials`]. Every handshake reads it, so what is put here takes
/// effect with the next connection; those that exist keep what they were made with.
///
/// Empty until the first credentials have come: handshakes fail, nothing falls back to plaintext.
#[derive(Debug)]
pub struct CredentialStore {
    current: ArcSwapOption<Credentials>,
    generation: watch::Sender<u64>,
}

impl CredentialStore {
    pub fn empty() -> Arc<Self> {
        Arc::new(Self {
            current: ArcSwapOption::empty(),
            generation: watch::Sender::new(0),
        })
    }

    pub fn new(credentials: Credentials) -> Arc<Self> {
        let store = Self::empty();
        store.replace(credentials);
        store
    }

    pub fn load(&self) -> Option<Arc<Credentials>> {
        self.current.load_full()
    }

    pub fn replace(&self, credentials: Credentials) {
        self.current.store(Some(Arc::new(credentials)));
        self.generation.send_modify(|generation| *generation += 1);
    }

    /// Trusts other roots from now on; the old ones stay where ours would no longer lead to one.
    /// Does nothing to an empty store.
    pub fn replace_roots(&self, roots: TrustBundle) -> Result<(), InvalidCredentials> {
        match self.load() {
            Some(current) if current.roots() != &roots => {
                self.replace(current.with_roots(roots)?);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Counts replacements: 0 while the store is empty.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Returns when there are credentials.
    pub async fn ready(&self) -> Arc<Credentials> {
        let mut changes = self.subscribe();
        loop {
            if let Some(credentials) = self.load() {
                return credentials;
            }
            // The sender is `self`, so it outlives this wait.
            let _ = changes.changed().await;
        }
    }
}
