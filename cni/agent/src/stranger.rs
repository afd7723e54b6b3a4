//! Pods that run and of which the record tells too little: the journal was lost or damaged, or another
//! version wrote it.
//!
//! Such a pod keeps its link, its address and the rules that stood. The gate does not know it, so one
//! that a policy selects gets nothing through the door, until the control plane has named the pod: then
//! its note is written anew, from the kernel and from its policy, and it is a pod like the others.

use std::sync::Arc;

use turnpike_datapath::{Applied, Error, Found, PodKey};
use turnpike_ipam::{Lease, PodRef};
use turnpike_rules::pod::PodNetwork;

use crate::{
    node::{Node, note_of},
    note::{Enforced, Note},
};

fn is_stranger(lease: &Lease) -> bool {
    note_of(lease).is_none() && (lease.holder.is_stranger() || lease.note.is_some())
}

/// Says which pods are strangers.
pub fn report(node: &Node) {
    for lease in node.leases().iter().filter(|lease| is_stranger(lease)) {
        let (attachment, address) = (&lease.holder.attachment, lease.address);
        match &lease.note {
            Some(note) => tracing::error!(
                %attachment, %address, note,
                "a pod's note is of a form that this version does not know: the pod is left as it is"
            ),
            None => tracing::error!(
                %attachment, %address,
                "a pod runs of whose ADD the journal does not tell: it is left as it is"
            ),
        }
    }
}

/// Takes over every stranger that the control plane, or the policy on disk, names.
pub async fn recognise(node: &Node) {
    let strangers: Vec<_> = node.leases().into_iter().filter(is_stranger).collect();
    if strangers.is_empty() {
        return;
    }
    let found = match node.datapath.list().await {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%error, "pod links cannot be listed");
            return;
        }
    };
    for lease in strangers {
        let id = &lease.holder.attachment.container_id;
        let mut links = found.iter();
        let link = links.find(|found| found.container_id.as_ref() == Some(id));
        let network = link.and_then(|link| network(node, &lease.holder.pod, link));
        let (Some(link), Some(network)) = (link, network) else {
            continue;
        };
        if let Err(error) = take_over(node, &lease, link, &network).await {
            let attachment = &lease.holder.attachment;
            tracing::error!(%attachment, %error, "a running pod could not be taken over");
        }
    }
}

/// The policy of the pod that the link is of: a link is named after its pod.
fn network(node: &Node, pod: &PodRef, link: &Found) -> Option<Arc<PodNetwork>> {
    if !pod.name.is_empty() {
        return node.policy_of(pod);
    }
    let snapshot = node.policy.watch();
    let snapshot = snapshot.borrow();
    let mut pods = snapshot.pods();
    pods.find(|pod| key(pod).host_interface() == link.host_interface)
        .cloned()
}

fn key(network: &PodNetwork) -> PodKey {
    PodKey {
        namespace: network.namespace.to_string(),
        name: network.name.to_string(),
    }
}

async fn take_over(
    node: &Node,
    lease: &Lease,
    link: &Found,
    network: &PodNetwork,
) -> Result<(), Error> {
    let attachment = &lease.holder.attachment;
    // With the turn: a DEL may have come in between.
    let _turn = node.flights.begin(attachment).await;
    let Some(mut lease) = node.lease_of(attachment).filter(is_stranger) else {
        return Ok(());
    };
    let Some(applied) = applied(&lease, link, network) else {
        return Ok(()); // not a link that this project made
    };
    let PodKey { namespace, name } = key(network);
    let uid = lease.holder.pod.uid.clone();
    lease.holder.pod = PodRef {
        namespace,
        name,
        uid,
    };
    let mut enforced = Enforced::from(network);
    if !node
        .policy
        .is_confirmed(&node.resource_name(&lease.holder.pod))
    {
        let stood = node.datapath.stood(lease.address.into());
        enforced.policy = enforced.policy.and(&stood);
    }
    let plan = node.plan(&lease, &enforced);
    node.datapath.adopt(&plan, &applied).await?;
    let pod = lease.holder.pod.clone();
    let note = Note {
        applied,
        enforced: enforced.clone(),
    };
    let recorded = node.store.recognise(attachment, pod, note.write()).await;
    if let Err(error) = recorded {
        tracing::error!(%attachment, %error, "a pod that was taken over is not on record");
    }
    node.announce(&lease, &enforced);
    let pod = &lease.holder.pod;
    tracing::info!(%attachment, pod.namespace, pod.name, "a running pod was taken over");
    Ok(())
}

/// What an ADD of this project must have made for the link to be as it is.
fn applied(lease: &Lease, link: &Found, network: &PodNetwork) -> Option<Applied> {
    Some(Applied {
        pod: key(network),
        container_id: link.container_id.clone()?,
        ifname: lease.holder.attachment.ifname.clone(),
        host_interface: link.host_interface.clone(),
        host_mac: link.host_mac,
        pod_mac: link.pod_mac?,
        addresses: link.addresses.clone(),
        mtu: link.mtu,
    })
}
