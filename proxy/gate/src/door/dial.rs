//! Dialling with the pod's own address.

use std::{io, net::SocketAddr, time::Duration};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

/// The node's rules let a SYN of the gate open a flow only with this mark.
const DIAL_PERMIT: u32 = 0x0020_0000;

#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error("given up: {0}")]
    GivenUp(String),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Connects as `source`: from its port where that is free, so that the flow looks to the world as
/// the pod meant it, else from another.
pub async fn dial(
    source: SocketAddr,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, DialError> {
    let connecting = async {
        match connect(source, destination).await {
            Err(error) if taken(&error) => {
                connect(SocketAddr::new(source.ip(), 0), destination).await
            }
            result => result,
        }
    };
    let stream = timeout(limit, connecting)
        .await
        .map_err(|_| DialError::TimedOut(limit))??;
    // The permit was for the SYN alone.
    SockRef::from(&stream).set_mark(0)?;
    stream.set_nodelay(true)?;
    super::accept::keep_alive(&stream)?;
    Ok(stream)
}

/// The port is another socket's, or the same four addresses are still in use.
fn taken(error: &io::Error) -> bool {
    use io::ErrorKind::{AddrInUse, AddrNotAvailable, PermissionDenied};
    // A pod may use a port below 1024; the gate may not bind it.
    matches!(
        error.kind(),
        AddrInUse | AddrNotAvailable | PermissionDenied
    )
}

async fn connect(source: SocketAddr, destination: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(
        Domain::for_address(destination),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    match destination {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    socket.set_mark(DIAL_PERMIT)?;
    socket.set_reuse_address(true)?;
    if source.port() == 0 {
        // The port is chosen at connect, when the destination is known too.
        setsockopt(&socket, IpBindAddressNoPort, &true)?;
    }
    socket.bind(&source.into())?;
    TcpSocket::from_std_stream(socket.into())
        .connect(destination)
        .await
}
