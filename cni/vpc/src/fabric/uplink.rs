//! What is there from the start, beside the ports: the link between router and internet, the
//! router's own addresses, and what the kernel must not do by itself.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

use super::{
    Error, Namespaces, anywhere4, anywhere6, isolation,
    links::{Links, Peer, Via},
    rules::UPLINK,
};
use crate::{
    netns::Namespace,
    spec::{METADATA, Spec},
};

/// As the internet's mostly is.
const INTERNET_MTU: u32 = 1500;
/// The link between router and internet, for IPv6.
const UPLINK6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 2),
];

/// Joins the two, and gives the router its own addresses.
pub(super) async fn join(spec: &Spec, namespaces: &Namespaces, links: &Links) -> Result<(), Error> {
    let [near4, far4] = uplink4(spec.nat_address());
    let peer = Peer {
        namespace: &namespaces.internet,
        link: "eth0".into(),
        mac: None,
        up: true,
    };
    let uplink = links.add_veth(UPLINK, INTERNET_MTU, peer).await?;
    links.add_address(uplink, near4.into()).await?;
    links
        .add_address(uplink, Ipv6Net::new_assert(UPLINK6[0], 64).into())
        .await?;
    links
        .add_route(anywhere4(), Via::Neighbour(uplink, far4.addr().into()))
        .await?;
    links
        .add_route(anywhere6(), Via::Neighbour(uplink, UPLINK6[1].into()))
        .await?;
    for private in isolation::unreachable(spec) {
        links.add_route(private, Via::Unreachable).await?;
    }
    let lo = links.index("lo").await?;
    for own in [spec.resolver(), METADATA] {
        links.add_address(lo, Ipv4Net::from(own).into()).await?;
    }

    let internet = Links::open(&namespaces.internet)?;
    let (eth0, lo) = (internet.index("eth0").await?, internet.index("lo").await?);
    internet.add_address(eth0, far4.into()).await?;
    internet
        .add_address(eth0, Ipv6Net::new_assert(UPLINK6[1], 64).into())
        .await?;
    if let Some(v6) = spec.ipv6_cidr() {
        let via = Via::Neighbour(eth0, UPLINK6[0].into());
        internet.add_route(v6.into(), via).await?;
    }
    // Every address of the internet is here, so that whatever leaves the VPC is seen.
    internet.add_route(anywhere4(), Via::Here(lo)).await?;
    internet.add_route(anywhere6(), Via::Here(lo)).await
}

/// Nothing in a box asks whether an address is taken, sends redirects, or takes routes from
/// strangers.
pub(super) fn quiet(namespace: &Namespace) -> Result<(), Error> {
    for scope in ["all", "default"] {
        namespace.sysctl(&format!("ipv4/conf/{scope}/rp_filter"), "0")?;
        namespace.sysctl(&format!("ipv4/conf/{scope}/send_redirects"), "0")?;
        namespace.sysctl(&format!("ipv6/conf/{scope}/accept_dad"), "0")?;
        namespace.sysctl(&format!("ipv6/conf/{scope}/accept_ra"), "0")?;
    }
    Ok(())
}

/// Both ends of the link to the internet: the NAT address and its neighbour.
fn uplink4(nat: Ipv4Addr) -> [Ipv4Net; 2] {
    let far = Ipv4Addr::from(u32::from(nat) ^ 1);
    [Ipv4Net::new_assert(nat, 31), Ipv4Net::new_assert(far, 31)]
}
