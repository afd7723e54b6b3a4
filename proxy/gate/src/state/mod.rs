//! What the gate knows of its node: who has which address, and what each may reach.
//!
//! One owner puts together what the agent's feed and the controller say and publishes it as an
//! immutable [`View`]; everything that judges reads the current one. What is not known is refused.

mod pod;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::{sync::watch, time::timeout};
use turnpike_ledger::record;
use turnpike_rules::pod::{Members, PodEgress};

pub use self::pod::{Answer, Pod, PodLimits, PodRuntime};

/// Pods that went and are still known by name.
const DEPARTED: usize = 256;

/// What is known at one moment. Never changed once published.
#[derive(Clone, Debug, Default)]
pub struct View {
    pods: HashMap<IpAddr, Arc<Pod>>,
    /// Pods that went, latest last: their last packets may be told late.
    departed: VecDeque<Arc<Pod>>,
    /// By `namespace/name`.
    policies: HashMap<String, Arc<PodEgress>>,
    members: HashSet<IpAddr>,
    services: Vec<IpNet>,
    pub feed_synced: bool,
    pub policies_known: bool,
}

/// Where a source address stands.
#[derive(Clone, Debug)]
pub enum Standing {
    /// No pod of this node has the address.
    Unknown,
    /// A pod, but what it may reach is not known (yet).
    NoPolicy(Arc<Pod>),
    /// Neither the agent nor the controller says that a policy selects it.
    Unselected(Arc<Pod>),
    Selected(Arc<Pod>, Arc<PodEgress>),
}

impl Standing {
    pub fn pod(&self) -> Option<&Arc<Pod>> {
        match self {
            Self::Unknown => None,
            Self::NoPolicy(pod) | Self::Unselected(pod) | Self::Selected(pod, _) => Some(pod),
        }
    }

    /// The pod as records name it.
    pub fn recorded(&self) -> Option<record::Pod> {
        let identity = match self {
            Self::Selected(_, egress) => Some(egress.identity.to_string()),
            _ => None,
        };
        self.pod().map(|pod| record::Pod {
            uid: pod.uid.to_string(),
            namespace: pod.namespace.to_string(),
            name: pod.name.to_string(),
            identity,
        })
    }
}

impl View {
    /// Who calls from `address`, and by which policy.
    pub fn standing(&self, address: IpAddr) -> Standing {
        match self.pods.get(&address) {
            Some(pod) => self.standing_of(pod.clone()),
            None => Standing::Unknown,
        }
    }

    /// Who sent a packet that the node's rules refused: the pod of the container on whose veth it
    /// came in, or where that is not known, the one that has or had its source address.
    pub fn sender(&self, container_id: &str, source: IpAddr) -> Standing {
        let departed = || self.departed.iter().rev();
        let found = if container_id.is_empty() {
            let had = |pod: &&Arc<Pod>| pod.addresses.contains(&source);
            self.pods.get(&source).or_else(|| departed().find(had))
        } else {
            let is_its = |pod: &&Arc<Pod>| *pod.container_id == *container_id;
            let living = self.pods.values().find(is_its);
            living.or_else(|| departed().find(is_its))
        };
        match found {
            Some(pod) => self.standing_of(pod.clone()),
            None => Standing::Unknown,
        }
    }

    fn standing_of(&self, pod: Arc<Pod>) -> Standing {
        let policy = self
            .policies
            .get(&format!("{}/{}", pod.namespace, pod.name));
        // A name is used again by the next pod of a StatefulSet; the policy must be this one's.
        let policy = policy.filter(|egress| pod.uid.is_empty() || egress.uid == pod.uid);
        match policy {
            Some(egress) if !egress.policies.is_empty() => Standing::Selected(pod, egress.clone()),
            _ if !pod.selected => Standing::Unselected(pod),
            _ => Standing::NoPolicy(pod),
        }
    }

    /// Pod addresses and Services of this cluster: never a destination of the gate.
    pub fn is_cluster(&self, address: IpAddr) -> bool {
        self.members.contains(&address) || self.services.iter().any(|net| net.contains(&address))
    }

    pub fn ready(&self) -> bool {
        self.feed_synced && self.policies_known
    }

    /// Ready, and the policy of each pod that the agent knows to be selected has come.
    pub fn is_complete(&self) -> bool {
        let waits = |pod: &Arc<Pod>| matches!(self.standing_of(pod.clone()), Standing::NoPolicy(_));
        self.ready() && !self.pods.values().any(waits)
    }

    pub fn pods(&self) -> usize {
        self.pods
            .values()
            .map(|pod| &pod.uid)
            .collect::<HashSet<_>>()
            .len()
    }
}

/// One change of what is known.
#[derive(Clone, Debug)]
pub enum Change {
    PodAdded(PodInfo),
    PodRemoved {
        container_id: String,
        addresses: Vec<IpAddr>,
    },
    /// The feed begins anew: what it does not repeat before `FeedSynced` is gone.
    FeedStarted,
    FeedSynced,
    /// By `namespace/name`.
    Policies {
        added: Vec<PodEgress>,
        removed: Vec<String>,
    },
    /// By resource name.
    Members {
        added: Vec<(String, Members)>,
        removed: Vec<String>,
    },
    /// The controller is there, or a snapshot of what it said was read.
    PoliciesKnown,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodInfo {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub container_id: String,
    pub addresses: Vec<IpAddr>,
    pub selected: bool,
}

/// The readers' end.
#[derive(Clone, Debug)]
pub struct State {
    view: Arc<ArcSwap<View>>,
    generation: watch::Receiver<u64>,
}

impl State {
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Returns once the view is complete, or after `patience`: one policy that never comes must
    /// not keep all pods waiting.
    pub async fn completed(self, patience: Duration) {
        let mut changes = self.changes();
        let complete = changes.wait_for(|_| self.view().is_complete());
        if timeout(patience, complete).await.is_err() {
            tracing::warn!(
                ?patience,
                "not all pods of the node and their policies are known: the others are refused"
            );
        }
    }

    /// Changes each time a new view is published.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.generation.clone()
    }
}

/// The writer's end; there is one.
#[derive(Debug)]
pub struct Owner {
    inner: Mutex<Inner>,
    view: Arc<ArcSwap<View>>,
    generation: watch::Sender<u64>,
    limits: PodLimits,
}

#[derive(Debug, Default)]
struct Inner {
    view: View,
    members: BTreeMap<String, Members>,
    /// By pod uid: answers given before a restart, until the feed names the pod.
    answers: HashMap<String, Vec<Answer>>,
    /// Addresses that the running start of the feed has repeated; None when it is not starting.
    repeated: Option<HashSet<IpAddr>>,
}

impl Owner {
    pub fn new(limits: PodLimits) -> (Arc<Self>, State) {
        let view = Arc::new(ArcSwap::from_pointee(View::default()));
        let (generation, receiver) = watch::channel(0);
        let state = State {
            view: view.clone(),
            generation: receiver,
        };
        (
            Arc::new(Self {
                inner: Mutex::default(),
                view,
                generation,
                limits,
            }),
            state,
        )
    }

    /// Gives back to pods, by uid, what they were answered before a restart.
    pub fn remember(&self, answers: HashMap<String, Vec<Answer>>) {
        self.inner.lock().answers = answers;
    }

    /// Takes one change; readers see it when this returns.
    pub fn apply(&self, change: Change) {
        let mut inner = self.inner.lock();
        match change {
            Change::PodAdded(info) => inner.add_pod(info, &self.limits),
            Change::PodRemoved {
                container_id,
                addresses,
            } => {
                inner.remove_pod(&container_id, &addresses);
            }
            Change::FeedStarted => inner.repeated = Some(HashSet::new()),
            Change::FeedSynced => inner.feed_synced(),
            Change::Policies { added, removed } => {
                for name in removed {
                    inner.view.policies.remove(&name);
                }
                for egress in added {
                    let name = format!("{}/{}", egress.namespace, egress.name);
                    inner.view.policies.insert(name, Arc::new(egress));
                }
            }
            Change::Members { added, removed } => {
                for name in removed {
                    inner.members.remove(&name);
                }
                inner.members.extend(added);
                inner.join_members();
            }
            Change::PoliciesKnown => inner.view.policies_known = true,
        }
        self.view.store(Arc::new(inner.view.clone()));
        drop(inner);
        self.generation.send_modify(|generation| *generation += 1);
    }
}

impl Inner {
    fn add_pod(&mut self, info: PodInfo, limits: &PodLimits) {
        let PodInfo {
            uid,
            namespace,
            name,
            container_id,
            addresses,
            selected,
        } = info;
        let same = |pod: &&Arc<Pod>| {
            *pod.uid == *uid && *pod.container_id == *container_id && pod.addresses == addresses
        };
        let known = addresses
            .iter()
            .filter_map(|a| self.view.pods.get(a))
            .find(same);
        let known = known.map(|pod| pod.runtime.clone());
        let runtime = known.unwrap_or_else(|| {
            let runtime = PodRuntime::new(limits);
            runtime.recall(self.answers.remove(&uid).unwrap_or_default());
            runtime
        });
        let pod = Arc::new(Pod {
            uid: uid.into(),
            namespace: namespace.into(),
            name: name.into(),
            container_id: container_id.into(),
            addresses,
            selected,
            runtime,
        });
        for address in &pod.addresses {
            self.view.pods.insert(*address, pod.clone());
            if let Some(repeated) = &mut self.repeated {
                repeated.insert(*address);
            }
        }
    }

    /// A late removal of an earlier owner leaves the new owner of an address alone.
    fn remove_pod(&mut self, container_id: &str, addresses: &[IpAddr]) {
        for address in addresses {
            let owner = self.view.pods.get(address);
            if owner.is_some_and(|pod| *pod.container_id == *container_id)
                && let Some(pod) = self.view.pods.remove(address)
            {
                self.depart(pod);
            }
        }
    }

    fn depart(&mut self, pod: Arc<Pod>) {
        let departed = &mut self.view.departed;
        if departed.back().is_none_or(|last| !Arc::ptr_eq(last, &pod)) {
            departed.push_back(pod);
        }
        if departed.len() > DEPARTED {
            departed.pop_front();
        }
    }

    fn feed_synced(&mut self) {
        if let Some(repeated) = self.repeated.take() {
            let gone = |address: &IpAddr, _: &mut Arc<Pod>| !repeated.contains(address);
            let gone: Vec<_> = self.view.pods.extract_if(gone).collect();
            for (_, pod) in gone {
                self.depart(pod);
            }
        }
        self.view.feed_synced = true;
    }

    fn join_members(&mut self) {
        let addresses = self
            .members
            .values()
            .flat_map(|members| members.addresses.clone());
        self.view.members = addresses.collect();
        let services = self
            .members
            .values()
            .flat_map(|members| members.services.clone());
        self.view.services = services.collect();
    }
}

#[cfg(test)]
mod tests;
