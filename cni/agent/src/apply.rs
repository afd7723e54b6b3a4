//! Carries what the control plane says to what runs already: the cluster's addresses, and the
//! policy of running pods. Holds what is wanted against what was done, so a change missed or failed
//! is made up for at the next look.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use turnpike_datapath::Error;
use turnpike_ipam::Lease;
use turnpike_rules::pod::Members;

use crate::{
    node::{Node, note_of},
    note::{Enforced, Note},
};

const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Runs until the node stops.
pub async fn run(node: Arc<Node>) {
    let mut changes = node.policy.watch();
    let mut members = BTreeMap::new();
    loop {
        changes.borrow_and_update();
        let done = all(&node, &mut members).await;
        let retry = async {
            match done {
                Ok(()) => std::future::pending().await,
                Err(()) => tokio::time::sleep(RETRY_PAUSE).await,
            }
        };
        tokio::select! {
            () = node.stop.cancelled() => return,
            _ = changes.changed() => {}
            () = node.policy_wanted.notified() => {}
            () = retry => {}
        }
    }
}

/// Sources of member addresses as the kernel has them.
pub type Set = BTreeMap<String, Arc<Members>>;

async fn all(node: &Node, done: &mut Set) -> Result<(), ()> {
    let members = set_members(node, done).await;
    if let Err(error) = &members {
        tracing::error!(%error, "the cluster's addresses were not set");
    }
    let mut failed = members.is_err();
    for lease in node.leases() {
        if let Err(error) = update(node, &lease).await {
            let attachment = &lease.holder.attachment;
            tracing::error!(%attachment, %error, "a pod's policy was not applied; tried again");
            failed = true;
        }
    }
    if failed { Err(()) } else { Ok(()) }
}

/// Brings the kernel's idea of the cluster to the snapshot's.
pub async fn set_members(node: &Node, done: &mut Set) -> Result<(), Error> {
    let wanted: Set = node
        .policy
        .watch()
        .borrow()
        .members()
        .map(|(name, group)| (name.clone(), Arc::clone(group)))
        .collect();
    let gone: Vec<_> = done
        .keys()
        .filter(|name| !wanted.contains_key(*name))
        .cloned()
        .collect();
    for name in gone {
        node.datapath.forget_members(&name).await?;
        done.remove(&name);
    }
    for (name, group) in wanted {
        if done.get(&name) != Some(&group) {
            node.datapath
                .set_members(&name, &group.addresses, &group.services)
                .await?;
            done.insert(name, group);
        }
    }
    Ok(())
}

/// Brings a running pod to its policy. Where the control plane says nothing of it, what was last
/// enforced stays.
async fn update(node: &Node, lease: &Lease) -> Result<(), Error> {
    let attachment = &lease.holder.attachment;
    let wanted = node
        .policy_of(&lease.holder.pod)
        .map(|network| Enforced::from(&*network));
    let Some(wanted) = wanted else { return Ok(()) };
    let settled = |note: Note| {
        // Capture is made with the pod and goes with it.
        Enforced {
            capture: wanted.capture.clone(),
            ..note.enforced
        } == wanted
    };
    if note_of(lease).is_none_or(settled) {
        return Ok(());
    }
    // Once more with the turn: a DEL may have come in between.
    let _turn = node.flights.begin(attachment).await;
    let Some(lease) = node.lease_of(attachment) else {
        return Ok(());
    };
    let Some(note) = note_of(&lease) else {
        return Ok(());
    };
    if note.enforced.policy != wanted.policy {
        node.datapath
            .update(&attachment.container_id, &wanted.policy)
            .await?;
        tracing::info!(%attachment, selected = wanted.policy.selected, "policy applied");
    }
    let enforced = Enforced {
        capture: note.enforced.capture.clone(),
        ..wanted
    };
    node.announce(&lease, &enforced);
    let note = Note {
        applied: note.applied,
        enforced,
    };
    if let Err(error) = node.store.note(attachment, note.write()).await {
        tracing::error!(%attachment, %error, "the policy is in force, but not on record");
    }
    Ok(())
}
