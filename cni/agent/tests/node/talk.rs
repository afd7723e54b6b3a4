//! Whether one reaches another.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use turnpike_vpc::netns::Namespace;

/// One line from the client to the server and back, over TCP.
pub(crate) fn talk(from: &Namespace, to: &Namespace, address: Ipv4Addr) -> std::io::Result<IpAddr> {
    let listener = to
        .run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))
        .unwrap()?;
    let port = listener.local_addr()?.port();
    let server = thread::spawn(move || {
        let (mut stream, peer) = listener.accept()?;
        stream.write_all(b"hello")?;
        Ok::<_, std::io::Error>(peer.ip())
    });
    let heard = from.run(move || {
        let to = SocketAddr::from((address, port));
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok::<_, std::io::Error>(text)
    });
    let text = heard.unwrap()?;
    assert_eq!(text, "hello");
    server.join().expect("the server does not panic")
}

/// Whether a datagram comes from one to the other.
pub(crate) fn reaches(from: &Namespace, to: &Namespace, address: Ipv4Addr) -> bool {
    let server = to.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)));
    let server = server.unwrap().unwrap();
    let to = SocketAddr::from((address, server.local_addr().unwrap().port()));
    let sent = from.run(move || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?.send_to(b"?", to));
    sent.unwrap().unwrap();
    server
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    server.recv(&mut [0; 1]).is_ok()
}
