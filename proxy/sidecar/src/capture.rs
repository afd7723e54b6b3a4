//! Taking over captured connections: listeners, and where a connection was going.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use nix::sys::socket::{getsockopt, sockopt};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::config::OWN_PORTS;

/// How the destination of a captured connection is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OriginalDestination {
    /// The node's rules redirected it; the kernel's connection tracking remembers.
    Kernel,
    /// Always the same one: a listener that stands for a single destination.
    Fixed(SocketAddr),
}

impl OriginalDestination {
    pub(crate) fn of(self, stream: &TcpStream) -> io::Result<SocketAddr> {
        match self {
            Self::Fixed(address) => Ok(address),
            Self::Kernel => {
                let socket = stream.as_fd();
                let local = stream.local_addr()?;
                if local.is_ipv4() {
                    original_v4(&socket)
                } else {
                    original_v6(&socket)
                }
            }
        }
    }
}

fn original_v4(socket: &impl AsFd) -> io::Result<SocketAddr> {
    let raw = getsockopt(socket, sockopt::OriginalDst)?;
    let address = IpAddr::from(u32::from_be(raw.sin_addr.s_addr).to_be_bytes());
    Ok(SocketAddr::new(address, u16::from_be(raw.sin_port)))
}

fn original_v6(socket: &impl AsFd) -> io::Result<SocketAddr> {
    let raw = getsockopt(socket, sockopt::Ip6tOriginalDst)?;
    let address = IpAddr::from(raw.sin6_addr.s6_addr);
    Ok(SocketAddr::new(address, u16::from_be(raw.sin6_port)))
}

/// Whether a connection to `destination` would come back to this proxy.
pub(crate) fn is_loop(destination: SocketAddr, pod: &[IpAddr], listeners: &[SocketAddr]) -> bool {
    let own_address = destination.ip().is_loopback()
        || destination.ip().is_unspecified()
        || pod.contains(&destination.ip());
    let own_port = OWN_PORTS.contains(&destination.port());
    listeners.contains(&destination) || own_address && own_port
}

/// Binds a listener. One that other workers' connections are handed out from as well.
pub(crate) fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        // The family's own listener takes IPv4, so that addresses come unmapped.
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// Whether binding failed because the machine does not have the family at all.
pub(crate) fn no_such_family(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let code = error.raw_os_error().map(Errno::from_raw);
    matches!(code, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}

/// How long to rest when descriptors or memory are short: connections that end meanwhile free
/// some, and the kernel's queue holds what arrives.
const REST: Duration = Duration::from_millis(50);

/// The next connection. Errors of a single connection are passed over; when the machine is short
/// of something, `short` is told and the wait goes on.
pub(crate) async fn accept(
    listener: &TcpListener,
    mut short: impl FnMut(&io::Error),
) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                short(&error);
                tokio::time::sleep(REST).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_proxys_own_doors_are_loops() {
        let pod = ["10.0.0.5".parse().unwrap()];
        let listeners = ["127.0.0.1:4000".parse().unwrap()];
        for (destination, expected) in [
            ("10.0.0.5:15006", true),
            ("127.0.0.1:15001", true),
            ("[::1]:15000", true),
            ("127.0.0.1:4000", true),
            ("10.0.0.5:8080", false),
            ("10.0.0.6:15020", false),
        ] {
            let destination = destination.parse().unwrap();
            assert_eq!(
                is_loop(destination, &pod, &listeners),
                expected,
                "{destination}"
            );
        }
    }
}
