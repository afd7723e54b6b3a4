//! Which set elements there are, and on whose behalf.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;
use turnpike_rules::pod::Transport;

use crate::{Mac, PodPolicy};

/// One thing that comes and goes in the ruleset.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Element {
    /// The chain that looks at a veth's frames.
    Ingress(String),
    /// Who may speak on a veth.
    Speaks {
        interface: String,
        mac: Mac,
        address: IpAddr,
    },
    /// Which ENI's table serves packets from this address.
    Eni {
        address: IpAddr,
        table: u32,
    },
    Cluster(IpAddr),
    Service(IpNet),
    Selected(IpAddr),
    Inbound {
        address: IpAddr,
        transport: Transport,
        port: u16,
    },
}

/// On whose behalf an element stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Owner {
    /// A pod, by container id.
    Pod(String),
    /// A source of cluster members.
    Members(String),
    /// Nobody yet: the kernel had it when the agent started.
    Restored,
}

/// What the rules know of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodRules {
    pub(crate) interface: String,
    pub(crate) mac: Mac,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) table: Option<u32>,
    pub(crate) policy: PodPolicy,
}

impl PodRules {
    pub(crate) fn elements(&self) -> BTreeSet<Element> {
        let mut elements = BTreeSet::from([Element::Ingress(self.interface.clone())]);
        for &address in &self.addresses {
            let interface = self.interface.clone();
            elements.insert(Element::Speaks {
                interface,
                mac: self.mac,
                address,
            });
            elements.insert(Element::Cluster(address));
            elements.extend(self.table.map(|table| Element::Eni { address, table }));
            if self.policy.selected {
                elements.insert(Element::Selected(address));
                elements.extend(self.policy.inbound.iter().map(|inbound| Element::Inbound {
                    address,
                    transport: inbound.transport,
                    port: inbound.port,
                }));
            }
        }
        elements
    }
}

impl Element {
    /// Whether it speaks of this veth or of one of these addresses.
    pub(crate) fn concerns(&self, interface: &str, addresses: &[IpAddr]) -> bool {
        match self {
            Self::Ingress(name)
            | Self::Speaks {
                interface: name, ..
            } => name == interface,
            Self::Eni { address, .. }
            | Self::Cluster(address)
            | Self::Selected(address)
            | Self::Inbound { address, .. } => addresses.contains(address),
            Self::Service(_) => false,
        }
    }
}

/// Elements with their owners: an element stands as long as anybody holds it. Changes gather until
/// [`Shares::commit`] or [`Shares::roll_back`].
#[derive(Debug, Default)]
pub(crate) struct Shares {
    owners: HashMap<Owner, BTreeSet<Element>>,
    holders: HashMap<Element, u32>,
    /// What each changed owner had, oldest last.
    journal: Vec<(Owner, BTreeSet<Element>)>,
    /// Whether each touched element stood before the first change.
    touched: BTreeMap<Element, bool>,
}

/// What turns the ruleset as it is into the ruleset as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Delta {
    pub(crate) removed: Vec<Element>,
    pub(crate) added: Vec<Element>,
}

impl Delta {
    pub(crate) fn changes_services(&self) -> bool {
        let mut changed = self.removed.iter().chain(&self.added);
        changed.any(|element| matches!(element, Element::Service(_)))
    }
}

impl Shares {
    pub(crate) fn get(&self, owner: &Owner) -> Option<&BTreeSet<Element>> {
        self.owners.get(owner)
    }

    /// All that stands.
    pub(crate) fn elements(&self) -> impl Iterator<Item = &Element> {
        self.holders.keys()
    }

    /// All that stands, in order.
    pub(crate) fn standing(&self) -> BTreeSet<&Element> {
        self.holders.keys().collect()
    }

    pub(crate) fn replace(&mut self, owner: Owner, elements: BTreeSet<Element>) {
        let before = self.exchange(&owner, elements);
        self.journal.push((owner, before));
    }

    pub(crate) fn delta(&self) -> Delta {
        let mut delta = Delta::default();
        for (element, &stood) in &self.touched {
            match (stood, self.holders.contains_key(element)) {
                (true, false) => delta.removed.push(element.clone()),
                (false, true) => delta.added.push(element.clone()),
                _ => {}
            }
        }
        delta
    }

    pub(crate) fn commit(&mut self) {
        self.journal.clear();
        self.touched.clear();
    }

    pub(crate) fn roll_back(&mut self) {
        while let Some((owner, before)) = self.journal.pop() {
            self.exchange(&owner, before);
        }
        self.touched.clear();
    }

    fn exchange(&mut self, owner: &Owner, elements: BTreeSet<Element>) -> BTreeSet<Element> {
        let before = self.owners.remove(owner).unwrap_or_default();
        for element in before.difference(&elements) {
            self.release(element);
        }
        for element in elements.difference(&before) {
            self.hold(element);
        }
        if !elements.is_empty() {
            self.owners.insert(owner.clone(), elements);
        }
        before
    }

    fn hold(&mut self, element: &Element) {
        let holders = self.holders.entry(element.clone()).or_default();
        self.touched.entry(element.clone()).or_insert(*holders > 0);
        *holders += 1;
    }

    fn release(&mut self, element: &Element) {
        self.touched.entry(element.clone()).or_insert(true);
        if let Some(holders) = self.holders.get_mut(element) {
            *holders -= 1;
            if *holders == 0 {
                self.holders.remove(element);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(last: &[u8]) -> BTreeSet<Element> {
        last.iter()
            .map(|n| Element::Cluster([10, 0, 0, *n].into()))
            .collect()
    }

    #[test]
    fn an_element_stands_while_anybody_holds_it() {
        let mut shares = Shares::default();
        shares.replace(Owner::Restored, cluster(&[1, 2]));
        shares.replace(Owner::Members("c/a".into()), cluster(&[2, 3]));
        assert_eq!(
            shares.delta().added,
            cluster(&[1, 2, 3]).into_iter().collect::<Vec<_>>()
        );
        shares.commit();

        shares.replace(Owner::Restored, BTreeSet::new());
        let delta = shares.delta();
        assert_eq!(delta.removed, cluster(&[1]).into_iter().collect::<Vec<_>>());
        assert!(delta.added.is_empty());
    }

    #[test]
    fn what_comes_and_goes_in_one_batch_is_no_change() {
        let mut shares = Shares::default();
        shares.replace(Owner::Members("c/a".into()), cluster(&[1]));
        shares.commit();
        shares.replace(Owner::Members("c/a".into()), cluster(&[2]));
        shares.replace(Owner::Members("c/b".into()), cluster(&[1]));
        shares.replace(Owner::Members("c/a".into()), cluster(&[]));
        assert_eq!(shares.delta(), Delta::default());
    }

    #[test]
    fn rolled_back_it_is_as_before() {
        let mut shares = Shares::default();
        shares.replace(Owner::Members("c/a".into()), cluster(&[1, 2]));
        shares.commit();
        shares.replace(Owner::Members("c/a".into()), cluster(&[2, 3]));
        shares.replace(Owner::Pod("x".into()), cluster(&[3, 4]));
        shares.replace(Owner::Members("c/a".into()), cluster(&[]));
        shares.roll_back();
        assert_eq!(shares.delta(), Delta::default());
        let standing: BTreeSet<_> = shares.standing().into_iter().cloned().collect();
        assert_eq!(standing, cluster(&[1, 2]));
    }
}
