//! The messages that make and describe links, addresses, routes, neighbours and policy rules.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::RawFd,
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
        RouteScope, RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::{Error, Mac, netlink::Rtnl};

/// What a link's message tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) mac: Option<Mac>,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
    pub(crate) veth: bool,
    pub(crate) alias: Option<String>,
}

impl Link {
    fn read(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mac: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            veth: false,
            alias: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(bytes) => link.mac = Mac::try_from(&bytes[..]).ok(),
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::LinkInfo(info) => {
                    link.veth = info.contains(&LinkInfo::Kind(InfoKind::Veth));
                }
                _ => {}
            }
        }
        link
    }

    /// The link of this name; asks for that one alone.
    pub(crate) fn find(rtnl: &mut Rtnl, name: &str) -> Result<Option<Self>, Error> {
        let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
        match rtnl.ask(false, RouteNetlinkMessage::GetLink(message)) {
            Ok(found) => Ok(read_links(found).next()),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(Error::kernel(format!("looking up link {name}"))(error)),
        }
    }

    /// All links: at start and when an ENI comes, never for a pod.
    pub(crate) fn all(rtnl: &mut Rtnl) -> Result<Vec<Self>, Error> {
        let found = rtnl.ask(true, RouteNetlinkMessage::GetLink(LinkMessage::default()));
        found
            .map(|found| read_links(found).collect())
            .map_err(Error::kernel("listing links"))
    }
}

fn read_links(found: Vec<RouteNetlinkMessage>) -> impl Iterator<Item = Link> {
    found.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(message) => Some(Link::read(message)),
        _ => None,
    })
}

/// One end of a veth pair to be.
#[derive(Clone, Debug)]
pub(crate) struct End<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: Mac,
}

/// A pair, both ends down, the peer born in the pod's namespace: moving it there would wait for a
/// grace period.
pub(crate) fn veth(host: &End<'_>, pod: &End<'_>, netns: RawFd, mtu: u32) -> RouteNetlinkMessage {
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(pod.name)
        .address(pod.mac.0.to_vec())
        .mtu(mtu)
        .setns_by_fd(netns)
        .build();
    let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(host.name)
        .address(host.mac.0.to_vec())
        .mtu(mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    RouteNetlinkMessage::NewLink(message)
}

/// A note on a link, which `ip link` shows too.
pub(crate) fn alias(index: u32, alias: &str) -> RouteNetlinkMessage {
    let builder = LinkMessageBuilder::<LinkUnspec>::new()
        .index(index)
        .alias(alias);
    RouteNetlinkMessage::SetLink(builder.build())
}

pub(crate) fn up(index: u32) -> RouteNetlinkMessage {
    let builder = LinkMessageBuilder::<LinkUnspec>::new().index(index).up();
    RouteNetlinkMessage::SetLink(builder.build())
}

pub(crate) fn mtu(index: u32, mtu: u32) -> RouteNetlinkMessage {
    let builder = LinkMessageBuilder::<LinkUnspec>::new()
        .index(index)
        .mtu(mtu);
    RouteNetlinkMessage::SetLink(builder.build())
}

pub(crate) fn delete(index: u32) -> RouteNetlinkMessage {
    let builder = LinkMessageBuilder::<LinkUnspec>::new().index(index);
    RouteNetlinkMessage::DelLink(builder.build())
}

pub(crate) fn join_group(index: u32, group: u32) -> RouteNetlinkMessage {
    let builder = LinkMessageBuilder::<LinkUnspec>::new()
        .index(index)
        .link_group(group);
    RouteNetlinkMessage::SetLink(builder.build())
}

pub(crate) fn delete_group(group: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::DelLink(
        LinkMessageBuilder::<LinkUnspec>::new()
            .link_group(group)
            .build(),
    )
}

/// A host address. `local`: for this machine alone, never chosen as the source of anything else.
pub(crate) fn address(index: u32, address: IpAddr, local: bool) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = full_length(address);
    message.header.index = index;
    message.header.scope = if local {
        AddressScope::Host
    } else {
        AddressScope::Universe
    };
    message.attributes.push(AddressAttribute::Address(address));
    message.attributes.push(AddressAttribute::Local(address));
    if address.is_ipv6() {
        // Duplicate detection would hold it back for a second, on a link where nobody else is.
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    RouteNetlinkMessage::NewAddress(message)
}

pub(crate) fn all_addresses(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.family = family;
    RouteNetlinkMessage::GetAddress(message)
}

pub(crate) fn permanent_neighbour(index: u32, address: IpAddr, mac: Mac) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    let destination = match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    message
        .attributes
        .push(NeighbourAttribute::Destination(destination));
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    RouteNetlinkMessage::NewNeighbour(message)
}

/// Whose hardware address stands for an address on a link, because somebody said so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Neighbour {
    pub(crate) index: u32,
    pub(crate) address: IpAddr,
    pub(crate) mac: Mac,
}

impl Neighbour {
    fn read(message: &NeighbourMessage) -> Option<Self> {
        let (mut address, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                    address = Some(IpAddr::V4(*v4));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                    address = Some(IpAddr::V6(*v6));
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = Mac::try_from(&bytes[..]).ok(),
                _ => {}
            }
        }
        Some(Self {
            index: message.header.ifindex,
            address: address?,
            mac: mac?,
        })
    }
}

/// All of them, of every link.
pub(crate) fn permanent_neighbours(rtnl: &mut Rtnl) -> io::Result<Vec<Neighbour>> {
    let all = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    let found = rtnl.ask(true, all)?.into_iter();
    let permanent = found.filter_map(|message| match message {
        RouteNetlinkMessage::NewNeighbour(message)
            if message.header.state == NeighbourState::Permanent =>
        {
            Neighbour::read(&message)
        }
        _ => None,
    });
    Ok(permanent.collect())
}

/// A route as this crate makes and finds them. `to` None: the default.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Route {
    pub(crate) v6: bool,
    pub(crate) to: Option<IpAddr>,
    pub(crate) via: Option<IpAddr>,
    pub(crate) index: u32,
    pub(crate) table: u32,
    /// Source of what the node itself sends by it.
    pub(crate) source: Option<IpAddr>,
}

impl Route {
    pub(crate) fn link(to: IpAddr, index: u32, table: u32) -> Self {
        Self {
            v6: to.is_ipv6(),
            to: Some(to),
            via: None,
            index,
            table,
            source: None,
        }
    }

    pub(crate) fn default(via: IpAddr, index: u32, table: u32) -> Self {
        Self {
            v6: via.is_ipv6(),
            to: None,
            via: Some(via),
            index,
            table,
            source: None,
        }
    }

    pub(crate) fn build(&self) -> RouteNetlinkMessage {
        let mut message = RouteMessage::default();
        let header = &mut message.header;
        header.address_family = if self.v6 {
            AddressFamily::Inet6
        } else {
            AddressFamily::Inet
        };
        header.destination_prefix_length = self.to.map_or(0, full_length);
        header.protocol = RouteProtocol::Static;
        header.kind = RouteType::Unicast;
        header.scope = if self.via.is_none() && !self.v6 {
            RouteScope::Link
        } else {
            RouteScope::Universe
        };
        set_table(&mut message, self.table);
        message.attributes.push(RouteAttribute::Oif(self.index));
        message
            .attributes
            .extend(self.to.map(|to| RouteAttribute::Destination(raw(to))));
        if let Some(via) = self.via {
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(raw(via)));
        }
        message.attributes.extend(
            self.source
                .map(|from| RouteAttribute::PrefSource(raw(from))),
        );
        RouteNetlinkMessage::NewRoute(message)
    }

    /// All routes of one table.
    pub(crate) fn all(rtnl: &mut Rtnl, v6: bool, table: u32) -> io::Result<Vec<Self>> {
        let mut message = RouteMessage::default();
        message.header.address_family = if v6 {
            AddressFamily::Inet6
        } else {
            AddressFamily::Inet
        };
        set_table(&mut message, table);
        let found = match rtnl.ask(true, RouteNetlinkMessage::GetRoute(message)) {
            // Asked for by number, a table that was never used does not exist.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Vec::new(),
            other => other?,
        };
        let routes = found.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(message) => Some(Self::read(&message)),
            _ => None,
        });
        Ok(routes.filter(|route| route.table == table).collect())
    }

    fn read(message: &RouteMessage) -> Self {
        let mut route = Self {
            v6: message.header.address_family == AddressFamily::Inet6,
            to: None,
            via: None,
            index: 0,
            table: message.header.table.into(),
            source: None,
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(to) => route.to = cooked(to),
                RouteAttribute::Gateway(via) => route.via = cooked(via),
                RouteAttribute::PrefSource(source) => route.source = cooked(source),
                RouteAttribute::Oif(index) => route.index = *index,
                RouteAttribute::Table(table) => route.table = *table,
                _ => {}
            }
        }
        route
    }
}

/// Everything is local in this table: what is looked up there is delivered here.
pub(crate) fn deliver_locally(v6: bool, loopback: u32, table: u32) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = if v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Local;
    message.header.scope = RouteScope::Host;
    set_table(&mut message, table);
    message.attributes.push(RouteAttribute::Oif(loopback));
    RouteNetlinkMessage::NewRoute(message)
}

/// A policy rule; `mark` is value and mask.
pub(crate) fn rule(v6: bool, preference: u32, mark: Option<(u32, u32)>, table: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    message.header.action = RuleAction::ToTable;
    message.attributes.push(RuleAttribute::Priority(preference));
    message.attributes.push(RuleAttribute::Table(table));
    if let Some((value, mask)) = mark {
        message.attributes.push(RuleAttribute::FwMark(value));
        message.attributes.push(RuleAttribute::FwMask(mask));
    }
    message
}

fn set_table(message: &mut RouteMessage, table: u32) {
    match u8::try_from(table) {
        Ok(small) => message.header.table = small,
        Err(_) => {
            message.header.table = RouteHeader::RT_TABLE_UNSPEC;
            message.attributes.push(RouteAttribute::Table(table));
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

fn full_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn raw(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

fn cooked(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// The gateways that every pod has: nobody bears them, the host's MAC is noted for each.
pub(crate) const GATEWAY4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

pub(crate) fn gateway(v6: bool) -> IpAddr {
    if v6 { GATEWAY6.into() } else { GATEWAY4.into() }
}
