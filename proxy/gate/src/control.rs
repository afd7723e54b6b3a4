//! What the controller says: the egress rules of this node's pods, and the cluster's addresses.
//!
//! The last of it is kept on disk, so that a gate that starts while the controller is away goes on
//! with what was in force. Nothing in it is secret.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};
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

/// The last state received, in wire form.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Snapshot {
    /// Base64 by name.
    egress: BTreeMap<String, String>,
    members: BTreeMap<String, String>,
}

/// Takes updates from the controller and keeps the snapshot.
#[derive(Debug)]
pub struct Control {
    owner: Arc<Owner>,
    metrics: Arc<Metrics>,
    path: PathBuf,
    snapshot: Snapshot,
}

impl Control {
    /// Begins with the snapshot in `dir`, if there is a good one.
    pub fn restore(dir: &Path, owner: Arc<Owner>, metrics: Arc<Metrics>) -> Self {
        let path = dir.join(FILE);
        let mut control = Self {
            owner,
            metrics,
            path,
            snapshot: Snapshot::default(),
        };
        match control.read() {
            Ok(Some(snapshot)) => control.adopt(snapshot),
            Ok(None) => {}
            Err(error) => {
                let path = control.path.display();
                tracing::warn!(%path, error, "no usable snapshot; waiting for the controller");
            }
        }
        control
    }

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
        tracing::info!(
            pods = self.snapshot.egress.len(),
            "policy restored from the snapshot"
        );
        self.owner.apply(Change::PoliciesKnown);
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
            let removed = removed.iter().filter_map(|name| pod_of(name)).collect();
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

    fn write(&self) -> io::Result<()> {
        let bytes = serde_json::to_vec(&self.snapshot).map_err(io::Error::other)?;
        let temporary = self.path.with_extension("new");
        fs::write(&temporary, bytes)?;
        fs::rename(&temporary, &self.path)
    }
}

impl Handler for Control {
    fn apply(&mut self, update: Update) -> Result<(), String> {
        self.take(update)?;
        if let Err(error) = self.write() {
            tracing::warn!(%error, path = %self.path.display(), "the snapshot was not written");
        }
        Ok(())
    }

    /// A controller that knows no pod of this node says nothing; being connected is then all there
    /// is to wait for. A pod whose policy has not come yet is refused meanwhile.
    fn connection(&mut self, connected: bool) {
        if connected {
            self.owner.apply(Change::PoliciesKnown);
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
    use turnpike_rules::Identity;

    use super::*;
    use crate::state::PodLimits;

    #[test]
    fn one_unreadable_entry_on_disk_does_not_take_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let egress = PodEgress {
            uid: "u1".into(),
            namespace: "shop".into(),
            name: "web".into(),
            identity: Identity::new("cluster.local", "shop", "web").unwrap(),
            policies: vec![],
        };
        let good = BASE64_STANDARD.encode(egress.encode());
        let bad = BASE64_STANDARD.encode([0xff; 9]);
        let snapshot = Snapshot {
            egress: [("c/shop/odd".into(), bad), ("c/shop/web".into(), good)].into(),
            members: BTreeMap::new(),
        };
        let bytes = serde_json::to_vec(&snapshot).unwrap();
        fs::write(dir.path().join(FILE), bytes).unwrap();
        let (owner, _state) = Owner::new(PodLimits::default());
        let control = Control::restore(dir.path(), owner, Arc::default());
        let kept: Vec<_> = control.snapshot.egress.keys().collect();
        assert_eq!(kept, ["c/shop/web"]);
    }
}
