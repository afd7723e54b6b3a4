//! Servers and callers in namespaces.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use super::Namespace;

pub(crate) const PATIENCE: Duration = Duration::from_secs(2);
pub(crate) const ANY: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// Tells whoever connects which address it saw.
pub(crate) fn greet(namespace: &Namespace, at: impl Into<SocketAddr>) {
    let at = at.into();
    let listener = namespace.run(move || TcpListener::bind(at).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip().to_canonical();
            std::thread::spawn(move || {
                let _ = stream.write_all(peer.to_string().as_bytes());
                // What the caller says is read, so that no reset hides it from the wire.
                let _ = stream.set_read_timeout(Some(PATIENCE));
                let _ = io::copy(&mut stream, &mut io::sink());
            });
        }
    });
}

/// What a greeter says.
pub(crate) fn ask(namespace: &Namespace, at: impl Into<SocketAddr>) -> io::Result<IpAddr> {
    say(namespace, at, b"")
}

/// Says something to a greeter, and gives what it answers.
pub(crate) fn say(
    namespace: &Namespace,
    at: impl Into<SocketAddr>,
    words: &[u8],
) -> io::Result<IpAddr> {
    let (at, words) = (at.into(), words.to_vec());
    namespace.run(move || say_here(at, &words))
}

/// The same on the calling thread.
pub(crate) fn say_here(at: SocketAddr, words: &[u8]) -> io::Result<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&at, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(words)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    text.parse()
        .map_err(|_| io::Error::other(format!("no address: {text}")))
}

pub(crate) fn throw(namespace: &Namespace, at: impl Into<SocketAddr>, words: &[u8]) {
    let (at, words) = (at.into(), words.to_vec());
    namespace.run(move || {
        let any: SocketAddr = if at.is_ipv4() {
            ([0; 4], 0).into()
        } else {
            (ANY, 0).into()
        };
        // Being told that it is not allowed is fine.
        let _ = UdpSocket::bind(any).unwrap().send_to(&words, at);
    });
}
