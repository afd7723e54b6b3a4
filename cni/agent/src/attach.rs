//! ADD, DEL, CHECK and GC of one attachment, whole or not at all.
//!
//! The order within an ADD: policy, address, then the lease's commit and the datapath at the same
//! time, then the note that makes a restart take the pod over; only then is it acknowledged. A
//! process killed anywhere before leaves a lease without a note, which the next start undoes. The
//! order within a DEL: datapath, gate, lease; the address cools when nothing uses it any more.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};
use turnpike_datapath::{Applied, ApplyError, Error as DatapathError, Removal};
use turnpike_ipam::{Attachment, Holder, Lease, NotRecorded, PodRef, Recording};
use turnpike_wire::node::{AddReply, AddRequest};

use crate::{
    flight::Turn,
    node::{Node, note_of},
    note::{Enforced, Note},
    tombstones,
};

pub const GATEWAY: &str = "169.254.1.1";
/// Between looks for an address, besides those that a change of the pool causes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Why an operation failed, a variant for each thing that the runtime does about it.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("{what} is missing or malformed: {hint}")]
    Invalid {
        what: &'static str,
        hint: &'static str,
    },
    #[error(
        "pod {namespace}/{name}: its network policy has not come from the control plane within \
         {waited:?} ({link}); a pod is never started without it. Try again later"
    )]
    PolicyMissing {
        namespace: String,
        name: String,
        waited: Duration,
        link: &'static str,
    },
    #[error(
        "no address became free on this node within {waited:?} ({leased} leased, {cooling} cooling \
         down, {total} of at most {max} held). Try again later"
    )]
    NoAddress {
        waited: Duration,
        leased: u32,
        cooling: u32,
        total: u32,
        max: u32,
    },
    #[error("more than {0} ADDs at once. Try again later")]
    Busy(usize),
    #[error("called off: a DEL for the same attachment came, or the agent stops")]
    CalledOff,
    #[error("{0}; the ADD was undone")]
    NotRecorded(#[from] NotRecorded),
    #[error("the pod's network was not built: {0}")]
    Datapath(#[from] ApplyError),
    #[error(
        "an earlier DEL of attachment {0} is not done yet; it would end this ADD's network. Try again later"
    )]
    Undeleted(Attachment),
    #[error("attachment {0} is not known: it was never added, or deleted")]
    Unknown(Attachment),
    #[error("differs from what was set up: {}", .0.join("; "))]
    Differs(Vec<String>),
    #[error("cannot be checked: {0}")]
    Uncheckable(DatapathError),
}

/// What an ADD or a CHECK names, checked.
pub fn holder(request: &AddRequest) -> Result<Holder, AttachError> {
    let missing = |what, hint| Err(AttachError::Invalid { what, hint });
    let AddRequest {
        container_id,
        netns,
        ifname,
        network,
        pod_namespace,
        pod_name,
        pod_uid,
    } = request;
    if container_id.is_empty() || container_id.len() > 255 {
        return missing("CNI_CONTAINERID", "1 to 255 characters");
    }
    if ifname.is_empty() || ifname.len() > 15 {
        return missing("CNI_IFNAME", "1 to 15 characters");
    }
    if !netns.starts_with('/') {
        return missing(
            "CNI_NETNS",
            "the absolute path of the pod's network namespace",
        );
    }
    if pod_namespace.is_empty() || pod_name.is_empty() {
        return missing(
            "K8S_POD_NAMESPACE or K8S_POD_NAME",
            "the runtime says them in CNI_ARGS",
        );
    }
    Ok(Holder {
        attachment: Attachment {
            container_id: container_id.clone(),
            ifname: ifname.clone(),
        },
        network: network.clone(),
        pod: PodRef {
            namespace: pod_namespace.clone(),
            name: pod_name.clone(),
            uid: pod_uid.clone(),
        },
        netns: netns.clone(),
    })
}

/// Gives the attachment its network. The same request again gives the same answer.
pub async fn add(node: &Arc<Node>, request: &AddRequest) -> Result<AddReply, AttachError> {
    let holder = holder(request)?;
    let Ok(_permit) = node.adds.try_acquire() else {
        return Err(AttachError::Busy(crate::node::ADDS));
    };
    let turn = node.flights.begin(&holder.attachment).await;
    // A DEL of an earlier life still to be done: now, not when this one is up.
    let tombstone = node.tombstones.of(&holder.attachment);
    if !tombstones::fulfil(&tombstone, detach(node, &holder.attachment)).await {
        return Err(AttachError::Undeleted(holder.attachment));
    }
    if let Some(reply) = repeated(node, &holder).await {
        return Ok(reply);
    }
    let enforced = policy(node, &holder.pod, &turn).await?;
    let (lease, recording) = address(node, &holder, &turn).await?;
    node.announce(&lease, &enforced);
    let applied = build(node, &lease, &enforced, recording, &turn).await?;
    node.store.confirm(&holder.attachment);
    // Policy may have changed while the pod was built.
    node.policy_wanted.notify_one();
    Ok(reply(&lease, &applied))
}

/// The answer to an ADD that was answered before, if what it built still stands. What does not
/// stand is taken down, to be built anew, and so is what nobody can tell of.
async fn repeated(node: &Node, holder: &Holder) -> Option<AddReply> {
    let lease = node.lease_of(&holder.attachment)?;
    let Some(note) = note_of(&lease) else {
        detach(node, &holder.attachment).await;
        return None;
    };
    let plan = node.plan(&lease, &note.enforced);
    let same = lease.holder.netns == holder.netns && lease.holder.pod == holder.pod;
    match node.datapath.check(&plan, &note.applied).await {
        Ok(differences) if same && differences.is_empty() => {
            return Some(reply(&lease, &note.applied));
        }
        Ok(differences) => {
            tracing::warn!(attachment = %holder.attachment, ?differences, "built again");
        }
        Err(error) => tracing::warn!(attachment = %holder.attachment, %error, "built again"),
    }
    detach(node, &holder.attachment).await;
    None
}

/// The pod's policy, from the cache or as soon as it comes.
async fn policy(node: &Node, pod: &PodRef, turn: &Turn) -> Result<Enforced, AttachError> {
    if let Some(network) = node.policy_of(pod) {
        return Ok(Enforced::from(&*network));
    }
    if node.is_exempt(&pod.namespace) {
        return Ok(Enforced::default());
    }
    let waited = node.settings.policy_wait;
    let mut changes = node.policy.watch();
    let comes = async {
        loop {
            changes.borrow_and_update();
            if let Some(network) = node.policy_of(pod) {
                return Some(Enforced::from(&*network));
            }
            changes.changed().await.ok()?;
        }
    };
    tokio::select! {
        Some(enforced) = comes => Ok(enforced),
        () = called_off(node, turn) => Err(AttachError::CalledOff),
        () = tokio::time::sleep(waited) => Err(policy_missing(node, pod, waited)),
    }
}

fn policy_missing(node: &Node, pod: &PodRef, waited: Duration) -> AttachError {
    let connected = node.policy.watch().borrow().connected;
    let link = match (connected, node.policy.pod(&node.resource_name(pod))) {
        (_, Some(_)) => "only that of a former pod of the same name is known",
        (true, None) => "the controller is connected, but does not know the pod yet",
        (false, None) => "there is no connection to the controller",
    };
    let (namespace, name) = (pod.namespace.clone(), pod.name.clone());
    AttachError::PolicyMissing {
        namespace,
        name,
        waited,
        link,
    }
}

async fn called_off(node: &Node, turn: &Turn) {
    tokio::select! {
        () = turn.called_off.cancelled() => {}
        () = node.stop.cancelled() => {}
    }
}

/// An address; on an empty pool the ADD is parked until one comes.
async fn address(
    node: &Node,
    holder: &Holder,
    turn: &Turn,
) -> Result<(Lease, Recording), AttachError> {
    let mut changes = node.store.changes();
    let waited = node.settings.address_wait;
    let deadline = Instant::now() + waited;
    let mut parked = None;
    loop {
        changes.borrow_and_update();
        let now = node.now();
        let full = match node.store.lease(holder.clone(), now) {
            Ok(leased) => return Ok(leased),
            Err(full) => full,
        };
        if parked.is_none() {
            node.metrics.no_address.inc();
            parked = Some(Parked::new(node));
        }
        let cooled = full.cooled_at.map_or(LOOK_AGAIN, |at| at.since(now));
        let look = (Instant::now() + cooled.min(LOOK_AGAIN)).min(deadline);
        tokio::select! {
            _ = changes.changed() => {}
            () = sleep_until(look) => {}
            () = called_off(node, turn) => return Err(AttachError::CalledOff),
        }
        if Instant::now() >= deadline {
            let counts = node.store.read(|pool| pool.counts(node.now()));
            return Err(AttachError::NoAddress {
                waited,
                leased: counts.leased,
                cooling: counts.cooling,
                total: counts.total,
                max: counts.max_addresses,
            });
        }
    }
}

/// Counts an ADD that waits for an address, so that the pool is made to grow for it.
struct Parked<'a>(&'a Node);

impl<'a> Parked<'a> {
    fn new(node: &'a Node) -> Self {
        node.parked.fetch_add(1, Ordering::Relaxed);
        node.pool_wanted.notify_one();
        Self(node)
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.0.parked.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Commit and datapath at the same time, then the note. On any failure both are gone again.
async fn build(
    node: &Node,
    lease: &Lease,
    enforced: &Enforced,
    recording: Recording,
    turn: &Turn,
) -> Result<Applied, AttachError> {
    let attachment = &lease.holder.attachment;
    let (recorded, applied) = tokio::join!(recording.done(), apply(node, lease, enforced, turn));
    let (applied, failure) = match (recorded, applied) {
        (Ok(()), Ok(applied)) => {
            let note = Note {
                applied: applied.clone(),
                enforced: enforced.clone(),
            };
            match node.store.note(attachment, note.write()).await {
                Ok(()) => return Ok(applied),
                Err(error) => (Some(applied), error.into()),
            }
        }
        (Err(error), applied) => (applied.ok(), error.into()),
        (Ok(()), Err(error)) => (None, error),
    };
    roll_back(node, attachment, applied.as_ref(), &failure).await;
    Err(failure)
}

async fn roll_back(
    node: &Node,
    attachment: &Attachment,
    applied: Option<&Applied>,
    failure: &AttachError,
) {
    node.feed.removed(attachment);
    let left_behind = matches!(failure, AttachError::Datapath(error) if !error.undo.is_empty());
    let clean = match applied {
        Some(applied) => remove(node, attachment, applied.into()).await,
        None if left_behind => later(node, attachment),
        None => true,
    };
    if clean {
        node.store.undo(attachment).await;
    }
}

/// The datapath's plan. Where an older sandbox of the same pod stands in the way, it goes first:
/// the runtime makes a new one only when it has given the old one up.
async fn apply(
    node: &Node,
    lease: &Lease,
    enforced: &Enforced,
    turn: &Turn,
) -> Result<Applied, AttachError> {
    let plan = node.plan(lease, enforced);
    let error = match node.datapath.apply(&plan).await {
        Ok(applied) => return Ok(applied),
        Err(error) => error,
    };
    let DatapathError::Occupied {
        interface,
        container_id,
    } = &error.cause
    else {
        return Err(error.into());
    };
    tracing::info!(%interface, ?container_id, pod = ?plan.pod, "an older sandbox is in the way");
    let older = node
        .leases()
        .into_iter()
        .map(|it| it.holder.attachment)
        .find(|it| {
            Some(&it.container_id) == container_id.as_ref() && *it != lease.holder.attachment
        });
    match older {
        Some(older) => {
            // That one may be waiting for this: whoever is called off gives way.
            let _turn = tokio::select! {
                turn = node.flights.end(&older) => turn,
                () = called_off(node, turn) => return Err(AttachError::CalledOff),
            };
            detach(node, &older).await;
        }
        // Nobody holds a lease for it, so nobody was told that it is there.
        None if container_id.as_ref() != Some(&plan.container_id) => {
            let found = node.datapath.list().await.unwrap_or_default();
            for found in found
                .iter()
                .filter(|found| found.host_interface == *interface)
            {
                remove(node, &lease.holder.attachment, found.into()).await;
            }
        }
        None => return Err(error.into()),
    }
    Ok(node.datapath.apply(&plan).await?)
}

fn reply(lease: &Lease, applied: &Applied) -> AddReply {
    AddReply {
        address: format!("{}/32", lease.address),
        gateway: GATEWAY.to_owned(),
        host_interface: applied.host_interface.clone(),
        host_mac: applied.host_mac.to_string(),
        pod_mac: applied.pod_mac.to_string(),
        mtu: applied.mtu,
    }
}

/// Takes the attachment's network away. Never fails: what the kernel refuses now is tried again,
/// and until then its address is nobody's.
pub async fn del(node: &Arc<Node>, attachment: &Attachment) {
    let _turn = node.flights.end(attachment).await;
    detach(node, attachment).await;
}

/// True if it is all gone; what is not, a tombstone tells. The caller has the attachment's turn.
pub(crate) async fn detach(node: &Node, attachment: &Attachment) -> bool {
    let lease = node.lease_of(attachment);
    node.feed.removed(attachment);
    let removals = match lease.as_ref().and_then(note_of) {
        Some(note) => vec![Removal::from(&note.applied)],
        None => match strays(node, attachment).await {
            Ok(removals) => removals,
            Err(error) => {
                tracing::error!(%attachment, %error, "pod links cannot be listed");
                return later(node, attachment);
            }
        },
    };
    for removal in removals {
        if !remove(node, attachment, removal).await {
            return false;
        }
    }
    if lease.is_some() {
        node.store.release(attachment, node.now()).await;
        node.pool_wanted.notify_one();
    }
    true
}

/// Links of the attachment's container that no note tells of.
async fn strays(node: &Node, attachment: &Attachment) -> Result<Vec<Removal>, DatapathError> {
    let id = &attachment.container_id;
    let others = node
        .leases()
        .into_iter()
        .map(|lease| lease.holder.attachment);
    if others
        .into_iter()
        .any(|other| other.container_id == *id && other != *attachment)
    {
        return Ok(Vec::new());
    }
    let found = node.datapath.list().await?;
    let of_container = found
        .iter()
        .filter(|found| found.container_id.as_ref() == Some(id));
    Ok(of_container.map(Removal::from).collect())
}

/// True if it is gone. Otherwise a tombstone says that it must still go.
async fn remove(node: &Node, attachment: &Attachment, removal: Removal) -> bool {
    match node.datapath.remove(removal).await {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(%attachment, %error, "a pod's network is not all gone; tried again later");
            later(node, attachment)
        }
    }
}

fn later(node: &Node, attachment: &Attachment) -> bool {
    node.metrics.errors.inc();
    if let Err(error) = node.tombstones.leave(attachment) {
        tracing::error!(%attachment, %error, "no tombstone: the next start will find it");
    }
    false
}

/// Compares what is with what was set up. Returns the pod's address.
pub async fn check(node: &Arc<Node>, request: &AddRequest) -> Result<Ipv4Addr, AttachError> {
    let Holder {
        attachment, netns, ..
    } = holder(request)?;
    let _turn = node.flights.begin(&attachment).await;
    let found = node
        .lease_of(&attachment)
        .and_then(|lease| Some((note_of(&lease)?, lease)));
    let Some((note, mut lease)) = found else {
        return Err(AttachError::Unknown(attachment));
    };
    if lease.holder.is_stranger() {
        lease.holder.netns = netns;
    }
    let plan = node.plan(&lease, &note.enforced);
    match node.datapath.check(&plan, &note.applied).await {
        Ok(differences) if differences.is_empty() => Ok(lease.address),
        Ok(differences) => Err(AttachError::Differs(differences)),
        Err(error) => Err(AttachError::Uncheckable(error)),
    }
}

/// Removes every attachment of the network that is not among the valid ones. Returns how many.
pub async fn collect(node: &Arc<Node>, network: &str, valid: &BTreeSet<Attachment>) -> u32 {
    let stale: Vec<_> = node
        .leases()
        .into_iter()
        .filter(|lease| lease.holder.network == network)
        .map(|lease| lease.holder.attachment)
        .filter(|attachment| !valid.contains(attachment))
        .collect();
    let mut removed = 0;
    for attachment in &stale {
        tracing::info!(%attachment, "collected: the runtime does not know it any more");
        del(node, attachment).await;
        removed += u32::from(node.lease_of(attachment).is_none());
    }
    removed
}
