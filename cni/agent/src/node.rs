//! What all parts of the agent share.

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, atomic::AtomicU32},
};

use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use turnpike_datapath::{Datapath, Found, PodKey, PodPlan};
use turnpike_ipam::{Attachment, Eni, Holder, Lease, Live, Moment, PodRef, Store};
use turnpike_rules::pod::PodNetwork;

use crate::{
    clock::Clock,
    config::Settings,
    feed::Feed,
    flight::Flights,
    identity::Identity,
    install::Standing,
    metrics::Metrics,
    note::{Enforced, Note},
    policy::Policy,
    tombstones::Tombstones,
};

/// ADDs at once. One more is told to try again: kubelet starts far fewer, and each may wait for
/// policy and for an address.
pub const ADDS: usize = 256;

/// The node. One, behind an `Arc`, for as long as the process lives.
#[derive(Debug)]
pub struct Node {
    pub settings: Settings,
    pub clock: Clock,
    pub identity: Identity,
    pub store: Store,
    pub datapath: Datapath,
    pub policy: Policy,
    pub feed: Feed,
    pub metrics: Metrics,
    pub flights: Flights,
    pub tombstones: Tombstones,
    pub adds: Semaphore,
    /// ADDs that wait for an address.
    pub parked: AtomicU32,
    /// EC2 has been heard, and an interface is there to serve pods from.
    pub warmed: watch::Sender<bool>,
    /// Whether the container runtime calls us.
    pub installed: watch::Sender<Standing>,
    /// Wakes the loop that keeps the pool warm.
    pub pool_wanted: Notify,
    /// Wakes the task that carries policy to running pods.
    pub policy_wanted: Notify,
    /// Wakes the task that looks for refused packets that were not logged.
    pub denials_seen: Notify,
    /// Operations that must end even if their caller goes away.
    pub work: TaskTracker,
    pub stop: CancellationToken,
}

/// The parts that are made before the node is.
#[derive(Debug)]
pub struct Parts {
    pub settings: Settings,
    pub clock: Clock,
    pub identity: Identity,
    pub store: Store,
    pub datapath: Datapath,
    pub policy: Policy,
    pub tombstones: Tombstones,
    pub stop: CancellationToken,
}

impl Node {
    pub fn new(parts: Parts) -> Arc<Self> {
        let Parts {
            settings,
            clock,
            identity,
            store,
            datapath,
            policy,
            tombstones,
            stop,
        } = parts;
        let installed = match &settings.install {
            Some(_) => Standing::Pending,
            None => Standing::Fine,
        };
        Arc::new(Self {
            settings,
            clock,
            identity,
            store,
            datapath,
            policy,
            feed: Feed::default(),
            metrics: Metrics::default(),
            flights: Flights::default(),
            tombstones,
            adds: Semaphore::new(ADDS),
            parked: AtomicU32::new(0),
            warmed: watch::Sender::new(false),
            installed: watch::Sender::new(installed),
            pool_wanted: Notify::new(),
            policy_wanted: Notify::new(),
            denials_seen: Notify::new(),
            work: TaskTracker::new(),
            stop,
        })
    }

    pub fn now(&self) -> Moment {
        self.clock.now()
    }

    /// Pods of these namespaces start before the control plane has spoken of them: it may be one
    /// of them.
    pub fn is_exempt(&self, namespace: &str) -> bool {
        self.settings
            .exempt_namespaces
            .iter()
            .any(|exempt| exempt == namespace)
    }

    /// The policy of this very pod: not of a former one of the same name.
    pub fn policy_of(&self, pod: &PodRef) -> Option<Arc<PodNetwork>> {
        let network = self.policy.pod(&self.resource_name(pod))?;
        (pod.uid.is_empty() || *pod.uid == *network.uid).then_some(network)
    }

    pub fn resource_name(&self, pod: &PodRef) -> String {
        turnpike_wire::names::pod(&self.settings.cluster, &pod.namespace, &pod.name)
    }

    pub fn lease_of(&self, attachment: &Attachment) -> Option<Lease> {
        self.store.read(|pool| pool.lease_of(attachment).cloned())
    }

    pub fn leases(&self) -> Vec<Lease> {
        self.store.read(|pool| pool.leases().cloned().collect())
    }

    /// A pod's network, as it is to be.
    pub fn plan(&self, lease: &Lease, enforced: &Enforced) -> PodPlan {
        let Holder {
            attachment,
            pod,
            netns,
            ..
        } = &lease.holder;
        let eni = self
            .store
            .read(|pool| pool.enis().find(|eni| eni.id == lease.eni).cloned());
        PodPlan {
            pod: PodKey {
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
            },
            container_id: attachment.container_id.clone(),
            netns: PathBuf::from(netns),
            ifname: attachment.ifname.clone(),
            addresses: vec![IpAddr::V4(lease.address)],
            mtu: self.settings.pod_mtu,
            table: eni.filter(|eni| !eni.is_primary()).map(|eni| table(&eni)),
            node: vec![IpAddr::V4(self.identity.instance.address)],
            capture: enforced.capture.clone(),
            policy: enforced.policy.clone(),
        }
    }

    /// What the kernel's pod links say of who is alive. A link that no lease explains keeps its
    /// addresses out of everybody's hands all the same.
    pub fn live(&self, found: &[Found]) -> Vec<Live> {
        let leases = self.leases();
        found
            .iter()
            .flat_map(|found| live_of(found, &leases))
            .collect()
    }

    /// Tells the gate of a pod, or of its new policy.
    pub fn announce(&self, lease: &Lease, enforced: &Enforced) {
        let Holder {
            attachment, pod, ..
        } = &lease.holder;
        let uid = if pod.uid.is_empty() {
            &enforced.uid
        } else {
            &pod.uid
        };
        self.feed.added(
            attachment,
            turnpike_wire::node::LocalPod {
                uid: uid.clone(),
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
                service_account: enforced.service_account.clone(),
                container_id: attachment.container_id.clone(),
                addresses: vec![lease.address.octets().to_vec()],
                selected: enforced.policy.selected,
            },
        );
    }

    pub fn is_warm(&self) -> bool {
        *self.warmed.borrow()
    }

    /// Comes back once [`is_warm`](Self::is_warm).
    pub async fn warm(&self) {
        // Its sender lives as long as `self`.
        self.warmed.subscribe().wait_for(|warm| *warm).await.ok();
    }

    /// Why an ADD would not be served, or not come here; None: it would.
    pub fn unready(&self) -> Option<String> {
        if !self.is_warm() {
            return Some("no interface of EC2 is known yet".to_owned());
        }
        match &*self.installed.borrow() {
            Standing::Fine => None,
            Standing::Pending => Some("the CNI configuration is not installed yet".to_owned()),
            Standing::Hindered(why) => Some(why.clone()),
        }
    }
}

/// The routing table of a secondary interface, as the AWS CNI numbers them.
pub fn table(eni: &Eni) -> u32 {
    eni.device_index + 1
}

/// How the datapath lays a secondary interface; None for the primary one, which the operating
/// system configures, and for one with a MAC address that is none.
pub fn datapath_eni(eni: &Eni, mtu: u32) -> Option<turnpike_datapath::Eni> {
    if eni.is_primary() {
        return None;
    }
    Some(turnpike_datapath::Eni {
        mac: eni.mac.parse().ok()?,
        table: table(eni),
        address: eni.primary,
        // The subnet's router has its first address, by AWS's rule.
        gateway: std::net::Ipv4Addr::from(u32::from(eni.subnet.network()) + 1),
        gateway6: None,
        mtu,
    })
}

/// The note beside a lease whose ADD has come to its end.
pub fn note_of(lease: &Lease) -> Option<Note> {
    lease.note.as_deref().and_then(Note::read)
}

fn live_of(found: &Found, leases: &[Lease]) -> Vec<Live> {
    let v4 = found.addresses.iter().filter_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    let of_container = |lease: &&Lease| {
        found.container_id.as_deref() == Some(&*lease.holder.attachment.container_id)
    };
    v4.map(|address| {
        let lease = leases
            .iter()
            .filter(of_container)
            .find(|lease| lease.address == address);
        let holder = lease.map_or_else(|| stranger(found), |lease| lease.holder.clone());
        Live { address, holder }
    })
    .collect()
}

/// Holder of a link that no lease explains: the journal was lost, or somebody else made it.
fn stranger(found: &Found) -> Holder {
    let container_id = found
        .container_id
        .clone()
        .unwrap_or_else(|| format!("unknown:{}", found.host_interface));
    Holder {
        attachment: Attachment {
            container_id,
            ifname: "eth0".to_owned(),
        },
        network: String::new(),
        pod: PodRef::default(),
        netns: String::new(),
    }
}
