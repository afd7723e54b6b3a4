//! The control side: what the data plane asks for is fetched, kept current and kept on disk.
//!
//! 1. [`Control::start`] restores the last snapshot, opens one delta ADS stream ([`store`] is its
//!    handler) and keeps the certificate fresh;
//! 2. a question of the data plane that nothing is known about becomes a subscription
//!    ([`index`] decides, [`store`] waits for the answer);
//! 3. what the controller sends is decoded whole or refused whole, and swapped in when complete;
//! 4. what nobody uses is evicted, unless the controller is away; changes go to disk ([`snapshot`]).

mod change;
mod dump;
mod index;
pub mod snapshot;
pub mod store;

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, interval},
};
use turnpike_certs::CredentialStore;
use turnpike_rules::{Identity, workload::SelfConfig};
use turnpike_wire::{ads, ca_client, channel::Controller};

use store::Store;
use turnpike_daemon::tasks::{Ended, Tasks};

/// How often idle entries are looked for, and a changed state is written to disk.
const EVICTION_INTERVAL: Duration = Duration::from_secs(30);
const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(2);
/// Subscriptions on their way to the stream. Full: they stay merged in the index until there is
/// room.
const SUBSCRIPTIONS: usize = 16;

/// Who this proxy is, and whom it asks.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    pub controller: Controller,
    pub cluster: String,
    pub network: String,
    pub pod_uid: String,
    pub identity: Identity,
    /// For the last snapshot; `None`: none is kept.
    pub state_dir: Option<PathBuf>,
}

/// The running control side. Dropping it ends its tasks.
#[derive(Debug)]
pub struct Control {
    store: Store,
    credentials: Arc<CredentialStore>,
    tasks: Tasks,
}

impl Control {
    /// Starts the tasks on the current runtime.
    pub fn start(config: ControlConfig) -> Self {
        let ControlConfig {
            controller,
            cluster,
            network,
            pod_uid,
            identity,
            state_dir,
        } = config;
        let store = Store::new(&cluster, &network, &pod_uid, identity.clone());
        let snapshot = state_dir.map(|dir| dir.join(snapshot::FILE));
        if let Some(path) = &snapshot {
            restore(&store, path);
        }
        let credentials = CredentialStore::empty();
        let mut tasks = Tasks::default();
        let (subscriptions, receiver) = mpsc::channel(SUBSCRIPTIONS);
        let client = ads::ClientConfig::new(pod_uid, cluster);
        let discovery = ads::run(client, controller.clone(), receiver, store.handler());
        tasks.spawn("discovery", discovery);
        tasks.spawn("subscriptions", store.clone().subscribe_to(subscriptions));
        let renewal = ca_client::keep_fresh(controller, identity, credentials.clone());
        tasks.spawn("certificate", renewal);
        tasks.spawn("eviction", evict(store.clone()));
        if let Some(path) = snapshot {
            tasks.spawn("snapshot", save(store.clone(), path));
        }
        Self {
            store,
            credentials,
            tasks,
        }
    }

    /// Returns when one of its tasks has ended: what the proxy knows is not kept current any more.
    pub async fn ended(&mut self) -> Ended {
        self.tasks.ended().await
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn credentials(&self) -> &Arc<CredentialStore> {
        &self.credentials
    }

    /// Returns when there are a certificate and this pod's own configuration: the data plane can
    /// serve.
    pub fn ready(&self) -> impl Future<Output = watch::Receiver<Arc<SelfConfig>>> + use<> {
        let (credentials, store) = (self.credentials.clone(), self.store.clone());
        async move {
            credentials.ready().await;
            store.own().await
        }
    }
}

fn restore(store: &Store, path: &std::path::Path) {
    match snapshot::read(path) {
        Ok(None) => {}
        Ok(Some(updates)) => {
            let restored = updates
                .into_iter()
                .try_for_each(|update| store.restore(update));
            match restored {
                Ok(()) => tracing::info!(path = %path.display(), "last state restored"),
                Err(error) => tracing::warn!(path = %path.display(), error, "last state not used"),
            }
        }
        Err(error) => tracing::warn!(path = %path.display(), %error, "last state not used"),
    }
}

async fn evict(store: Store) {
    let mut ticks = interval(EVICTION_INTERVAL);
    loop {
        ticks.tick().await;
        store.evict(Instant::now());
    }
}

async fn save(store: Store, path: PathBuf) {
    let mut ticks = interval(SNAPSHOT_INTERVAL);
    let mut failing = false;
    loop {
        ticks.tick().await;
        let Some(updates) = store.unsaved() else {
            continue;
        };
        let target = path.clone();
        let write = move || snapshot::write(&target, &updates);
        let written = match tokio::task::spawn_blocking(write).await {
            Ok(written) => written,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is going down.
                Err(_) => return,
            },
        };
        if let Err(error) = &written {
            store.not_saved();
            if !failing {
                tracing::warn!(path = %path.display(), %error, "cannot keep the last state; trying on");
            }
        }
        failing = written.is_err();
    }
}
