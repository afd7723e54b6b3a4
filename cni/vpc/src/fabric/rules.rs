//! The router's packet rules as nft text: a static base, and elements and one chain per port.
//!
//! A packet from a port passes the source check first, before anything that knows connections;
//! then, towards a port, the destination check, and only then `established`. What is left is for
//! the security groups: out of the sender's, into the receiver's.

use std::{collections::BTreeSet, fmt::Write, io::Write as _, net::Ipv4Addr};

use ipnet::{IpNet, Ipv6Net};

use super::Error;
use crate::{
    netns::{Command, Namespace, Output, system},
    spec::{Permission, Protocol, SecurityGroup, Spec},
    world::Port,
};

/// The router's end of each port is named by this and a number.
pub(super) const PORT: &str = "eni";
/// The router's link to the pretended internet.
pub(super) const UPLINK: &str = "inet0";
/// The port of the EC2 API on the resolver's address.
pub(crate) const API_PORT: u16 = 8773;

pub(super) fn base(spec: &Spec) -> String {
    let (cidr, resolver) = (spec.cidr(), spec.resolver());
    let (nat, metadata) = (spec.nat_address(), crate::spec::METADATA);
    let spoofed6 = spec.ipv6_cidr().map_or_else(String::new, |v6| {
        format!("iifname \"{UPLINK}\" ip6 saddr {v6} counter name unassigned_source drop")
    });
    let limits: BTreeSet<u8> = spec
        .instances()
        .iter()
        .map(|i| i.metadata_hop_limit)
        .collect();
    let hops: String = limits
        .into_iter()
        .map(|limit| format!("  chain hop-{limit} {{ ip ttl set {limit}; }}\n"))
        .collect();
    format!(
        r#"table inet vpc {{
  counter unassigned_source {{ }}
  counter unassigned_destination {{ }}
  counter group_denied {{ }}
  set owned4 {{ type ifname . ipv4_addr; }}
  set owned6 {{ typeof iifname . ip6 saddr; flags interval; }}
  set unchecked {{ type ifname; }}
  map egress {{ type ifname : verdict; }}
  map ingress {{ type ifname : verdict; }}
  map hops {{ type ifname : verdict; }}
{hops}
  chain source {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{UPLINK}" ip saddr {cidr} counter name unassigned_source drop
    {spoofed6}
    iifname @unchecked accept
    iifname "{PORT}*" ip6 saddr fe80::/10 accept
    iifname "{PORT}*" ip6 saddr :: icmpv6 type {{ nd-neighbor-solicit, nd-router-solicit, mld2-listener-report }} accept
    iifname "{PORT}*" meta nfproto ipv4 iifname . ip saddr != @owned4 counter name unassigned_source drop
    iifname "{PORT}*" meta nfproto ipv6 iifname . ip6 saddr != @owned6 counter name unassigned_source drop
  }}

  chain destination {{
    oifname @unchecked return
    meta nfproto ipv4 oifname . ip daddr != @owned4 counter name unassigned_destination drop
    meta nfproto ipv6 oifname . ip6 daddr != @owned6 counter name unassigned_destination drop
  }}

  chain forward {{
    type filter hook forward priority filter; policy drop;
    oifname "{PORT}*" jump destination
    ct state established,related accept
    ct state invalid drop
    iifname vmap @egress
    iifname "{PORT}*" oifname "{UPLINK}" accept
    oifname vmap @ingress
    counter name group_denied
  }}

  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established,related accept
    iifname "{PORT}*" ip daddr {resolver} udp dport 53 accept
    iifname "{PORT}*" ip daddr {resolver} tcp dport {{ 53, {API_PORT} }} accept
    iifname "{PORT}*" ip daddr {metadata} tcp dport 80 accept
    icmp type echo-request accept
    meta l4proto ipv6-icmp accept
    iifname "{PORT}*" ip protocol tcp reject with tcp reset
  }}

  chain output {{
    type filter hook output priority mangle; policy accept;
    ip saddr {metadata} oifname vmap @hops
  }}

  chain nat {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{UPLINK}" ip saddr {cidr} snat ip to {nat}
  }}
}}
"#
    )
}

/// Opens a port: its groups' chains, the addresses that are its own.
pub(super) fn open(script: &mut String, link: &str, port: &Port, groups: &[SecurityGroup]) {
    let held = groups
        .iter()
        .filter(|group| port.groups.contains(&group.id));
    let (egress, ingress): (Vec<_>, Vec<_>) =
        held.map(|group| (&group.egress, &group.ingress)).unzip();
    chain(
        script,
        &format!("out-{link}"),
        "daddr",
        "return",
        egress.into_iter().flatten(),
    );
    chain(
        script,
        &format!("in-{link}"),
        "saddr",
        "accept",
        ingress.into_iter().flatten(),
    );
    line(
        script,
        format_args!("add element inet vpc egress {{ \"{link}\" : jump out-{link} }}"),
    );
    line(
        script,
        format_args!("add element inet vpc ingress {{ \"{link}\" : jump in-{link} }}"),
    );
    let hops = port.hop_limit;
    line(
        script,
        format_args!("add element inet vpc hops {{ \"{link}\" : goto hop-{hops} }}"),
    );
    if !port.source_check {
        line(
            script,
            format_args!("add element inet vpc unchecked {{ \"{link}\" }}"),
        );
    }
    owned(script, "add", link, &port.addresses, &port.ipv6);
}

/// Takes away all that [`open`] made.
pub(super) fn close(script: &mut String, link: &str, port: &Port) {
    line(
        script,
        format_args!("delete element inet vpc egress {{ \"{link}\" }}"),
    );
    line(
        script,
        format_args!("delete element inet vpc ingress {{ \"{link}\" }}"),
    );
    line(
        script,
        format_args!("delete element inet vpc hops {{ \"{link}\" }}"),
    );
    if !port.source_check {
        line(
            script,
            format_args!("delete element inet vpc unchecked {{ \"{link}\" }}"),
        );
    }
    owned(script, "delete", link, &port.addresses, &port.ipv6);
    for chain in ["out", "in"] {
        line(script, format_args!("flush chain inet vpc {chain}-{link}"));
        line(script, format_args!("delete chain inet vpc {chain}-{link}"));
    }
}

/// Adds or deletes a port's addresses.
pub(super) fn owned<'a>(
    script: &mut String,
    verb: &str,
    link: &str,
    v4: impl IntoIterator<Item = &'a Ipv4Addr>,
    v6: impl IntoIterator<Item = &'a Ipv6Net>,
) {
    for address in v4 {
        let element = format_args!("{verb} element inet vpc owned4 {{ \"{link}\" . {address} }}");
        line(script, element);
    }
    for net in v6 {
        line(
            script,
            format_args!("{verb} element inet vpc owned6 {{ \"{link}\" . {net} }}"),
        );
    }
}

fn chain<'a>(
    script: &mut String,
    name: &str,
    side: &str,
    verdict: &str,
    permissions: impl Iterator<Item = &'a Permission>,
) {
    line(script, format_args!("add chain inet vpc {name}"));
    for permission in permissions {
        let what = matching(permission);
        for cidr in &permission.cidrs {
            let family = match cidr {
                IpNet::V4(_) => "ip",
                IpNet::V6(_) => "ip6",
            };
            let rule =
                format_args!("add rule inet vpc {name} {family} {side} {cidr} {what}{verdict}");
            line(script, rule);
        }
    }
    line(
        script,
        format_args!("add rule inet vpc {name} counter name group_denied drop"),
    );
}

fn matching(permission: &Permission) -> String {
    let protocol = match permission.protocol {
        None => return String::new(),
        Some(Protocol::Icmp) => return "meta l4proto { icmp, ipv6-icmp } ".into(),
        Some(Protocol::Tcp) => "tcp",
        Some(Protocol::Udp) => "udp",
    };
    match permission.ports {
        None => format!("meta l4proto {protocol} "),
        Some((first, last)) => format!("{protocol} dport {first}-{last} "),
    }
}

fn line(script: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(script, "{text}");
}

/// Loads a script as one transaction.
pub(crate) fn load(namespace: &Namespace, script: &str) -> Result<(), Error> {
    if script.is_empty() {
        return Ok(());
    }
    let command = Command::new("nft")
        .args(["-f", "-"])
        .stdin_piped()
        .stdout(Output::Null);
    let mut child = command.stderr(Output::Piped).spawn(namespace)?;
    let written = child
        .stdin
        .take()
        .map_or(Ok(()), |mut pipe| pipe.write_all(script.as_bytes()));
    let output = child
        .wait_with_output()
        .map_err(system("waiting for nft"))?;
    if output.status.success() && written.is_ok() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(Error::Rules {
        namespace: namespace.name().into(),
        said,
        script: script.into(),
    })
}

/// Addresses that one set has and the other has not.
pub(super) fn missing<T: Ord + Copy>(from: &BTreeSet<T>, than: &BTreeSet<T>) -> Vec<T> {
    from.difference(than).copied().collect()
}
