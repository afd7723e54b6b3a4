//! What the control plane says of this node's pods and of who the cluster is.
//!
//! One snapshot, replaced under readers' eyes, kept on disk: a restarted agent enforces what it
//! last heard until the controller speaks again. What only the disk says may be older than what is
//! in force, so it frees no pod; and what the controller does not confirm soon after it is back is
//! dropped.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use prost::Message;
use tokio::sync::watch;
use turnpike_rules::pod::{Members, PodNetwork};
use turnpike_wire::{
    ads::{Added, Handler, Update},
    discovery::DeltaDiscoveryResponse,
    resource::{Resource, pack},
};

use crate::node::Node;

const FILE: &str = "policy.snapshot";
/// Changes within this time share one write.
const WRITE_PAUSE: Duration = Duration::from_millis(250);
/// How long after a connection the controller may take to confirm what the disk said.
const CONFIRM_WITHIN: Duration = Duration::from_secs(30);

/// All that was heard, and from whom.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pods: BTreeMap<String, Arc<PodNetwork>>,
    members: BTreeMap<String, Arc<Members>>,
    /// Names that only the disk vouches for.
    unconfirmed: BTreeSet<String>,
    pub connected: bool,
}

impl Snapshot {
    pub fn members(&self) -> impl Iterator<Item = (&String, &Arc<Members>)> {
        self.members.iter()
    }

    pub fn pods(&self) -> impl Iterator<Item = &Arc<PodNetwork>> {
        self.pods.values()
    }
}

/// The cache. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Policy {
    snapshot: Arc<watch::Sender<Snapshot>>,
}

impl Policy {
    /// Begins with what the disk says; without it, with nothing.
    pub fn load(state: &Path) -> Self {
        let snapshot = match read(&state.join(FILE)) {
            Ok(snapshot) => snapshot,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Snapshot::default(),
            Err(error) => {
                tracing::warn!(%error, "the last policy cannot be read; the controller's is awaited");
                Snapshot::default()
            }
        };
        Self {
            snapshot: Arc::new(watch::Sender::new(snapshot)),
        }
    }

    pub fn pod(&self, name: &str) -> Option<Arc<PodNetwork>> {
        self.snapshot.borrow().pods.get(name).cloned()
    }

    /// Whether the controller has said it, not only the disk.
    pub fn is_confirmed(&self, name: &str) -> bool {
        let name = confirmable(PodNetwork::TYPE_URL, name);
        !self.snapshot.borrow().unconfirmed.contains(&name)
    }

    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.subscribe()
    }

    /// Takes an update whole, or nothing of it. Also of what it cannot read the controller has
    /// spoken: what was last understood of it stays, and is not dropped as unknown.
    fn apply(&self, update: Update) -> Result<(), String> {
        let Update {
            type_url,
            added,
            removed,
        } = update;
        let read = Read::of(&type_url, &added);
        self.snapshot.send_modify(|snapshot| {
            for it in &added {
                snapshot
                    .unconfirmed
                    .remove(&confirmable(&type_url, &it.name));
            }
            let Ok(Read { pods, members }) = &read else {
                return;
            };
            for name in &removed {
                snapshot.unconfirmed.remove(&confirmable(&type_url, name));
                if type_url == PodNetwork::TYPE_URL {
                    snapshot.pods.remove(name);
                } else {
                    snapshot.members.remove(name);
                }
            }
            snapshot.pods.extend(pods.iter().cloned());
            snapshot.members.extend(members.iter().cloned());
        });
        read.map(drop)
    }

    fn drop_unconfirmed(&self) {
        self.snapshot.send_modify(|snapshot| {
            let unconfirmed = std::mem::take(&mut snapshot.unconfirmed);
            let keep = |type_url: &str, name: &str| {
                let known = !unconfirmed.contains(&confirmable(type_url, name));
                if !known {
                    tracing::info!(type_url, name, "dropped: the controller does not know it");
                }
                known
            };
            snapshot
                .pods
                .retain(|name, _| keep(PodNetwork::TYPE_URL, name));
            snapshot
                .members
                .retain(|name, _| keep(Members::TYPE_URL, name));
        });
    }
}

/// Of one update or snapshot, what it brings.
#[derive(Debug, Default)]
struct Read {
    pods: Vec<(String, Arc<PodNetwork>)>,
    members: Vec<(String, Arc<Members>)>,
}

impl Read {
    fn of(type_url: &str, added: &[Added]) -> Result<Self, String> {
        let mut read = Self::default();
        for it in added {
            read.add(type_url, &it.name, &it.bytes)?;
        }
        Ok(read)
    }

    fn add(&mut self, type_url: &str, name: &str, bytes: &[u8]) -> Result<(), String> {
        if type_url == PodNetwork::TYPE_URL {
            let pod = PodNetwork::decode(name, bytes).map_err(|e| e.to_string())?;
            self.pods.push((name.to_owned(), Arc::new(pod)));
        } else if type_url == Members::TYPE_URL {
            let group = Members::decode(name, bytes).map_err(|e| e.to_string())?;
            self.members.push((name.to_owned(), Arc::new(group)));
        } else {
            return Err(format!("{type_url} was not asked for"));
        }
        Ok(())
    }
}

fn confirmable(type_url: &str, name: &str) -> String {
    format!("{type_url} {name}")
}

impl Handler for Policy {
    fn apply(&mut self, update: Update) -> Result<(), String> {
        Self::apply(self, update)
    }

    fn connection(&mut self, connected: bool) {
        self.snapshot
            .send_modify(|snapshot| snapshot.connected = connected);
    }
}

/// Writes the snapshot when it has changed, until the node stops.
pub async fn keep(node: Arc<Node>) {
    let path = node.settings.state_dir.join(FILE);
    let mut changes = node.policy.watch();
    loop {
        let changed = node.stop.run_until_cancelled(changes.changed()).await;
        if changed.is_none() {
            return;
        }
        node.stop
            .run_until_cancelled(tokio::time::sleep(WRITE_PAUSE))
            .await;
        let bytes = encode(&changes.borrow_and_update());
        let path = path.clone();
        let written = tokio::task::spawn_blocking(move || write(&path, &bytes)).await;
        if let Ok(Err(error)) = written {
            tracing::error!(%error, "policy was not kept: a restart would begin with an older one");
        }
    }
}

/// Drops what the controller does not confirm, some time after it is back.
pub async fn confirm(node: Arc<Node>) {
    let mut changes = node.policy.watch();
    loop {
        let connected = changes.wait_for(|snapshot| snapshot.connected);
        match node.stop.run_until_cancelled(connected).await {
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return,
        }
        let lost = changes.wait_for(|snapshot| !snapshot.connected);
        let confirmed = tokio::select! {
            () = node.stop.cancelled() => return,
            _ = lost => false,
            () = tokio::time::sleep(CONFIRM_WITHIN) => true,
        };
        if confirmed {
            node.policy.drop_unconfirmed();
            node.policy_wanted.notify_one();
            return settle(&node).await;
        }
    }
}

/// Addresses that were the cluster's before this start, and that nobody confirmed, may be anybody's.
async fn settle(node: &Node) {
    if let Err(error) = node.datapath.settle().await {
        tracing::error!(%error, "addresses of the cluster from before the start may still stand");
    }
}

fn encode(snapshot: &Snapshot) -> Vec<u8> {
    let pods = snapshot
        .pods
        .iter()
        .map(|(name, pod)| pack(name, "", &**pod));
    let members = snapshot
        .members
        .iter()
        .map(|(name, group)| pack(name, "", &**group));
    let resources = pods.chain(members).collect();
    DeltaDiscoveryResponse {
        resources,
        ..DeltaDiscoveryResponse::default()
    }
    .encode_to_vec()
}

fn write(path: &PathBuf, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, bytes)?;
    fs::File::open(&new)?.sync_all()?;
    fs::rename(&new, path)
}

/// What of the file can be read: one entry that a newer agent wrote is no reason to lose the others.
fn read(path: &Path) -> io::Result<Snapshot> {
    let bytes = fs::read(path)?;
    let response = DeltaDiscoveryResponse::decode(&*bytes).map_err(io::Error::other)?;
    let mut read = Read::default();
    let mut snapshot = Snapshot::default();
    for resource in response.resources {
        let (name, body) = (resource.name, resource.resource.unwrap_or_default());
        match read.add(&body.type_url, &name, &body.value) {
            Ok(()) => {
                let confirmable = confirmable(&body.type_url, &name);
                snapshot.unconfirmed.insert(confirmable);
            }
            Err(error) => tracing::warn!(error, "left out of the last policy"),
        }
    }
    snapshot.pods.extend(read.pods);
    snapshot.members.extend(read.members);
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    use turnpike_rules::Identity;

    use super::*;

    fn pod(name: &str) -> PodNetwork {
        PodNetwork {
            uid: "u1".into(),
            namespace: "shop".into(),
            name: name.into(),
            identity: Identity::new("cluster.local", "shop", "web").unwrap(),
            capture: None,
            selected: true,
            inbound: Vec::new(),
        }
    }

    fn added(name: &str, bytes: Vec<u8>) -> Added {
        Added {
            name: name.into(),
            version: "1".into(),
            bytes,
        }
    }

    fn update(added: Vec<Added>, removed: &[&str]) -> Update {
        let removed = removed.iter().map(|name| (*name).to_owned()).collect();
        Update {
            type_url: PodNetwork::TYPE_URL.into(),
            added,
            removed,
        }
    }

    #[test]
    fn one_bad_resource_refuses_the_update_and_the_old_state_stays() {
        let folder = tempfile::tempdir().unwrap();
        let policy = Policy::load(folder.path());
        policy
            .apply(update(vec![added("c/shop/a", pod("a").encode())], &[]))
            .unwrap();
        let bad = update(
            vec![
                added("c/shop/b", pod("b").encode()),
                added("c/shop/x", vec![0xff; 9]),
            ],
            &["c/shop/a"],
        );
        assert!(policy.apply(bad).unwrap_err().contains("c/shop/x"));
        assert!(policy.pod("c/shop/a").is_some() && policy.pod("c/shop/b").is_none());
    }

    #[test]
    fn the_disk_speaks_until_the_controller_does() {
        let folder = tempfile::tempdir().unwrap();
        let policy = Policy::load(folder.path());
        let both = vec![
            added("c/shop/a", pod("a").encode()),
            added("c/shop/b", pod("b").encode()),
        ];
        policy.apply(update(both, &[])).unwrap();
        let bytes = encode(&policy.watch().borrow());
        write(&folder.path().join(FILE), &bytes).unwrap();

        let policy = Policy::load(folder.path());
        assert_eq!(*policy.pod("c/shop/a").unwrap(), pod("a"));
        policy
            .apply(update(vec![added("c/shop/b", pod("b").encode())], &[]))
            .unwrap();
        policy.drop_unconfirmed();
        assert!(policy.pod("c/shop/a").is_none() && policy.pod("c/shop/b").is_some());
    }

    #[test]
    fn what_is_heard_and_not_understood_is_kept_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let policy = Policy::load(folder.path());
        let three = ["a", "b", "c"].map(|it| added(&format!("c/shop/{it}"), pod(it).encode()));
        policy.apply(update(three.to_vec(), &[])).unwrap();
        let bytes = encode(&policy.watch().borrow());
        write(&folder.path().join(FILE), &bytes).unwrap();

        // The controller has become newer than this agent while it was away, and sends one pod in a
        // form that this agent must not guess at.
        let newer = turnpike_wire::mesh::PodNetwork {
            must_understand: vec!["next".into()],
            ..turnpike_wire::mesh::PodNetwork::from(&pod("a"))
        };
        let policy = Policy::load(folder.path());
        let refused = update(vec![added("c/shop/a", newer.encode_to_vec())], &[]);
        let reason = policy.apply(refused).unwrap_err();
        assert!(
            reason.contains("c/shop/a") && reason.contains("`next`"),
            "{reason}"
        );
        let known = update(vec![added("c/shop/b", pod("b").encode())], &[]);
        policy.apply(known).unwrap();
        policy.drop_unconfirmed();
        assert_eq!(*policy.pod("c/shop/a").unwrap(), pod("a"));
        assert!(policy.pod("c/shop/b").is_some());
        assert!(policy.pod("c/shop/c").is_none(), "nobody spoke of it");
    }

    #[test]
    fn one_unreadable_entry_on_disk_does_not_take_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let mut strange = pack("c/shop/a", "", &pod("a"));
        strange.resource.as_mut().unwrap().value = vec![0xff; 9];
        let response = DeltaDiscoveryResponse {
            resources: vec![strange, pack("c/shop/b", "", &pod("b"))],
            ..DeltaDiscoveryResponse::default()
        };
        write(&folder.path().join(FILE), &response.encode_to_vec()).unwrap();
        let policy = Policy::load(folder.path());
        assert!(policy.pod("c/shop/a").is_none() && policy.pod("c/shop/b").is_some());
    }

    #[test]
    fn a_damaged_snapshot_is_no_reason_not_to_start() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), [0xff; 40]).unwrap();
        assert_eq!(
            Policy::load(folder.path()).watch().borrow().pods().count(),
            0
        );
    }
}
