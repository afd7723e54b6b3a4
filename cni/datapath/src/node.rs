//! The node's own part: settings, policy rules, local addresses and ENIs.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use netlink_packet_route::RouteNetlinkMessage;

use crate::{
    Eni, Error, Mac, NodePlan,
    links::{self, Link, Route},
    marks,
    netlink::{REPLACE, Request, Rtnl},
    ruleset::Base,
    sysctl::Sysctls,
};

/// Where the gate answers DNS.
pub(crate) const DNS4: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);
pub(crate) const DNS6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x20, 0, 0, 0, 0, 0, 0x10);
/// Where EKS Pod Identity's agent answers on the node: the one node service open to selected pods.
pub(crate) const POD_IDENTITY4: Ipv4Addr = Ipv4Addr::new(169, 254, 170, 23);
pub(crate) const POD_IDENTITY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23);

const MAIN: u32 = 254;

/// What was found while laying the node's part.
#[derive(Debug)]
pub(crate) struct Laid {
    pub(crate) primary_interface: String,
    /// Secondary ENIs, by table.
    pub(crate) interfaces: BTreeMap<u32, String>,
}

/// Policy rules, local addresses and ENIs; everything may be there already. Nothing here lets a
/// packet pass that the rules have not seen: forwarding is switched on by [`open_forwarding`] last.
pub(crate) fn lay(rtnl: &mut Rtnl, sysctls: &Sysctls, plan: &NodePlan) -> Result<Laid, Error> {
    let found = Link::all(rtnl)?;
    let primary = by_mac(&found, plan.primary.mac)?;
    let loopback = found
        .iter()
        .find(|link| link.name == "lo")
        .map_or(1, |link| link.index);
    rtnl.run(node_requests(loopback))?;
    settle_eni(sysctls, &primary.name)?;
    let mut interfaces = BTreeMap::new();
    for eni in &plan.secondary {
        interfaces.insert(eni.table, attach(rtnl, sysctls, &found, eni)?);
    }
    Ok(Laid {
        primary_interface: primary.name.clone(),
        interfaces,
    })
}

/// The rules stand: packets may be forwarded.
pub(crate) fn open_forwarding(sysctls: &Sysctls) -> Result<(), Error> {
    sysctls.set("netfilter/nf_conntrack_acct", "1")?;
    sysctls.set("ipv4/ip_forward", "1")?;
    sysctls.set_ipv6("ipv6/conf/all/forwarding", "1")
}

/// Configures one ENI whose link is there, and gives the link's name.
pub(crate) fn attach_eni(rtnl: &mut Rtnl, sysctls: &Sysctls, eni: &Eni) -> Result<String, Error> {
    let found = Link::all(rtnl)?;
    attach(rtnl, sysctls, &found, eni)
}

/// An ENI's policy rules go; its routes went with the link, or go with it.
pub(crate) fn detach_eni(rtnl: &mut Rtnl, table: u32) -> Result<(), Error> {
    let requests = [false, true].map(|v6| {
        let rule = from_eni(v6, table);
        let step = format!("taking the rule of ENI table {table} away");
        Request::new(step, 0, RouteNetlinkMessage::DelRule(rule)).fine_if(&[libc::ENOENT])
    });
    rtnl.run(requests.into())
}

pub(crate) fn base(plan: &NodePlan, laid: Laid) -> Base {
    Base {
        primary_interface: laid.primary_interface,
        primary_address: plan.primary.address,
        interfaces: laid.interfaces.into_values().collect(),
        tables: plan.secondary.iter().map(|eni| eni.table).collect(),
        direct: plan.snat.as_ref().map(|snat| snat.direct.clone()),
    }
}

fn node_requests(loopback: u32) -> Vec<Request> {
    let mut requests = vec![Request::new("bringing lo up", 0, links::up(loopback))];
    for address in [IpAddr::from(DNS4), DNS6.into()] {
        let step = format!("giving lo the address {address}");
        requests.push(Request::new(
            step,
            REPLACE,
            links::address(loopback, address, true),
        ));
    }
    for v6 in [false, true] {
        let local = links::deliver_locally(v6, loopback, marks::CLAIM_TABLE);
        requests.push(Request::new(
            "routing claimed packets to this machine",
            REPLACE,
            local,
        ));
        let claim = Some((marks::CLAIM, marks::CLAIM));
        let primary = Some((marks::PRIMARY, marks::PRIMARY));
        for rule in [
            links::rule(v6, marks::PREF_CLAIM, claim, marks::CLAIM_TABLE),
            links::rule(v6, marks::PREF_TO_POD, None, marks::PODS_TABLE),
            links::rule(v6, marks::PREF_PRIMARY, primary, MAIN),
        ] {
            requests.push(new_rule(rule));
        }
    }
    requests
}

fn new_rule(rule: netlink_packet_route::rule::RuleMessage) -> Request {
    let message = RouteNetlinkMessage::NewRule(rule);
    Request::new("adding a policy rule", crate::netlink::CREATE, message).fine_if(&[libc::EEXIST])
}

fn from_eni(v6: bool, table: u32) -> netlink_packet_route::rule::RuleMessage {
    let mark = Some((marks::eni_mark(table), marks::ENI_MASK));
    links::rule(v6, marks::PREF_FROM_POD, mark, table)
}

fn attach(rtnl: &mut Rtnl, sysctls: &Sysctls, found: &[Link], eni: &Eni) -> Result<String, Error> {
    if !marks::is_eni_table(eni.table) {
        let what = format!("table {} cannot be an ENI's: 1 to 99 can", eni.table);
        return Err(Error::Invalid { what });
    }
    let link = by_mac(found, eni.mac)?;
    let (index, table) = (link.index, eni.table);
    settle_eni(sysctls, &link.name)?;
    let named = |what: &str| format!("{what} of ENI {} ({})", eni.mac, link.name);
    // A host address alone: the subnet is reached by the ENI's own table, never by main.
    let mut requests = vec![
        Request::new(named("setting the MTU"), 0, links::mtu(index, eni.mtu)),
        Request::new(named("bringing up the link"), 0, links::up(index)),
        Request::new(
            named("setting the address"),
            REPLACE,
            links::address(index, eni.address.into(), false),
        ),
    ];
    let gateways = [Some(IpAddr::V4(eni.gateway)), eni.gateway6.map(IpAddr::V6)];
    for gateway in gateways.into_iter().flatten() {
        for route in [
            Route::link(gateway, index, table),
            Route::default(gateway, index, table),
        ] {
            requests.push(Request::new(
                named("setting a route"),
                REPLACE,
                route.build(),
            ));
        }
        requests.push(new_rule(from_eni(gateway.is_ipv6(), table)));
    }
    rtnl.run(requests)?;
    Ok(link.name.clone())
}

/// Loose reverse path checks: strict ones break even ARP on a secondary ENI. Router advertisements
/// stay heard: a machine that forwards ignores them otherwise, and loses its IPv6 default route.
fn settle_eni(sysctls: &Sysctls, interface: &str) -> Result<(), Error> {
    sysctls.set(&format!("ipv4/conf/{interface}/rp_filter"), "2")?;
    sysctls.set_ipv6(&format!("ipv6/conf/{interface}/accept_ra"), "2")
}

fn by_mac(found: &[Link], mac: Mac) -> Result<&Link, Error> {
    // A pod's veth never has an ENI's address, but a VLAN or bridge on top of the ENI does; the
    // lowest index is the device itself.
    let with = found.iter().filter(|link| link.mac == Some(mac));
    with.min_by_key(|link| link.index)
        .ok_or(Error::NoSuchEni { mac })
}
