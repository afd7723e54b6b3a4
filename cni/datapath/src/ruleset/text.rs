//! Rules and elements as nft reads them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::{IpNet, Ipv4Net};
use turnpike_rules::pod::Transport;

use super::elements::{Delta, Element};
use crate::{links, marks, node};

const NODE: &str = include_str!("node.nft");

/// Every set that elements are written to.
const SETS: [(&str, &str); 13] = [
    ("netdev", "who4"),
    ("netdev", "who6"),
    ("inet", "eni4"),
    ("inet", "eni6"),
    ("inet", "cluster4"),
    ("inet", "cluster6"),
    ("inet", "services4"),
    ("inet", "services6"),
    ("inet", "selected4"),
    ("inet", "selected6"),
    ("inet", "inbound4"),
    ("inet", "inbound6"),
    ("inet", "direct4"),
];

/// The part of the ruleset that follows from the node, not from its pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) primary_interface: String,
    pub(crate) primary_address: Ipv4Addr,
    /// Secondary ENIs' interfaces, and the tables that packets may be marked for.
    pub(crate) interfaces: BTreeSet<String>,
    pub(crate) tables: BTreeSet<u32>,
    /// Ranges that are not translated; None: nothing is.
    pub(crate) direct: Option<Vec<Ipv4Net>>,
}

impl Base {
    /// Replaces all rules and keeps all elements of pods and members: one transaction, in which a
    /// packet meets the old rules or the new ones.
    pub(crate) fn render(&self) -> String {
        let mut text = self.definitions();
        // `add` makes what is to be flushed exist.
        text.push_str("add table inet turnpike\nflush table inet turnpike\n");
        text.push_str("add table netdev turnpike\nadd chain netdev turnpike pod\n");
        text.push_str("flush chain netdev turnpike pod\n");
        text.push_str("add chain netdev turnpike spoof\nflush chain netdev turnpike spoof\n");
        text.push_str(NODE);
        text.push_str("flush set inet turnpike enis\nflush set inet turnpike direct4\n");
        for interface in self.interfaces.iter().chain([&self.primary_interface]) {
            let _ = writeln!(text, "add element inet turnpike enis {{ \"{interface}\" }}");
        }
        for table in &self.tables {
            self.eni_chain(*table, &mut text);
        }
        self.translation(&mut text);
        text
    }

    fn definitions(&self) -> String {
        let mut text = String::new();
        let hex = [
            ("CLAIM", marks::CLAIM),
            ("PERMIT", marks::DIAL_PERMIT),
            ("RECORDED", marks::RECORDED),
            ("PRIMARY", marks::PRIMARY),
            ("MASQUERADE", marks::KUBE_MASQUERADE),
        ];
        for (name, value) in hex {
            let _ = writeln!(text, "define {name} = {value:#010x}");
        }
        let plain = [
            ("GATE_UID", marks::GATE_UID.to_string()),
            ("DOOR", marks::DOOR_PORT.to_string()),
            ("DNS4", node::DNS4.to_string()),
            ("DNS6", node::DNS6.to_string()),
            ("POD_IDENTITY4", node::POD_IDENTITY4.to_string()),
            ("POD_IDENTITY6", node::POD_IDENTITY6.to_string()),
            ("GATEWAY4", links::GATEWAY4.to_string()),
            ("GATEWAY6", links::GATEWAY6.to_string()),
            ("PRIMARY_IF", format!("\"{}\"", self.primary_interface)),
        ];
        for (name, value) in plain {
            let _ = writeln!(text, "define {name} = {value}");
        }
        text
    }

    fn eni_chain(&self, table: u32, text: &mut String) {
        let chain = format!("inet turnpike eni_{table}");
        let _ = writeln!(text, "add chain {chain}");
        if self.direct.is_some() {
            // To be translated, so to leave by the primary ENI: no mark of this one.
            let _ = writeln!(
                text,
                "add rule {chain} ip daddr != @direct4 ct direction original accept"
            );
        }
        let (keep, mark) = (!marks::ENI_MASK, marks::eni_mark(table));
        let _ = writeln!(
            text,
            "add rule {chain} meta mark set meta mark and {keep:#010x} or {mark:#010x} accept"
        );
    }

    fn translation(&self, text: &mut String) {
        let Some(direct) = &self.direct else { return };
        let ranges: Vec<_> = Ipv4Net::aggregate(direct)
            .iter()
            .map(ToString::to_string)
            .collect();
        write_elements(text, "add", "inet", "direct4", &ranges);
        let _ = writeln!(
            text,
            "add rule inet turnpike translate oifname @enis ip daddr != @direct4 \
             fib saddr type != local snat ip to {} fully-random",
            self.primary_address
        );
    }
}

/// Elements taken away and added, as part of a transaction. Removal succeeds for what is not there.
/// `services` are all that stand, where one of them changed: ranges may overlap between sources, so
/// their sets are always written whole.
pub(crate) fn render_delta(delta: &Delta, services: Option<&[IpNet]>) -> String {
    let mut text = String::new();
    for element in &delta.removed {
        if let Element::Ingress(interface) = element {
            let chain = format!("chain netdev turnpike in_{interface}");
            let _ = writeln!(text, "add {chain}\nflush {chain}\ndelete {chain}");
        }
    }
    for ((family, set), items) in group(&delta.removed) {
        write_elements(&mut text, "add", family, &set, &items);
        write_elements(&mut text, "delete", family, &set, &items);
    }
    forget_counts(&delta.removed, &mut text);
    if let Some(services) = services {
        render_services(services, &mut text);
    }
    render_added(delta.added.iter(), &mut text);
    text
}

/// All of it, for tables that may hold anything or nothing. `exists` says whether a veth is there: a
/// chain cannot stand on one that is not.
pub(crate) fn render_whole(
    base: &Base,
    standing: &BTreeSet<&Element>,
    afresh: bool,
    exists: impl Fn(&str) -> bool,
) -> String {
    let mut text = String::new();
    if afresh {
        for family in ["inet", "netdev"] {
            let _ = writeln!(
                text,
                "add table {family} turnpike\ndelete table {family} turnpike"
            );
        }
    }
    text.push_str(&base.render());
    for (family, set) in SETS.iter().filter(|(_, set)| *set != "direct4") {
        let kind = if set.starts_with("eni") { "map" } else { "set" };
        let _ = writeln!(text, "flush {kind} {family} turnpike {set}");
    }
    let services: Vec<_> = services(standing.iter().copied());
    render_services(&services, &mut text);
    let present = standing.iter().copied().filter(|element| match element {
        Element::Ingress(interface) => exists(interface),
        _ => true,
    });
    render_added(present, &mut text);
    text
}

/// The Service ranges among the elements.
pub(crate) fn services<'a>(elements: impl Iterator<Item = &'a Element>) -> Vec<IpNet> {
    elements
        .filter_map(|element| match element {
            Element::Service(range) => Some(*range),
            _ => None,
        })
        .collect()
}

fn render_added<'a>(added: impl Iterator<Item = &'a Element> + Clone, text: &mut String) {
    for element in added.clone() {
        if let Element::Ingress(interface) = element {
            let chain = format!("netdev turnpike in_{interface}");
            let _ = writeln!(
                text,
                "add chain {chain} {{ type filter hook ingress device \"{interface}\" \
                 priority -300; policy drop; }}\n\
                 flush chain {chain}\nadd rule {chain} goto pod"
            );
        }
    }
    for ((family, set), items) in group(added) {
        write_elements(text, "add", family, &set, &items);
    }
}

fn render_services(services: &[IpNet], text: &mut String) {
    for (set, v4) in [("services4", true), ("services6", false)] {
        let ranges: Vec<_> = services
            .iter()
            .copied()
            .filter(|range| range.addr().is_ipv4() == v4)
            .collect();
        let ranges: Vec<_> = IpNet::aggregate(&ranges)
            .iter()
            .map(ToString::to_string)
            .collect();
        let _ = writeln!(text, "flush set inet turnpike {set}");
        write_elements(text, "add", "inet", set, &ranges);
    }
}

/// The next pod with the address begins at zero.
fn forget_counts(removed: &[Element], text: &mut String) {
    let addresses = removed.iter().filter_map(|element| match element {
        Element::Speaks { address, .. } => Some(*address),
        _ => None,
    });
    for address in addresses {
        for count in ["dial", "inbound", "deny"] {
            let set = format!("acct_{count}{}", family_digit(address));
            for verb in ["add", "delete"] {
                write_elements(text, verb, "inet", &set, &[address.to_string()]);
            }
        }
    }
}

type Groups = BTreeMap<(&'static str, String), Vec<String>>;

fn group<'a>(elements: impl IntoIterator<Item = &'a Element>) -> Groups {
    let mut groups = Groups::new();
    for element in elements {
        let (family, set, address, item) = match element {
            Element::Ingress(_) | Element::Service(_) => continue,
            Element::Speaks {
                interface,
                mac,
                address,
            } => (
                "netdev",
                "who",
                address,
                format!("\"{interface}\" . {mac} . {address}"),
            ),
            Element::Eni { address, table } => (
                "inet",
                "eni",
                address,
                format!("{address} : goto eni_{table}"),
            ),
            Element::Cluster(address) => ("inet", "cluster", address, address.to_string()),
            Element::Selected(address) => ("inet", "selected", address, address.to_string()),
            Element::Inbound {
                address,
                transport,
                port,
            } => {
                let transport = match transport {
                    Transport::Tcp => "tcp",
                    Transport::Udp => "udp",
                };
                (
                    "inet",
                    "inbound",
                    address,
                    format!("{address} . {transport} . {port}"),
                )
            }
        };
        let set = format!("{set}{}", family_digit(*address));
        groups.entry((family, set)).or_default().push(item);
    }
    groups
}

fn write_elements(text: &mut String, verb: &str, family: &str, set: &str, items: &[String]) {
    if !items.is_empty() {
        let items = items.join(", ");
        let _ = writeln!(text, "{verb} element {family} turnpike {set} {{ {items} }}");
    }
}

fn family_digit(address: IpAddr) -> char {
    if address.is_ipv4() { '4' } else { '6' }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cause, Mac, PodPolicy, ruleset::elements::PodRules};
    use turnpike_rules::pod::InboundPort;

    fn base() -> Base {
        Base {
            primary_interface: "eth0".into(),
            primary_address: [10, 0, 1, 10].into(),
            interfaces: BTreeSet::from(["eth1".into()]),
            tables: BTreeSet::from([2]),
            direct: Some(vec![
                "10.0.0.0/16".parse().unwrap(),
                "10.1.0.0/16".parse().unwrap(),
            ]),
        }
    }

    fn pod() -> BTreeSet<Element> {
        let inbound = vec![
            InboundPort {
                transport: Transport::Tcp,
                port: 8443,
            },
            InboundPort {
                transport: Transport::Udp,
                port: 53,
            },
        ];
        PodRules {
            interface: "eni18582a65b10".into(),
            mac: Mac([2, 0, 0, 0, 1, 5]),
            addresses: vec!["10.0.1.5".parse().unwrap(), "fd00:1::5".parse().unwrap()],
            table: Some(2),
            policy: PodPolicy {
                selected: true,
                inbound,
            },
        }
        .elements()
    }

    #[test]
    fn the_node() {
        insta::assert_snapshot!(base().render());
    }

    #[test]
    fn the_node_that_does_not_translate() {
        let base = Base {
            direct: None,
            ..base()
        };
        let tail: Vec<_> = base
            .render()
            .lines()
            .rev()
            .take(6)
            .map(str::to_owned)
            .collect();
        insta::assert_snapshot!(tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
    }

    #[test]
    fn a_pod_comes() {
        let delta = Delta {
            added: pod().into_iter().collect(),
            removed: Vec::new(),
        };
        insta::assert_snapshot!(render_delta(&delta, None));
    }

    #[test]
    fn a_pod_goes() {
        let delta = Delta {
            removed: pod().into_iter().collect(),
            added: Vec::new(),
        };
        insta::assert_snapshot!(render_delta(&delta, None));
    }

    #[test]
    fn members_change_and_services_are_written_whole() {
        let delta = Delta {
            added: vec![
                Element::Cluster([10, 0, 2, 7].into()),
                Element::Service("10.96.0.0/16".parse().unwrap()),
            ],
            removed: vec![Element::Cluster([10, 0, 2, 6].into())],
        };
        let services = ["10.96.0.0/16", "10.96.128.0/17", "fd00:96::/108"];
        let services = services.map(|range| range.parse().unwrap());
        insta::assert_snapshot!(render_delta(&delta, Some(&services)));
    }

    #[test]
    fn the_log_is_the_one_that_is_read() {
        let logs = NODE.matches(" log ").count();
        let group = format!(" log group {} ", marks::NFLOG_GROUP);
        assert_eq!(NODE.matches(&*group).count(), logs);
        let causes = [Cause::Refused, Cause::Spoofed, Cause::Uninvited];
        let told = causes.map(|cause| NODE.matches(&*format!("\"{}\"", cause.prefix())).count());
        assert!(told.iter().all(|times| *times > 0), "{told:?}");
        assert_eq!(told.iter().sum::<usize>(), logs);
    }
}
