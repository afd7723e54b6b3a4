//! The sockets the gate is reached by: bound while privileged, used after.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
};

use socket2::{Domain, Protocol, Socket, Type};

const BACKLOG: i32 = 1024;

/// Everything bound; no privilege is needed afterwards.
#[derive(Debug)]
pub struct Sockets {
    pub door: Vec<TcpListener>,
    pub dns_udp: Vec<UdpSocket>,
    pub dns_tcp: Vec<TcpListener>,
    pub http: TcpListener,
}

/// A socket that could not be bound.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen for {what} on {address}: {source}; the gate starts with CAP_NET_RAW and \
     CAP_NET_BIND_SERVICE, in the node's network namespace, and DNS addresses must be on a link"
)]
pub struct BindError {
    what: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// Binds all of them.
pub fn bind(door: u16, dns: &[IpAddr], http: SocketAddr) -> Result<Sockets, BindError> {
    let wildcards: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let door = wildcards
        .iter()
        .map(|ip| listener("claimed connections", SocketAddr::new(*ip, door), true))
        .collect::<Result<_, _>>()?;
    let dns: Vec<_> = dns.iter().map(|ip| SocketAddr::new(*ip, 53)).collect();
    let udp = |address: &SocketAddr| {
        UdpSocket::bind(address).map_err(|source| BindError {
            what: "DNS",
            address: *address,
            source,
        })
    };
    Ok(Sockets {
        door,
        dns_udp: dns.iter().map(udp).collect::<Result<_, _>>()?,
        dns_tcp: dns
            .iter()
            .map(|address| listener("DNS", *address, false))
            .collect::<Result<_, _>>()?,
        http: listener("metrics and health", http, false)?,
    })
}

/// `transparent`: also takes connections to addresses that are not the node's.
fn listener(
    what: &'static str,
    address: SocketAddr,
    transparent: bool,
) -> Result<TcpListener, BindError> {
    let bind = || {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::STREAM.cloexec(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        match address {
            SocketAddr::V4(_) if transparent => socket.set_ip_transparent_v4(true)?,
            SocketAddr::V4(_) => {}
            SocketAddr::V6(_) => {
                socket.set_only_v6(true)?;
                if transparent {
                    socket.set_ip_transparent_v6(true)?;
                }
            }
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(TcpListener::from(socket))
    };
    bind().map_err(|source| BindError {
        what,
        address,
        source,
    })
}

impl Sockets {
    /// For the async runtime.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        let Self {
            door,
            dns_udp,
            dns_tcp,
            http,
        } = self;
        for listener in door.iter().chain(dns_tcp).chain([http]) {
            listener.set_nonblocking(true)?;
        }
        dns_udp
            .iter()
            .try_for_each(|socket| socket.set_nonblocking(true))
    }
}
