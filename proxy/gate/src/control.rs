//! What the controller says: the egress rules of this node's pods, and the cluster's addresses.
//!
//! The last of it is kept on disk, so that a gate that starts while the controller is away goes on
//! with what was in force. Nobody tells a new gate what went while no gate ran: what only the disk
//! says stays in force until the controller has been there for some time without naming it, and is
//! dropped then. Nothing in it is secret.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use turnpike_rules::pod::{Members, PodEgress};
use turnpike_wire::{
    ads::{Added, Handler, Update},
    resource::Resource,
};

use crate::{
    metrics::Metrics,
    state::{Change, Owner},
};

const FILE: &str = "policy.json";
/// How long an unbroken connection must have stood before what it did not confirm is dropped.
const CONFIRM_WITHIN: Duration = Duration::from_secs(30);

/// The last state received, in wire form.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Snapshot {
    /// Base64 by name.
    egress: BTreeMap<String, String>,
    members: BTreeMap<String, String>,
}

/// Takes updates from the controller and keeps the snapshot. Clones are one.
#[derive(Clone, Debug)]
pub struct Control {
    kept: Arc<Mutex<Kept>>,
    /// Since when the controller has been there.
    connected: Arc<watch::Sender<Option<Instant>>>,
}

impl Control {
    /// Begins with the snapshot in `dir`, if there is a good one.
    pub fn restore(dir: &Path, owner: Arc<Owner>, metrics: Arc<Metrics>) -> Self {
        let mut kept = Kept {
            owner,
            metrics,
            path: dir.join(FILE),
            snapshot: Snapshot::default(),
            unconfirmed: BTreeMap::new(),
        };
        match kept.read() {
            Ok(Some(snapshot)) => kept.adopt(snapshot),
            Ok(None) => {}
            Err(error) => {
                let path = kept.path.display();
                tracing::warn!(%path, error, "no usable snapshot; waiting for the controller");
            }
        }
        Self {
            kept: Arc::new(Mutex::new(kept)),
            connected: Arc::new(watch::Sender::new(None)),
        }
    }

    /// Drops what a connection of [`CONFIRM_WITHIN`] has not confirmed. Goes on for ever, with
    /// nothing to do once that has been.
    pub async fn confirm(self) {
        let mut connected = self.connected.subscribe();
        loop {
            let since = *connected.borrow_and_update();
            let confirmed = async {
                match since {
                    Some(since) => sleep_until(since + CONFIRM_WITHIN).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                // The sender is `self`: it is not closed.
                _ = connected.changed() => {}
                () = confirmed => break,
            }
        }
        self.kept.lock().drop_unconfirmed();
        std::future::pending().await
    }
}

impl Handler for Control {
    fn apply(&mut self, update: Update) -> Result<(), String> {
        let mut kept = self.kept.lock();
        kept.confirmed(&update);
        kept.take(update)?;
        kept.write();
        Ok(())
    }

    /// A controller that knows no pod of this node says nothing; being connected is then all there
    /// is to wait for. A pod whose policy has not come yet is refused meanwhile.
    fn connection(&mut self, connected: bool) {
        self.connected.send_replace(connected.then(Instant::now));
        if connected {
            self.kept.lock().owner.apply(Change::PoliciesKnown);
        }
    }
}

#[derive(Debug)]
struct Kept {
    owner: Arc<Owner>,
    metrics: Arc<Metrics>,
    path: PathBuf,
    snapshot: Snapshot,
    /// Names that only the disk vouches for, by type.
    unconfirmed: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Kept {
    fn read(&self) -> Result<Option<Snapshot>, String> {
        match fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| e.to_string()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    fn adopt(&mut self, snapshot: Snapshot) {
        for update in [
            readable::<Members>(&snapshot.members),
            readable::<PodEgress>(&snapshot.egress),
        ] {
            if let Err(error) = self.take(update) {
                tracing::warn!(error, "part of the snapshot cannot be used");
            }
        }
        let names = |kept: &BTreeMap<String, String>| kept.keys().cloned().collect();
        self.unconfirmed = [
            (Members::TYPE_URL, names(&self.snapshot.members)),
            (PodEgress::TYPE_URL, names(&self.snapshot.egress)),
        ]
        .into();
        tracing::info!(
            pods = self.snapshot.egress.len(),
            "policy restored from the snapshot"
        );
        self.owner.apply(Change::PoliciesKnown);
    }

    /// Also of what the gate then refuses the controller has spoken: what was last understood of it
    /// stays in force.
    fn confirmed(&mut self, update: &Update) {
        if let Some(unconfirmed) = self.unconfirmed.get_mut(&*update.type_url) {
            for Added { name, .. } in &update.added {
                unconfirmed.remove(name);
            }
        }
    }

    fn drop_unconfirmed(&mut self) {
        for (type_url, names) in std::mem::take(&mut self.unconfirmed) {
            if names.is_empty() {
                continue;
            }
            tracing::info!(
                type_url,
                ?names,
                "dropped: the controller does not know them"
            );
            let gone = Update {
                type_url: type_url.into(),
                added: vec![],
                removed: names.into_iter().collect(),
            };
            if let Err(error) = self.take(gone) {
                tracing::error!(
                    error,
                    "part of the last policy stays, though nobody knows it"
                );
            }
        }
        self.write();
    }

    fn take(&mut self, update: Update) -> Result<(), String> {
        let Update {
            type_url,
            added,
            removed,
        } = update;
        let keep = |kept: &mut BTreeMap<String, String>| {
            for name in &removed {
                kept.remove(name);
            }
            for Added { name, bytes, .. } in &added {
                kept.insert(name.clone(), BASE64_STANDARD.encode(bytes));
            }
        };
        if type_url == PodEgress::TYPE_URL {
            let decoded = decode::<PodEgress>(&added)?;
            keep(&mut self.snapshot.egress);
            // The cluster may have another name by now: the pod goes with the last of its own.
            let left = self.snapshot.egress.keys();
            let left: BTreeSet<_> = left.filter_map(|name| pod_of(name)).collect();
            let removed = removed.iter().filter_map(|name| pod_of(name));
            let removed = removed.filter(|pod| !left.contains(pod)).collect();
            let added = decoded.into_iter().map(|(_, egress)| egress).collect();
            self.owner.apply(Change::Policies { added, removed });
        } else if type_url == Members::TYPE_URL {
            let decoded = decode::<Members>(&added)?;
            keep(&mut self.snapshot.members);
            self.owner.apply(Change::Members {
                added: decoded,
                removed,
            });
        } else {
            return Err(format!("the gate did not ask for {type_url}"));
        }
        self.metrics.policy_updates.inc();
        Ok(())
    }

    /// Without it, the next gate begins with an older one.
    fn write(&self) {
        let write = || {
            let bytes = serde_json::to_vec(&self.snapshot).map_err(io::Error::other)?;
            let temporary = self.path.with_extension("new");
            fs::write(&temporary, bytes)?;
            fs::rename(&temporary, &self.path)
        };
        if let Err(error) = write() {
            tracing::warn!(%error, path = %self.path.display(), "the snapshot was not written");
        }
    }
}

/// What of a snapshot can be read: one entry that a newer gate wrote is no reason to lose the others.
fn readable<R: Resource>(kept: &BTreeMap<String, String>) -> Update {
    let read = |(name, text): (&String, &String)| {
        let bytes = BASE64_STANDARD.decode(text).map_err(|e| e.to_string())?;
        R::decode(name, &bytes).map_err(|error| error.to_string())?;
        Ok(Added {
            name: name.clone(),
            version: String::new(),
            bytes,
        })
    };
    let report = |error: &String| tracing::warn!(error, "left out of the snapshot");
    Update {
        type_url: R::TYPE_URL.into(),
        added: kept
            .iter()
            .filter_map(|entry| read(entry).inspect_err(report).ok())
            .collect(),
        removed: vec![],
    }
}

fn decode<R: Resource>(added: &[Added]) -> Result<Vec<(String, R)>, String> {
    let one = |added: &Added| match R::decode(&added.name, &added.bytes) {
        Ok(resource) => Ok((added.name.clone(), resource)),
        Err(error) => Err(error.to_string()),
    };
    added.iter().map(one).collect()
}

/// `namespace/name` of `cluster/namespace/name`.
fn pod_of(resource: &str) -> Option<String> {
    resource.split_once('/').map(|(_, pod)| pod.to_owned())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use tokio::time::sleep;
    use turnpike_rules::Identity;

    use super::*;
    use crate::state::{PodInfo, PodLimits, Standing, State};

    fn egress(name: &str) -> PodEgress {
        PodEgress {
            uid: "u1".into(),
            namespace: "shop".into(),
            name: name.into(),
            identity: Identity::new("cluster.local", "shop", "web").unwrap(),
            policies: vec![turnpike_rules::egress::EgressPolicy {
                name: "shop/web".into(),
                version: "1".into(),
                mode: turnpike_rules::egress::Mode::Enforce,
                rules: vec![],
            }],
        }
    }

    fn members(name: &str, address: &str) -> Members {
        Members {
            name: name.into(),
            addresses: vec![ip(address)],
            services: vec![],
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn update<R: Resource>(added: &[(&str, &R)]) -> Update {
        let added = added.iter().map(|(name, resource)| Added {
            name: (*name).to_owned(),
            version: "1".into(),
            bytes: resource.encode(),
        });
        Update {
            type_url: R::TYPE_URL.into(),
            added: added.collect(),
            removed: vec![],
        }
    }

    fn restore(dir: &Path) -> (Control, State) {
        let (owner, state) = Owner::new(PodLimits::default());
        for (name, address) in [("web", "10.0.1.5"), ("old", "10.0.1.6")] {
            owner.apply(Change::PodAdded(PodInfo {
                uid: "u1".into(),
                namespace: "shop".into(),
                name: name.into(),
                container_id: name.into(),
                addresses: vec![ip(address)],
                selected: true,
            }));
        }
        (Control::restore(dir, owner, Arc::default()), state)
    }

    /// Of a gate that ran while there were two nodes and two pods.
    fn kept_by_an_earlier_gate(dir: &Path) {
        let (mut earlier, _) = restore(dir);
        let (a, b) = (members("c/a", "10.0.1.5"), members("c/b", "10.0.2.5"));
        let pods = (egress("web"), egress("old"));
        earlier.apply(update(&[("c/a", &a), ("c/b", &b)])).unwrap();
        earlier
            .apply(update(&[("c/shop/web", &pods.0), ("c/shop/old", &pods.1)]))
            .unwrap();
    }

    fn is_selected(state: &State, address: &str) -> bool {
        let standing = state.view().standing(ip(address));
        matches!(standing, Standing::Selected(..))
    }

    #[tokio::test(start_paused = true)]
    async fn what_went_while_no_gate_ran_is_dropped_once_the_controller_has_not_named_it() {
        let dir = tempfile::tempdir().unwrap();
        kept_by_an_earlier_gate(dir.path());
        let (mut control, state) = restore(dir.path());
        tokio::spawn(control.clone().confirm());
        let in_force =
            || state.view().is_cluster(ip("10.0.2.5")) && is_selected(&state, "10.0.1.6");

        sleep(2 * CONFIRM_WITHIN).await;
        assert!(in_force(), "the controller is away");
        control.connection(true);
        control
            .apply(update(&[("c/a", &members("c/a", "10.0.1.5"))]))
            .unwrap();
        control
            .apply(update(&[("c/shop/web", &egress("web"))]))
            .unwrap();
        sleep(CONFIRM_WITHIN - Duration::from_secs(1)).await;
        control.connection(false);
        control.connection(true);
        sleep(CONFIRM_WITHIN - Duration::from_secs(1)).await;
        assert!(in_force(), "it was away in between");
        sleep(Duration::from_secs(2)).await;
        assert!(!state.view().is_cluster(ip("10.0.2.5")));
        assert!(!is_selected(&state, "10.0.1.6"));
        assert!(state.view().is_cluster(ip("10.0.1.5")) && is_selected(&state, "10.0.1.5"));

        let (_, state) = restore(dir.path());
        assert!(!state.view().is_cluster(ip("10.0.2.5")), "nor on the disk");
        assert!(state.view().is_cluster(ip("10.0.1.5")));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_heard_and_not_understood_is_kept_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        kept_by_an_earlier_gate(dir.path());
        let (mut control, state) = restore(dir.path());
        tokio::spawn(control.clone().confirm());
        control.connection(true);
        let mut newer = update(&[("c/b", &members("c/b", "10.0.2.5"))]);
        newer.added[0].bytes = vec![0xff; 9];
        control.apply(newer).unwrap_err();
        sleep(2 * CONFIRM_WITHIN).await;
        assert!(state.view().is_cluster(ip("10.0.2.5")));
        assert!(
            !state.view().is_cluster(ip("10.0.1.5")),
            "nobody spoke of it"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_is_not_dropped_with_the_earlier_name_of_the_cluster() {
        let dir = tempfile::tempdir().unwrap();
        kept_by_an_earlier_gate(dir.path());
        let (mut control, state) = restore(dir.path());
        tokio::spawn(control.clone().confirm());
        control.connection(true);
        control
            .apply(update(&[("renamed/shop/web", &egress("web"))]))
            .unwrap();
        sleep(2 * CONFIRM_WITHIN).await;
        assert!(is_selected(&state, "10.0.1.5"));
        assert!(!is_selected(&state, "10.0.1.6"));
    }

    #[test]
    fn one_unreadable_entry_on_disk_does_not_take_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let good = BASE64_STANDARD.encode(egress("web").encode());
        let bad = BASE64_STANDARD.encode([0xff; 9]);
        let snapshot = Snapshot {
            egress: [("c/shop/odd".into(), bad), ("c/shop/web".into(), good)].into(),
            members: BTreeMap::new(),
        };
        let bytes = serde_json::to_vec(&snapshot).unwrap();
        fs::write(dir.path().join(FILE), bytes).unwrap();
        let (control, _) = restore(dir.path());
        let kept = control.kept.lock();
        assert_eq!(
            kept.snapshot.egress.keys().collect::<Vec<_>>(),
            ["c/shop/web"]
        );
    }
}
