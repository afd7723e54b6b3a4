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
     CAP_NET_BIND_SERVICE, in the node's network namespace"
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
        .map(|ip| {
            listener(
                "claimed connections",
                SocketAddr::new(*ip, door),
                Place::Anywhere,
            )
        })
        .collect::<Result<_, _>>()?;
    let dns: Vec<_> = dns.iter().map(|ip| SocketAddr::new(*ip, 53)).collect();
    let udp = |address: &SocketAddr| {
        socket(*address, Type::DGRAM, Protocol::UDP, Place::Later)
            .map(UdpSocket::from)
            .map_err(|source| BindError {
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
            .map(|address| listener("DNS", *address, Place::Later))
            .collect::<Result<_, _>>()?,
        http: listener("metrics and health", http, Place::Here)?,
    })
}

/// Where the address that a socket is bound to is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Here,
    /// The agent puts it on a link; whoever of the two starts first must not matter.
    Later,
    /// Connections to addresses that are not the node's are taken too.
    Anywhere,
}

fn listener(
    what: &'static str,
    address: SocketAddr,
    place: Place,
) -> Result<TcpListener, BindError> {
    let listen = || {
        let socket = socket(address, Type::STREAM, Protocol::TCP, place)?;
        socket.listen(BACKLOG)?;
        Ok(TcpListener::from(socket))
    };
    listen().map_err(|source| BindError {
        what,
        address,
        source,
    })
}

fn socket(address: SocketAddr, kind: Type, protocol: Protocol, place: Place) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind.cloexec(), Some(protocol))?;
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    match (address, place) {
        (_, Place::Here) => {}
        (SocketAddr::V4(_), Place::Later) => socket.set_freebind_v4(true)?,
        (SocketAddr::V6(_), Place::Later) => socket.set_freebind_v6(true)?,
        (SocketAddr::V4(_), Place::Anywhere) => socket.set_ip_transparent_v4(true)?,
        (SocketAddr::V6(_), Place::Anywhere) => socket.set_ip_transparent_v6(true)?,
    }
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
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
