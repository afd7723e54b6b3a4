//! What outlived the last run: pods are taken over, halves are cleared away.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use turnpike_datapath::{Error, Found, Removal};
use turnpike_ipam::{Finding, Lease};

use crate::{
    apply, attach,
    node::{Node, note_of},
    note::Note,
    stranger,
    tombstones::{self, Tombstone},
};

/// Brings journal and kernel together, before any request is served.
pub async fn restore(node: &Arc<Node>) -> Result<(), Error> {
    apply::set_members(node, &mut apply::Set::new()).await?;
    let found = node.datapath.list().await?;
    let leases = node.leases();
    let mut alive = Vec::new();
    for found in found {
        if is_half(&found, &leases) {
            tracing::info!(
                interface = found.host_interface,
                "cleared away: its ADD never ended"
            );
            if let Err(error) = node.datapath.remove(&found).await {
                tracing::error!(interface = found.host_interface, %error, "not all gone");
                alive.push(found); // its addresses stay out of everybody's hands
            }
        } else {
            alive.push(found);
        }
    }
    let live = node.live(&alive);
    let now = node.now();
    let (outcome, recorded) = node
        .store
        .change(|pool, log| pool.restore(&live, now, log))
        .await;
    if let Err(error) = recorded {
        tracing::error!(%error, "the restored pool is not on record");
    }
    report(&outcome.findings);
    forget_idle(node, &alive).await;
    adopt(node, &alive).await;
    stranger::report(node);
    stranger::recognise(node).await;
    if node.datapath.began_bare() && !alive.is_empty() {
        tracing::error!(
            "there were pods, but no rules: somebody took them while no agent was here"
        );
        let reason = "the node's rules were gone when the agent started, while pods were running";
        node.feed.lapse(reason, 0);
    }
    tracing::info!(pods = live.len(), "restored");
    Ok(())
}

/// A link whose ADD was never acknowledged: ours, but without an end to its ADD on record, where the
/// record would have it. Of a stranger it would not, and a note that cannot be read is one.
fn is_half(found: &Found, leases: &[Lease]) -> bool {
    match &found.container_id {
        None => !found.up,
        Some(id) => leases.iter().any(|lease| {
            let Lease { holder, note, .. } = lease;
            holder.attachment.container_id == *id && note.is_none() && !holder.is_stranger()
        }),
    }
}

/// Rules may still stand for addresses of pods that never came to be: no link says so any more.
async fn forget_idle(node: &Node, alive: &[Found]) {
    let used: BTreeSet<_> = alive
        .iter()
        .flat_map(|found| found.addresses.clone())
        .collect();
    let held: Vec<IpAddr> = node.store.read(|pool| {
        let enis: Vec<_> = pool.enis().map(|eni| eni.id.clone()).collect();
        enis.iter()
            .flat_map(|eni| pool.addresses(eni))
            .map(IpAddr::V4)
            .collect()
    });
    let idle = Removal {
        container_id: String::new(),
        // No link has this name: a pod's begins with `eni`.
        host_interface: "none".to_owned(),
        host_mac: None,
        addresses: held
            .into_iter()
            .filter(|address| !used.contains(address))
            .collect(),
    };
    if let Err(error) = node.datapath.remove(idle).await {
        tracing::error!(%error, "rules of pods that are gone may still stand");
    }
}

async fn adopt(node: &Node, alive: &[Found]) {
    for lease in node.leases() {
        let Some(note) = note_of(&lease) else {
            continue;
        };
        let linked = |found: &&Found| {
            found.container_id.as_deref() == Some(&*lease.holder.attachment.container_id)
        };
        if !alive.iter().any(|found| linked(&found)) {
            continue;
        }
        // The kernel may have been tightened without a note; the controller will say.
        let mut held = note.clone();
        let stood = node.datapath.stood(lease.address.into());
        held.enforced.policy = held.enforced.policy.and(&stood);
        if held != note {
            apply::record(node, &lease.holder.attachment, &held).await;
        }
        let Note { applied, enforced } = held;
        let plan = node.plan(&lease, &enforced);
        match node.datapath.adopt(&plan, &applied).await {
            Ok(()) => node.announce(&lease, &enforced),
            Err(error) => {
                let attachment = &lease.holder.attachment;
                tracing::error!(%attachment, %error, "a running pod could not be taken over");
            }
        }
    }
}

/// Does what was left to do while nobody was there. `Err`: the folder cannot be read.
pub async fn bury(node: &Arc<Node>) -> std::io::Result<()> {
    for (path, tombstone) in node.tombstones.read()? {
        let Tombstone {
            container_id,
            ifname,
            ..
        } = tombstone;
        let attachment = turnpike_ipam::Attachment {
            container_id,
            ifname,
        };
        // An ADD may have been there before and have done it.
        let _turn = node.flights.end(&attachment).await;
        if tombstones::fulfil(&path, attach::detach(node, &attachment)).await {
            tracing::info!(%attachment, "deleted, as a tombstone says");
        }
    }
    Ok(())
}

/// Says what a look at EC2 or the kernel found out of order.
pub fn report(findings: &[Finding]) {
    for finding in findings {
        match finding {
            Finding::LiveNotAssigned { address } => tracing::error!(
                %address,
                "a pod uses an address that EC2 does not hold for this node: its packets are lost"
            ),
            Finding::LeaseWithoutLink {
                attachment,
                address,
            } => {
                tracing::warn!(%attachment, %address, "a lease without a link: its address cools");
            }
            Finding::Adopted {
                attachment,
                address,
            } => tracing::warn!(
                %attachment, %address,
                "a pod without a lease: its address is kept for it"
            ),
            Finding::Conflict {
                address,
                holder,
                live,
            } => tracing::error!(
                %address, %holder, %live,
                "two attachments claim one address; the one with the link keeps it"
            ),
            Finding::Unknown { eni, address } => {
                tracing::warn!(%eni, %address, "EC2 lists an address unasked: quarantined");
            }
            Finding::EniMissing { eni } => {
                tracing::error!(%eni, "EC2 does not list an interface that pods use");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use turnpike_ipam::{Attachment, EniId, Holder, Moment, PodRef};

    use super::*;

    fn found(container_id: Option<&str>, up: bool) -> Found {
        Found {
            container_id: container_id.map(str::to_owned),
            host_interface: "eni1".into(),
            host_mac: "02:00:00:00:00:01".parse().unwrap(),
            pod_mac: None,
            mtu: 9001,
            up,
            addresses: Vec::new(),
        }
    }

    fn lease(netns: &str, note: Option<&str>) -> Lease {
        Lease {
            holder: Holder {
                attachment: Attachment {
                    container_id: "c".into(),
                    ifname: "eth0".into(),
                },
                network: "turnpike".into(),
                pod: PodRef::default(),
                netns: netns.into(),
            },
            address: [10, 0, 0, 5].into(),
            eni: EniId::new("eni-1"),
            at: Moment(1),
            note: note.map(str::to_owned),
        }
    }

    #[test]
    fn only_what_was_never_acknowledged_is_a_half() {
        assert!(is_half(&found(None, false), &[]), "never named, never up");
        assert!(!is_half(&found(None, true), &[]), "somebody else's pod");
        assert!(
            !is_half(&found(Some("c"), true), &[]),
            "the journal was lost, the pod lives"
        );
        let half = |lease| is_half(&found(Some("c"), true), &[lease]);
        assert!(half(lease("/run/netns/c", None)), "its ADD never ended");
        assert!(
            !half(lease("", None)),
            "the journal was lost before the last start"
        );
        assert!(
            !half(lease("/run/netns/c", Some("of another version"))),
            "its ADD ended"
        );
    }
}
