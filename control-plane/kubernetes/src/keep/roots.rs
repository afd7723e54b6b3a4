//! The mesh's root certificate, as a ConfigMap in every namespace: pods mount it to trust the
//! controller before they have a certificate of their own.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Instant,
};

use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::watcher::{Event, watcher},
};
use serde_json::json;
use tokio::time::{sleep, sleep_until};

use super::{MANAGER, PAUSE, refused, retry_pause, unwatched, watch_one};
use crate::{Impairments, cluster::Namespaces};

const KEY: &str = "root.pem";
/// Namespaces written to at once.
const WRITERS: usize = 8;
const GRANT_WATCH: &str = "verbs get, list and watch on configmaps named turnpike-root";
const GRANT_WRITE: &str = "verb create on configmaps, and patch on those named turnpike-root";

/// Keeps the ConfigMap `name` with the certificate in each namespace.
#[derive(Clone)]
pub struct RootConfigMaps {
    pub client: Client,
    pub namespaces: Namespaces,
    pub impairments: Impairments,
    pub name: String,
    /// The certificates, PEM.
    pub roots: String,
}

impl std::fmt::Debug for RootConfigMaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RootConfigMaps").finish_non_exhaustive()
    }
}

/// Where the ConfigMap is as it should be. `None`: not known yet.
type Right = Option<HashMap<Arc<str>, bool>>;

impl RootConfigMaps {
    /// Keeps them for as long as it is polled.
    pub async fn run(self) {
        let api: Api<ConfigMap> = Api::all(self.client.clone());
        let watch = || watcher(api.clone(), watch_one(&self.name)).boxed();
        let mut events = watch();
        let mut changes = self.namespaces.changes();
        let mut right: Right = None;
        let mut listing = HashMap::new();
        let mut retry: Option<Instant> = None;
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => self.take(event, &mut right, &mut listing),
                    Some(Err(error)) => {
                        let found = unwatched(&self.watched(), &error, GRANT_WATCH);
                        if found.is_some() {
                            self.impairments.set(&self.watched(), found);
                        }
                        sleep(retry_pause()).await;
                        // A new list says whether it is over.
                        events = watch();
                        continue;
                    }
                    None => return,
                },
                changed = changes.changed() => if changed.is_err() { return },
                () = sleep_until(retry.unwrap_or_else(Instant::now).into()), if retry.is_some() => {}
            }
            if let Some(right) = &mut right {
                retry = self
                    .correct(right)
                    .await
                    .then(|| Instant::now() + retry_pause());
            }
        }
    }

    fn take(
        &self,
        event: Event<ConfigMap>,
        right: &mut Right,
        listing: &mut HashMap<Arc<str>, bool>,
    ) {
        let place = |map: &ConfigMap| -> Arc<str> {
            map.metadata.namespace.as_deref().unwrap_or_default().into()
        };
        match event {
            Event::Init => listing.clear(),
            Event::InitApply(map) => {
                listing.insert(place(&map), self.is_right(&map));
            }
            Event::InitDone => {
                *right = Some(std::mem::take(listing));
                self.impairments.set(&self.watched(), None);
            }
            Event::Apply(map) => {
                let right = right.get_or_insert_default();
                right.insert(place(&map), self.is_right(&map));
            }
            Event::Delete(map) => {
                right.get_or_insert_default().remove(&place(&map));
            }
        }
    }

    fn is_right(&self, map: &ConfigMap) -> bool {
        let data = map.data.as_ref();
        data.and_then(|data| data.get(KEY)) == Some(&self.roots)
    }

    /// Writes where it is missing or wrong. True: some could not be written.
    async fn correct(&self, right: &mut HashMap<Arc<str>, bool>) -> bool {
        let living = self.namespaces.living().into_iter();
        let due: Vec<Arc<str>> = living
            .filter(|namespace| right.get(namespace) != Some(&true))
            .collect();
        if due.is_empty() {
            self.impairments.set(&self.written(), None);
            return false;
        }
        let writes = due.into_iter().map(|namespace| async {
            let written = self.write(&namespace).await;
            (namespace, written)
        });
        let mut written = stream::iter(writes).buffer_unordered(WRITERS);
        let mut failures = BTreeMap::new();
        while let Some((namespace, result)) = written.next().await {
            match result {
                Ok(()) => {
                    tracing::info!(%namespace, name = self.name, "wrote the root certificate");
                    right.insert(namespace, true);
                }
                Err(error) if is_ending(&error) => {}
                Err(error) => {
                    failures.insert(namespace, error);
                }
            }
        }
        let found = failures.first_key_value().map(|(namespace, error)| {
            let doing = format!(
                "writing it in {} namespaces, first {namespace},",
                failures.len()
            );
            let mut found = refused(&self.written(), &doing, error, GRANT_WRITE);
            found
                .message
                .push_str("; pods there cannot mount it and do not start");
            found
        });
        self.impairments.set(&self.written(), found);
        sleep(PAUSE).await;
        !failures.is_empty()
    }

    async fn write(&self, namespace: &str) -> Result<(), kube::Error> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": self.name,
                "labels": {"app.kubernetes.io/managed-by": MANAGER},
            },
            "data": {KEY: self.roots},
        });
        let params = PatchParams::apply(MANAGER).force();
        api.patch(&self.name, &params, &Patch::Apply(map))
            .await
            .map(drop)
    }

    fn watched(&self) -> String {
        format!("ConfigMap {} (watch)", self.name)
    }

    fn written(&self) -> String {
        format!("ConfigMap {}", self.name)
    }
}

/// The namespace is being deleted, or is gone: nobody misses the certificate there.
fn is_ending(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else {
        return false;
    };
    let ending = status.details.iter().flat_map(|details| &details.causes);
    let mut ending = ending.filter(|cause| cause.reason == "NamespaceTerminating");
    status.code == 404 || ending.next().is_some()
}
