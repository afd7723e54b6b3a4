//! Links, addresses and routes of one namespace, by netlink.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd},
};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        link::{InfoData, InfoKind, InfoVeth},
        route::{RouteMessage, RouteScope, RouteType},
    },
};
use tokio::task::JoinHandle;

use super::{Error, netlink};
use crate::{
    netns::{self, Namespace},
    world::Mac,
};

/// A netlink socket made inside a namespace; it works there from any thread.
#[derive(Debug)]
pub(super) struct Links {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The far end of a veth pair.
pub(super) struct Peer<'a> {
    pub(super) namespace: &'a Namespace,
    pub(super) link: String,
    pub(super) mac: Option<Mac>,
    pub(super) up: bool,
}

/// Where a route leads.
pub(super) enum Via {
    Link(u32),
    /// A neighbour on a link, whatever addresses that link has.
    Neighbour(u32, IpAddr),
    /// Delivered here, as if each address were ours.
    Here(u32),
    Unreachable,
}

impl Links {
    pub(super) fn open(namespace: &Namespace) -> Result<Self, Error> {
        let runtime = tokio::runtime::Handle::current();
        let opened = namespace.run(|| {
            let _entered = runtime.enter();
            rtnetlink::new_connection()
        })?;
        let (connection, handle, _) = opened.map_err(netns::system("opening a netlink socket"))?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    pub(super) async fn index(&self, link: &str) -> Result<u32, Error> {
        let mut found = self.handle.link().get().match_name(link).execute();
        let message = found
            .try_next()
            .await
            .map_err(netlink(format!("finding link {link}")))?;
        message
            .map(|message| message.header.index)
            .ok_or_else(|| Error::NoLink(link.into()))
    }

    /// A veth pair with its near end up; returns the near end's index.
    pub(super) async fn add_veth(
        &self,
        link: &str,
        mtu: u32,
        peer: Peer<'_>,
    ) -> Result<u32, Error> {
        let target = peer.namespace.fd()?;
        let mut far = LinkMessageBuilder::<LinkUnspec>::new()
            .name(peer.link.as_str())
            .mtu(mtu)
            .setns_by_fd(target.as_fd().as_raw_fd());
        if let Some(Mac(octets)) = peer.mac {
            far = far.address(octets.to_vec());
        }
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(link)
            .mtu(mtu)
            .up()
            .set_info_data(InfoData::Veth(InfoVeth::Peer(far.build())))
            .build();
        let action = format!(
            "joining {link} to {} in `{}`",
            peer.link,
            peer.namespace.name()
        );
        self.handle
            .link()
            .add(message)
            .execute()
            .await
            .map_err(netlink(action))?;
        // A veth does not come up before its peer exists.
        if peer.up {
            Self::open(peer.namespace)?.set_up(&peer.link).await?;
        }
        self.index(link).await
    }

    async fn set_up(&self, link: &str) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(self.index(link).await?)
            .up()
            .build();
        let raised = self.handle.link().set(message).execute().await;
        raised.map_err(netlink(format!("raising link {link}")))
    }

    /// Absent already is done.
    pub(super) async fn delete(&self, link: &str) -> Result<(), Error> {
        let index = match self.index(link).await {
            Ok(index) => index,
            Err(Error::NoLink(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        let deleted = self.handle.link().del(index).execute().await;
        deleted.map_err(netlink(format!("deleting link {link}")))
    }

    pub(super) async fn add_address(&self, link: u32, address: IpNet) -> Result<(), Error> {
        let request = self
            .handle
            .address()
            .add(link, address.addr(), address.prefix_len());
        request
            .execute()
            .await
            .map_err(netlink(format!("adding address {address}")))
    }

    pub(super) async fn add_route(&self, to: IpNet, via: Via) -> Result<(), Error> {
        let request = self.handle.route().add(route(to, via)).replace();
        request
            .execute()
            .await
            .map_err(netlink(format!("adding the route to {to}")))
    }

    /// Absent already is done.
    pub(super) async fn delete_route(&self, to: IpNet, via: Via) -> Result<(), Error> {
        let deleted = self.handle.route().del(route(to, via)).execute().await;
        match deleted.map_err(netlink(format!("deleting the route to {to}"))) {
            Err(error) if error.is_absence() => Ok(()),
            other => other,
        }
    }

    /// The fabric knows who has which address, so it never asks.
    pub(super) async fn add_neighbour(
        &self,
        link: u32,
        address: IpAddr,
        mac: Mac,
    ) -> Result<(), Error> {
        let request = self
            .handle
            .neighbours()
            .add(link, address)
            .link_layer_address(&mac.0);
        let added = request.replace().execute().await;
        added.map_err(netlink(format!("adding neighbour {address}")))
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }
}

fn route(to: IpNet, via: Via) -> RouteMessage {
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new();
    match to {
        IpNet::V4(net) => {
            let to = v4.destination_prefix(net.network(), net.prefix_len());
            match via {
                Via::Link(link) => to.output_interface(link).build(),
                Via::Neighbour(link, IpAddr::V4(next)) => {
                    to.output_interface(link).gateway(next).onlink().build()
                }
                Via::Here(link) => to
                    .output_interface(link)
                    .kind(RouteType::Local)
                    .scope(RouteScope::Host)
                    .build(),
                Via::Neighbour(_, IpAddr::V6(_)) | Via::Unreachable => {
                    to.kind(RouteType::Unreachable).build()
                }
            }
        }
        IpNet::V6(net) => {
            let to = v6.destination_prefix(net.network(), net.prefix_len());
            match via {
                Via::Link(link) => to.output_interface(link).build(),
                Via::Neighbour(link, IpAddr::V6(next)) => {
                    to.output_interface(link).gateway(next).onlink().build()
                }
                Via::Here(link) => to.output_interface(link).kind(RouteType::Local).build(),
                Via::Neighbour(_, IpAddr::V4(_)) | Via::Unreachable => {
                    to.kind(RouteType::Unreachable).build()
                }
            }
        }
    }
}
