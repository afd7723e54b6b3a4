//! Carries what the control plane says to what runs already: the cluster's addresses, and the
//! policy of running pods. Holds what is wanted against what was done, so a change missed or failed
//! is made up for at the next look.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use turnpike_datapath::{Error, PodPolicy};
use turnpike_ipam::{Attachment, Lease};
use turnpike_rules::pod::Members;

use crate::{
    node::{Node, note_of},
    note::{Enforced, Note},
    stranger,
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
    stranger::recognise(node).await;
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
/// enforced stays, and what only the disk says loosens nothing.
async fn update(node: &Node, lease: &Lease) -> Result<(), Error> {
    let attachment = &lease.holder.attachment;
    let Some(wanted) = wanted(node, lease) else {
        return Ok(());
    };
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
    let Some(before) = note_of(&lease) else {
        return Ok(());
    };
    let enforced = Enforced {
        capture: before.enforced.capture.clone(),
        ..wanted
    };
    enforce(node, attachment, &before, &enforced.policy).await?;
    node.announce(&lease, &enforced);
    let after = Note {
        applied: before.applied,
        enforced,
    };
    record(node, attachment, &after).await;
    Ok(())
}

fn wanted(node: &Node, lease: &Lease) -> Option<Enforced> {
    let mut wanted = Enforced::from(&*node.policy_of(&lease.holder.pod)?);
    if !node
        .policy
        .is_confirmed(&node.resource_name(&lease.holder.pod))
    {
        wanted.policy = wanted.policy.and(&note_of(lease)?.enforced.policy);
    }
    Some(wanted)
}

/// Changes the rules. What tightens is on record first, so that a restart does not free the pod
/// again.
async fn enforce(
    node: &Node,
    attachment: &Attachment,
    before: &Note,
    policy: &PodPolicy,
) -> Result<(), Error> {
    if before.enforced.policy == *policy {
        return Ok(());
    }
    if !before.enforced.policy.is_within(policy) {
        let mut tighter = before.clone();
        tighter.enforced.policy = policy.and(&before.enforced.policy);
        record(node, attachment, &tighter).await;
    }
    let updated = node.datapath.update(&attachment.container_id, policy).await;
    if updated.is_err() {
        // By the note the next look sees what is left to do.
        record(node, attachment, before).await;
    }
    updated?;
    tracing::info!(%attachment, selected = policy.selected, "policy applied");
    Ok(())
}

/// A refusing disk holds no policy up: after a restart, what the kernel holds counts as well.
pub async fn record(node: &Node, attachment: &Attachment, note: &Note) {
    if let Err(error) = node.store.note(attachment, note.write()).await {
        tracing::error!(%attachment, %error, "a pod's policy is not on record");
    }
}
