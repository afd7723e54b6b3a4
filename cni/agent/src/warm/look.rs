//! A look at EC2: what it holds for this node, made into a view for the pool.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::Ipv4Net;
use turnpike_cloud::{AttachmentState, Cloud, CloudError, Interface};
use turnpike_datapath::Error as DatapathError;
use turnpike_ipam::{Eni, EniId, EniView, Finding, View};

use super::{call::lay, count};
use crate::{node::Node, restore};

pub(super) const INSTANCE_TAG: &str = "node.k8s.amazonaws.com/instance_id";
pub(super) const TOKEN_TAG: &str = "node.k8s.amazonaws.com/turnpike_token";
const HANDS_OFF_TAG: &str = "node.k8s.amazonaws.com/no_manage";

#[derive(Debug, thiserror::Error)]
pub(super) enum LookError {
    #[error(transparent)]
    Cloud(#[from] CloudError),
    #[error("pod links cannot be listed: {0}")]
    Kernel(#[from] DatapathError),
}

/// Holds the pool against EC2 and the kernel. False: an interface that is attached cannot be used
/// yet, so another look should come soon.
pub(super) async fn look<C: Cloud>(node: &Node, cloud: &C) -> Result<bool, LookError> {
    let asked_at = node.now();
    let view = View {
        asked_at,
        enis: enis(node, cloud).await?,
    };
    let live = node.live(&node.datapath.list().await?);
    let now = node.now();
    let (outcome, recorded) = node
        .store
        .change(|pool, log| pool.reconcile(&view, &live, now, log))
        .await;
    node.metrics.reconciles.inc();
    if let Err(error) = recorded {
        tracing::error!(%error, "what EC2 said is not on record");
    }
    restore::report(&outcome.findings);
    let mut all_usable = true;
    for eni in &outcome.unready {
        if let Err(error) = lay(node, eni).await {
            tracing::error!(eni = %eni.id, %error, "an attached interface cannot be used");
            all_usable = false;
        }
    }
    let adopted = |finding: &Finding| matches!(finding, Finding::Adopted { .. });
    if outcome.findings.iter().any(adopted) {
        node.policy_wanted.notify_one();
    }
    if !node.warmed.send_replace(true) {
        tracing::info!(enis = view.enis.len(), "EC2 was heard");
    }
    Ok(all_usable)
}

async fn enis<C: Cloud>(node: &Node, cloud: &C) -> Result<Vec<EniView>, CloudError> {
    let instance = &node.identity.instance;
    let tag = format!("tag:{INSTANCE_TAG}");
    let api = "DescribeNetworkInterfaces";
    let attached = cloud
        .interfaces(&[("attachment.instance-id", &instance.id)])
        .await;
    count(node, api, attached.as_ref().err());
    let made_here = cloud
        .interfaces(&[(&tag, &instance.id), ("status", "available")])
        .await;
    count(node, api, made_here.as_ref().err());
    let interfaces: BTreeMap<_, _> = made_here?
        .into_iter()
        .chain(attached?)
        .map(|it| (it.id.clone(), it))
        .collect();
    let subnets = subnets(node, cloud, interfaces.values()).await?;
    Ok(interfaces
        .into_values()
        .filter_map(|it| eni_view(it, &subnets))
        .collect())
}

/// Ranges of the subnets that the interfaces are in; mostly the one that is known anyway.
async fn subnets<'a, C: Cloud>(
    node: &Node,
    cloud: &C,
    interfaces: impl Iterator<Item = &'a Interface>,
) -> Result<BTreeMap<String, Ipv4Net>, CloudError> {
    let instance = &node.identity.instance;
    let mut known = BTreeMap::from([(instance.subnet.clone(), instance.subnet_cidr)]);
    let others: BTreeSet<_> = interfaces
        .map(|it| it.subnet.clone())
        .filter(|subnet| !known.contains_key(subnet))
        .collect();
    if !others.is_empty() {
        let asked = cloud.subnets(&Vec::from_iter(others)).await;
        count(node, "DescribeSubnets", asked.as_ref().err());
        known.extend(asked?.into_iter().map(|subnet| (subnet.id, subnet.cidr)));
    }
    Ok(known)
}

fn eni_view(interface: Interface, subnets: &BTreeMap<String, Ipv4Net>) -> Option<EniView> {
    let id = EniId::new(interface.id.clone());
    let on_default_card = interface
        .attachment
        .as_ref()
        .is_none_or(|attachment| attachment.network_card == 0);
    let hands_off = interface
        .tags
        .get(HANDS_OFF_TAG)
        .is_some_and(|value| value == "true");
    let subnet = subnets.get(&interface.subnet);
    if subnet.is_none() {
        tracing::warn!(eni = %id, subnet = interface.subnet, "EC2 does not describe its subnet");
    }
    let attached = interface
        .attachment
        .as_ref()
        .filter(|it| it.state == AttachmentState::Attached);
    Some(EniView {
        attached: match attached {
            Some(attachment) => Some(Eni {
                id: id.clone(),
                mac: interface.mac.clone(),
                device_index: attachment.device_index,
                primary: interface.primary,
                subnet: *subnet?,
            }),
            None => None,
        },
        id,
        addresses: interface.secondary,
        token: interface.tags.get(TOKEN_TAG).cloned(),
        managed: on_default_card && !hands_off,
    })
}
