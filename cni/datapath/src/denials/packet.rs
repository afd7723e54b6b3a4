//! Addresses and ports from the start of an IP packet, as far as it was copied.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Cause;

/// Bytes of a packet that the rules copy.
pub(super) const SNAP: u32 = 96;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const ARP: u16 = 0x0806;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Flow {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
    /// Of the interface where it came in.
    pub(super) index: u32,
    pub(super) ethertype: u16,
    pub(super) cause: Cause,
}

/// What was logged, beside the bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logged {
    pub(super) index: u32,
    pub(super) ethertype: u16,
    pub(super) cause: Cause,
}

/// As far as the bytes can be read: a frame that says nothing of sender and destination was sent all
/// the same, and has the unspecified address for both.
pub(super) fn read(packet: &[u8], logged: Logged) -> Flow {
    let read = match logged.ethertype {
        IPV4 => read_v4(packet, logged),
        IPV6 => read_v6(packet, logged),
        ARP => read_arp(packet, logged),
        _ => None,
    };
    let nobody = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    read.unwrap_or_else(|| flow(nobody, nobody, 0, (0, 0), logged))
}

fn flow(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    (source_port, destination_port): (u16, u16),
    logged: Logged,
) -> Flow {
    let Logged {
        index,
        ethertype,
        cause,
    } = logged;
    Flow {
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        index,
        ethertype,
        cause,
    }
}

/// Who says to have which IPv4 address, and whom it tells or asks.
fn read_arp(packet: &[u8], logged: Logged) -> Option<Flow> {
    let address = |at: usize| {
        let bytes: &[u8; 4] = packet.get(at..)?.first_chunk()?;
        Some(IpAddr::from(*bytes))
    };
    Some(flow(address(14)?, address(24)?, 0, (0, 0), logged))
}

fn read_v4(packet: &[u8], logged: Logged) -> Option<Flow> {
    let header: &[u8; 20] = packet.first_chunk()?;
    let length = usize::from(header[0] & 0x0f) * 4;
    let first_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
    let protocol = header[9];
    let ports = if first_fragment && length >= 20 {
        ports(protocol, packet.get(length..).unwrap_or_default())
    } else {
        (0, 0)
    };
    let address = |at: usize| {
        let [a, b, c, d] = [header[at], header[at + 1], header[at + 2], header[at + 3]];
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    Some(flow(address(12), address(16), protocol, ports, logged))
}

fn read_v6(packet: &[u8], logged: Logged) -> Option<Flow> {
    let header: &[u8; 40] = packet.first_chunk()?;
    let address = |at: usize| {
        let bytes: Option<&[u8; 16]> = header[at..].first_chunk();
        bytes.map(|bytes| IpAddr::V6(Ipv6Addr::from(*bytes)))
    };
    let (protocol, rest) = skip_extensions(header[6], &packet[40..]);
    let ports = rest.map_or((0, 0), |rest| ports(protocol, rest));
    Some(flow(address(8)?, address(24)?, protocol, ports, logged))
}

/// The transport protocol, and its header if this packet has it.
fn skip_extensions(mut next: u8, mut rest: &[u8]) -> (u8, Option<&[u8]>) {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    loop {
        let (Some(&following), Some(&size)) = (rest.first(), rest.get(1)) else {
            return (next, None);
        };
        let length = match next {
            HOP_BY_HOP | ROUTING | DESTINATION => (usize::from(size) + 1) * 8,
            AUTHENTICATION => (usize::from(size) + 2) * 4,
            FRAGMENT => {
                let offset = rest
                    .get(2..4)
                    .map(|it| u16::from_be_bytes([it[0], it[1]]) & 0xfff8);
                if offset != Some(0) {
                    return (following, None);
                }
                8
            }
            _ => return (next, Some(rest)),
        };
        next = following;
        match rest.get(length..) {
            Some(after) => rest = after,
            None => return (next, None),
        }
    }
}

/// Source and destination port of TCP, UDP, DCCP, SCTP and UDP-Lite; these begin alike.
fn ports(protocol: u8, header: &[u8]) -> (u16, u16) {
    match (protocol, header.first_chunk::<4>()) {
        (6 | 17 | 33 | 132 | 136, Some(&[a, b, c, d])) => {
            (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
        }
        _ => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(protocol: u8, fragment: u16, words: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x40 | words;
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&[10, 0, 1, 5]);
        packet[16..20].copy_from_slice(&[203, 0, 113, 66]);
        packet.extend_from_slice(rest);
        packet
    }

    fn v6(next: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        packet[6] = next;
        packet[23] = 1;
        packet[39] = 2;
        packet.extend_from_slice(rest);
        packet
    }

    fn logged(ethertype: u16) -> Logged {
        Logged {
            index: 1,
            ethertype,
            cause: Cause::Spoofed,
        }
    }

    fn summary(packet: &[u8]) -> Option<(u8, u16, u16)> {
        let ethertype = if packet[0] >> 4 == 4 { IPV4 } else { IPV6 };
        let flow = read(packet, logged(ethertype));
        let read = flow.source != IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        read.then_some((flow.protocol, flow.source_port, flow.destination_port))
    }

    #[test]
    fn ports_are_read_where_they_are() {
        let ports = [0x30, 0x39, 0x01, 0xbb, 0, 0, 0, 0];
        let mut with_options = vec![0; 4];
        with_options.extend(ports);
        let mut extended = vec![6, 0, 0, 0, 0, 0, 0, 0];
        extended.extend(ports);
        let mut fragmented = vec![17, 0, 0, 1, 0, 0, 0, 0];
        fragmented.extend(ports);
        let mut later = vec![17, 0, 0, 8, 0, 0, 0, 0];
        later.extend(ports);
        let cases = [
            (v4(6, 0, 5, &ports), Some((6, 12345, 443))),
            (v4(17, 0x2000, 5, &ports), Some((17, 12345, 443))),
            (v4(17, 0x0001, 5, &ports), Some((17, 0, 0))),
            (v4(6, 0, 6, &with_options), Some((6, 12345, 443))),
            (v4(6, 0, 15, &ports), Some((6, 0, 0))),
            (v4(6, 0, 4, &ports), Some((6, 0, 0))),
            (v4(1, 0, 5, &ports), Some((1, 0, 0))),
            (v4(6, 0, 5, &ports[..3]), Some((6, 0, 0))),
            (v6(6, &ports), Some((6, 12345, 443))),
            (v6(60, &extended), Some((6, 12345, 443))),
            (v6(44, &fragmented), Some((17, 12345, 443))),
            (v6(44, &later), Some((17, 0, 0))),
            (v6(0, &[6, 255]), Some((6, 0, 0))),
            (v6(58, &[]), Some((58, 0, 0))),
        ];
        for (packet, expected) in cases {
            assert_eq!(summary(&packet), expected, "{packet:?}");
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        for packet in [
            v4(6, 0, 5, &[1, 2, 3, 4]),
            v6(0, &[60, 0, 0, 0, 0, 0, 0, 0, 6, 9]),
        ] {
            for length in 0..packet.len() {
                let _ = read(&packet[..length], logged(IPV4));
                let _ = read(&packet[..length], logged(IPV6));
            }
        }
        for _ in 0..100_000 {
            let length = fastrand::usize(..100);
            let packet: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
                .take(length)
                .collect();
            for ethertype in [IPV4, IPV6, ARP, 0] {
                let _ = read(&packet, logged(ethertype));
            }
        }
    }

    #[test]
    fn a_frame_that_says_nothing_was_sent_all_the_same() {
        let flow = read(&[0; 9], logged(0x88b5));
        assert_eq!((flow.ethertype, flow.index), (0x88b5, 1));
        assert!(flow.source.is_unspecified() && flow.destination.is_unspecified());
    }

    #[test]
    fn arp_names_who_is_claimed_to_be_where() {
        let mut packet = vec![0; 28];
        packet[14..18].copy_from_slice(&[10, 0, 1, 6]);
        packet[24..28].copy_from_slice(&[169, 254, 1, 1]);
        let flow = read(&packet, logged(ARP));
        assert_eq!(flow.source, IpAddr::from([10, 0, 1, 6]));
        assert_eq!(flow.destination, IpAddr::from([169, 254, 1, 1]));
        assert!(read(&packet[..27], logged(ARP)).source.is_unspecified());
    }
}
