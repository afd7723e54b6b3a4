//! What is to be: plain inputs from which every link, route and rule follows.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};
use turnpike_rules::pod::{Capture, InboundPort};

use crate::{Error, Mac, marks};

/// A node's own part: laid once at start, again at each restart of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePlan {
    pub primary: PrimaryEni,
    pub secondary: Vec<Eni>,
    /// None: somebody else translates (`AWS_VPC_K8S_CNI_EXTERNALSNAT=true`).
    pub snat: Option<Snat>,
    /// Where the kernel's network settings can be written: `/proc/sys/net`, or another mount of it.
    pub sysctls: PathBuf,
}

/// The ENI that the machine booted with; the operating system gave it addresses and routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrimaryEni {
    pub mac: Mac,
    /// The node's address: source of probes, target of SNAT.
    pub address: Ipv4Addr,
    /// Its IPv6 address; with `address` it is what goes into [`PodPlan::node`].
    pub address6: Option<Ipv6Addr>,
}

/// A secondary ENI, which nobody but us configures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eni {
    pub mac: Mac,
    /// Its routing table, 1 to 99; the AWS CNI's choice is the device number plus 1.
    pub table: u32,
    /// Its primary address; pods never have it.
    pub address: Ipv4Addr,
    /// The subnet's router.
    pub gateway: Ipv4Addr,
    /// The subnet's router as seen over IPv6, where pods on this ENI have such addresses.
    pub gateway6: Option<Ipv6Addr>,
    pub mtu: u32,
}

/// Pods' IPv4 connections to anywhere but here get the node's address and leave by the primary
/// ENI: connections that the gate dials for a pod, too, since a subnet whose internet gateway knows
/// the primary address alone would drop them otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snat {
    /// The VPC's CIDRs, and those excluded by the operator (`AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS`).
    pub direct: Vec<Ipv4Net>,
}

/// Whose network it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodKey {
    pub namespace: String,
    pub name: String,
}

impl PodKey {
    /// Name of the host's end of the veth pair, as the AWS CNI makes it, so that tools which know
    /// the one know the other.
    pub fn host_interface(&self) -> String {
        let digest = Sha1::digest(format!("{}.{}", self.namespace, self.name));
        format!("eni{}", &hex::encode(digest)[..11])
    }
}

/// One pod's network, whole.
#[derive(Clone, Debug, PartialEq)]
pub struct PodPlan {
    pub pod: PodKey,
    pub container_id: String,
    /// Path of the pod's network namespace.
    pub netns: PathBuf,
    /// Name of the pod's end of the veth pair, mostly `eth0`.
    pub ifname: String,
    /// The pod's own addresses, at most one of each family.
    pub addresses: Vec<IpAddr>,
    pub mtu: u32,
    /// Table of the secondary ENI that owns the addresses; None: the primary ENI does.
    pub table: Option<u32>,
    /// The node's addresses, from which its probes come.
    pub node: Vec<IpAddr>,
    pub capture: Option<Capture>,
    pub policy: PodPolicy,
}

/// The part of a pod's plan that changes while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodPolicy {
    /// Nothing leaves the pod but through the gate.
    pub selected: bool,
    /// Ports of a selected pod that callers from outside the cluster may reach.
    pub inbound: Vec<InboundPort>,
}

impl PodPolicy {
    /// Whether it lets pass nothing that `other` does not.
    pub fn is_within(&self, other: &Self) -> bool {
        let ports = || self.inbound.iter().all(|port| other.inbound.contains(port));
        !other.selected || self.selected && ports()
    }

    /// What both let pass.
    pub fn and(&self, other: &Self) -> Self {
        match (self.selected, other.selected) {
            (false, true) => other.clone(),
            (_, false) => self.clone(),
            (true, true) => Self {
                selected: true,
                inbound: self
                    .inbound
                    .iter()
                    .filter(|port| other.inbound.contains(port))
                    .cloned()
                    .collect(),
            },
        }
    }
}

impl PodPlan {
    /// Refuses what could not become a network, before anything is touched.
    pub fn validate(&self) -> Result<(), Error> {
        let invalid = |what: String| Err(Error::Invalid { what });
        let v4 = self
            .addresses
            .iter()
            .filter(|address| address.is_ipv4())
            .count();
        if v4 > 1 || self.addresses.len() - v4 > 1 || self.addresses.is_empty() {
            return invalid(format!(
                "a pod has one address of a family, {} has {:?}",
                self.pod.name, self.addresses
            ));
        }
        if let Some(address) = self.addresses.iter().find(|a| !is_ordinary(**a)) {
            return invalid(format!("{address} cannot be a pod's address"));
        }
        if !is_interface_name(&self.ifname) {
            return invalid(format!("`{}` cannot name an interface", self.ifname));
        }
        if let Some(table) = self.table.filter(|table| !marks::is_eni_table(*table)) {
            return invalid(format!("table {table} cannot be an ENI's: 1 to 99 can"));
        }
        if self.container_id.is_empty() || self.container_id.len() > 255 {
            return invalid("the container id must have 1 to 255 characters".to_owned());
        }
        Ok(())
    }
}

/// What exists once a plan is applied: enough to undo it, also after a reboot of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    pub pod: PodKey,
    pub container_id: String,
    pub ifname: String,
    pub host_interface: String,
    pub host_mac: Mac,
    pub pod_mac: Mac,
    pub addresses: Vec<IpAddr>,
    pub mtu: u32,
}

/// What to take away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    pub container_id: String,
    pub host_interface: String,
    /// The link goes only if it has this address: by a late DEL of an older container, the name may
    /// belong to a newer one already. None: whatever bears the name goes.
    pub host_mac: Option<Mac>,
    pub addresses: Vec<IpAddr>,
}

impl From<&Applied> for Removal {
    fn from(applied: &Applied) -> Self {
        Self {
            container_id: applied.container_id.clone(),
            host_interface: applied.host_interface.clone(),
            host_mac: Some(applied.host_mac),
            addresses: applied.addresses.clone(),
        }
    }
}

/// A pod's network that was found on the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// As noted on the link; None: not ours, or its ADD never ended.
    pub container_id: Option<String>,
    pub host_interface: String,
    pub host_mac: Mac,
    /// Of the pod's end, as the host's was told; None: not ours, or its ADD never ended.
    pub pod_mac: Option<Mac>,
    pub mtu: u32,
    pub up: bool,
    /// Addresses routed to it.
    pub addresses: Vec<IpAddr>,
}

impl From<&Found> for Removal {
    fn from(found: &Found) -> Self {
        Self {
            container_id: found.container_id.clone().unwrap_or_default(),
            host_interface: found.host_interface.clone(),
            host_mac: Some(found.host_mac),
            addresses: found.addresses.clone(),
        }
    }
}

fn is_ordinary(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    !(link_local || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

/// The kernel's own test, and nothing that would need quoting in a ruleset.
fn is_interface_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=15).contains(&name.len()) && name.chars().all(fits) && name != "." && name != ".."
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> PodPlan {
        PodPlan {
            pod: PodKey {
                namespace: "shop".into(),
                name: "cart-0".into(),
            },
            container_id: "c1".into(),
            netns: "/run/netns/none".into(),
            ifname: "eth0".into(),
            addresses: vec!["10.0.1.5".parse().unwrap(), "fd00:1::5".parse().unwrap()],
            mtu: 9001,
            table: Some(2),
            node: vec!["10.0.1.10".parse().unwrap()],
            capture: None,
            policy: PodPolicy::default(),
        }
    }

    #[test]
    fn the_host_interface_is_named_as_the_aws_cni_names_it() {
        // printf shop.cart-0 | sha1sum
        assert_eq!(plan().pod.host_interface(), "eni18582a65b10");
    }

    #[test]
    fn plans_that_cannot_be_are_refused() {
        assert!(plan().validate().is_ok());
        type Spoil = fn(&mut PodPlan);
        let spoiled: &[Spoil] = &[
            |p| p.addresses.clear(),
            |p| p.addresses = vec!["10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()],
            |p| p.addresses = vec!["127.0.0.1".parse().unwrap()],
            |p| p.addresses = vec!["169.254.20.10".parse().unwrap()],
            |p| p.addresses = vec!["::ffff:10.0.0.1".parse().unwrap()],
            |p| p.ifname = "eth0; flush".into(),
            |p| p.ifname = String::new(),
            |p| p.ifname = "a-name-that-is-too-long".into(),
            |p| p.table = Some(100),
            |p| p.table = Some(0),
            |p| p.container_id.clear(),
        ];
        for (number, spoil) in spoiled.iter().enumerate() {
            let mut plan = plan();
            spoil(&mut plan);
            assert!(plan.validate().is_err(), "number {number} passed");
        }
    }
}
