//! Proof that a box is sealed: from none of its namespaces does a way lead to the machine's own
//! network.
//!
//! Two parts. Structure: each link of each namespace is loopback or a veth whose other end lies in
//! a namespace of the same list, so there is nothing a route could lead out by. Trial: connecting
//! from the router to the machine's own addresses and gateways fails.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use futures_util::TryStreamExt;
use ipnet::{IpNet, Ipv4Net};
use nix::ifaddrs::getifaddrs;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};

use super::{Error, links::Links, netlink};
use crate::{
    netns::{Namespace, system},
    spec::Spec,
};

const TRIED_PORTS: [u16; 4] = [22, 53, 80, 443];
const PATIENCE: Duration = Duration::from_millis(300);

/// Fails unless the namespaces given, all together, are closed. Pods' namespaces belong in the
/// list once they are joined to a node's.
pub async fn prove(
    router: &Namespace,
    namespaces: &[Namespace],
    vpc: Ipv4Net,
) -> Result<(), Error> {
    for namespace in namespaces {
        check_links(namespace, namespaces).await?;
    }
    let machine = machine_addresses().map_err(system("reading the machine's addresses"))?;
    let router = router.clone();
    let tried = tokio::task::spawn_blocking(move || reach(&router, &machine, vpc)).await?;
    tried.map_err(Error::from)?.map_or(Ok(()), |address| {
        Err(Error::NotIsolated(format!(
            "the router reaches {address} of the machine's network"
        )))
    })
}

/// Networks that the router refuses to look for on the pretended internet: private ones, as a NAT
/// gateway does, and the machine's own.
pub(super) fn unreachable(spec: &Spec) -> Vec<IpNet> {
    const PRIVATE: [&str; 7] = [
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "127.0.0.0/8",
        "fc00::/7",
    ];
    let private = PRIVATE.iter().filter_map(|text| text.parse::<IpNet>().ok());
    let own = [
        Some(IpNet::from(spec.cidr())),
        spec.ipv6_cidr().map(IpNet::from),
    ];
    let machine = machine_addresses()
        .unwrap_or_default()
        .into_iter()
        .map(IpNet::from);
    let other = |net: &IpNet| {
        let mut held = spec.hosts().iter().flat_map(|host| {
            [Some(IpAddr::V4(host.v4)), host.v6.map(IpAddr::V6)]
                .into_iter()
                .flatten()
        });
        !IpNet::from(spec.cidr()).contains(net) && !held.any(|held| held == net.addr())
    };
    private
        .chain(own.into_iter().flatten())
        .chain(machine.filter(other))
        .collect()
}

async fn check_links(namespace: &Namespace, all: &[Namespace]) -> Result<(), Error> {
    let links = Links::open(namespace)?;
    let action = || format!("listing links in `{}`", namespace.name());
    let mut known: BTreeMap<i32, &str> = BTreeMap::new();
    for other in all {
        let id = links
            .handle()
            .link()
            .get_netns_id(other.name())
            .execute()
            .await;
        if let Some(id) = id.map_err(netlink(action()))? {
            known.insert(id, other.name());
        }
    }
    let mut found = links.handle().link().get().execute();
    while let Some(link) = found.try_next().await.map_err(netlink(action()))? {
        check_link(namespace, &link, &known)?;
    }
    Ok(())
}

fn check_link(
    namespace: &Namespace,
    link: &LinkMessage,
    known: &BTreeMap<i32, &str>,
) -> Result<(), Error> {
    if link.header.flags.contains(LinkFlags::Loopback) {
        return Ok(());
    }
    let name = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
    let refuse = |reason: &str| {
        let (name, within) = (name.unwrap_or("?"), namespace.name());
        Err(Error::NotIsolated(format!(
            "link {name} in `{within}` {reason}"
        )))
    };
    let veth = link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
        _ => false,
    });
    if !veth {
        return refuse("is neither loopback nor a veth");
    }
    let peer = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::LinkNetNsId(id) => Some(*id),
            _ => None,
        });
    match peer {
        // The other end is in the same namespace.
        None => Ok(()),
        Some(id) if known.contains_key(&id) => Ok(()),
        Some(_) => refuse("has its other end outside the box"),
    }
}

/// The machine's own addresses and its gateways.
fn machine_addresses() -> io::Result<Vec<IpAddr>> {
    let mut addresses: Vec<IpAddr> = getifaddrs()?
        .filter_map(|interface| interface.address)
        .filter_map(|address| {
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .filter(|address| !address.is_loopback())
        .filter(|address| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()))
        .collect();
    // Third column: the gateway in hexadecimal, least significant byte first.
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let gateways = routes.lines().skip(1).filter_map(|line| {
        let number = u32::from_str_radix(line.split_whitespace().nth(2)?, 16).ok()?;
        (number != 0).then(|| IpAddr::V4(Ipv4Addr::from(number.swap_bytes())))
    });
    addresses.extend(gateways);
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// The first address that answers, if one does. What lies within the VPC is the box's own.
fn reach(
    router: &Namespace,
    machine: &[IpAddr],
    vpc: Ipv4Net,
) -> Result<Option<SocketAddr>, crate::netns::Error> {
    router.run(|| {
        let outside = machine.iter().filter(|address| match address {
            IpAddr::V4(v4) => !vpc.contains(v4),
            IpAddr::V6(_) => true,
        });
        let mut tries =
            outside.flat_map(|address| TRIED_PORTS.map(|port| SocketAddr::new(*address, port)));
        tries.find(|address| TcpStream::connect_timeout(address, PATIENCE).is_ok())
    })
}
