//! Whoever calls any other port of any address is heard, and told so.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::JoinSet,
};

use super::{
    Directory, Error, Log, listen,
    log::{Arrival, FIRST},
    transparent,
};
use crate::netns::Namespace;

/// Where everything is handed to; itself no port of any host's.
pub(super) const PORT: u16 = 4;
const CONNECTIONS: usize = 1024;
const IDLE: Duration = Duration::from_secs(60);

/// One sink for a family: TCP, UDP and ICMP.
pub(super) fn start(
    namespace: &Namespace,
    family: IpAddr,
    directory: &Directory,
    log: &Arc<Log>,
    tasks: &mut JoinSet<()>,
) -> Result<(), Error> {
    let address = SocketAddr::new(family, PORT);
    let listener = listen(namespace, address)?;
    let datagrams = namespace.run(|| {
        let socket = transparent(address, Type::DGRAM)?;
        if address.is_ipv4() {
            setsockopt(&socket, sockopt::Ipv4OrigDstAddr, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv6OrigDstAddr, &true)?;
        }
        Ok::<_, io::Error>(socket)
    })??;
    let echoes = namespace.run(|| raw(family))??;
    // A raw socket reads and waits as a UDP socket does.
    let datagrams = UdpSocket::from_std(datagrams.into())?;
    let echoes = UdpSocket::from_std(echoes.into())?;
    tasks.spawn(serve_tcp(listener, directory.clone(), Arc::clone(log)));
    tasks.spawn(serve_udp(datagrams, directory.clone(), Arc::clone(log)));
    tasks.spawn(serve_icmp(echoes, directory.clone(), Arc::clone(log)));
    Ok(())
}

/// Sees every ICMP message beside the kernel, which answers echoes.
fn raw(family: IpAddr) -> io::Result<Socket> {
    let (domain, protocol) = match family {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    if family.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true).map_err(io::Error::from)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

async fn serve_tcp(listener: TcpListener, directory: Directory, log: Arc<Log>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let Ok((stream, peer)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        // A transparent socket's own address is the one that was called.
        let Ok(local) = stream.local_addr() else {
            continue;
        };
        let arrival = Arrival {
            host: directory.name(local.ip()),
            protocol: "tcp",
            local,
            peer,
        };
        let log = Arc::clone(&log);
        connections.spawn(async move {
            let _place = place;
            let id = log.open(&arrival);
            let (first, bytes) = swallow(stream).await;
            log.close(id, &arrival, None, &first, bytes);
        });
    }
}

/// Reads to the end; says `ok` once something came, so that the sender knows that it arrived.
async fn swallow(mut stream: TcpStream) -> (Vec<u8>, u64) {
    let (mut first, mut bytes) = (Vec::new(), 0);
    let mut buffer = vec![0; 1 << 16];
    while let Ok(Ok(length)) = tokio::time::timeout(IDLE, stream.read(&mut buffer)).await {
        if length == 0 {
            break;
        }
        if bytes == 0 && stream.write_all(b"ok\n").await.is_err() {
            bytes += u64::try_from(length).unwrap_or(0);
            break;
        }
        bytes += u64::try_from(length).unwrap_or(0);
        let room = FIRST.saturating_sub(first.len());
        first.extend(buffer[..length].iter().take(room));
    }
    (first, bytes)
}

async fn serve_udp(socket: UdpSocket, directory: Directory, log: Arc<Log>) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let received = receive(&socket, &mut buffer).await;
        let (length, Some(peer), Some(local)) = received else {
            continue;
        };
        let host = directory.name(local.ip());
        let arrival = Arrival {
            host,
            protocol: "udp",
            local,
            peer,
        };
        log.datagram(&arrival, &buffer[..length]);
    }
}

async fn serve_icmp(socket: UdpSocket, directory: Directory, log: Arc<Log>) {
    const ECHO4: u8 = 8;
    const ECHO6: u8 = 128;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let (length, Some(peer), local) = receive(&socket, &mut buffer).await else {
            continue;
        };
        let packet = &buffer[..length];
        // IPv4 comes with its header, which also holds the destination.
        let (kind, message, local) = match (peer.ip(), packet) {
            (IpAddr::V4(_), [first, ..]) if packet.len() >= 20 => {
                let to: [u8; 4] = [packet[16], packet[17], packet[18], packet[19]];
                let message = packet
                    .get(usize::from(first & 0x0f) * 4..)
                    .unwrap_or_default();
                (ECHO4, message, Some(IpAddr::V4(Ipv4Addr::from(to))))
            }
            _ => (ECHO6, packet, local.map(|local| local.ip())),
        };
        let (true, Some(local)) = (message.first() == Some(&kind), local) else {
            continue;
        };
        let host = directory.name(local);
        let local = SocketAddr::new(local, 0);
        let arrival = Arrival {
            host,
            protocol: "icmp",
            local,
            peer,
        };
        log.datagram(&arrival, message);
    }
}

/// A datagram's length, its sender, and where it was sent to.
async fn receive(
    socket: &UdpSocket,
    buffer: &mut [u8],
) -> (usize, Option<SocketAddr>, Option<SocketAddr>) {
    let received = socket.async_io(Interest::READABLE, || receive_now(socket, buffer));
    received.await.unwrap_or_else(|error| {
        tracing::debug!(%error, "receiving datagrams");
        (0, None, None)
    })
}

fn receive_now(
    socket: &UdpSocket,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<SocketAddr>, Option<SocketAddr>)> {
    let mut parts = [io::IoSliceMut::new(buffer)];
    let mut control = nix::cmsg_space!(libc::sockaddr_in6, libc::in6_pktinfo);
    let flags = MsgFlags::empty();
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let local = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4OrigDstAddr(to) => {
            let address = Ipv4Addr::from(u32::from_be(to.sin_addr.s_addr));
            Some(SocketAddr::new(address.into(), u16::from_be(to.sin_port)))
        }
        ControlMessageOwned::Ipv6OrigDstAddr(to) => {
            let address = Ipv6Addr::from(to.sin6_addr.s6_addr);
            Some(SocketAddr::new(address.into(), u16::from_be(to.sin6_port)))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(SocketAddr::new(
            Ipv6Addr::from(info.ipi6_addr.s6_addr).into(),
            0,
        )),
        _ => None,
    });
    let peer = message.address.and_then(|address| {
        let v4 = address
            .as_sockaddr_in()
            .map(|a| SocketAddr::new(a.ip().into(), a.port()));
        v4.or_else(|| {
            address
                .as_sockaddr_in6()
                .map(|a| SocketAddr::new(a.ip().into(), a.port()))
        })
    });
    Ok((message.bytes, peer, local))
}
