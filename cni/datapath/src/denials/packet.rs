//! Addresses and ports from the start of an IP packet, as far as it was copied.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bytes of a packet that the rules copy.
pub(super) const SNAP: u32 = 96;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Flow {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
    /// Of the interface where it came in.
    pub(super) index: u32,
}

/// None: not an IP packet, or too short to say who sent it.
pub(super) fn read(packet: &[u8], index: u32) -> Option<Flow> {
    match packet.first()? >> 4 {
        4 => read_v4(packet, index),
        6 => read_v6(packet, index),
        _ => None,
    }
}

fn read_v4(packet: &[u8], index: u32) -> Option<Flow> {
    let header: &[u8; 20] = packet.first_chunk()?;
    let length = usize::from(header[0] & 0x0f) * 4;
    let first_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
    let protocol = header[9];
    let (source_port, destination_port) = if first_fragment && length >= 20 {
        ports(protocol, packet.get(length..).unwrap_or_default())
    } else {
        (0, 0)
    };
    let address = |at: usize| {
        let [a, b, c, d] = [header[at], header[at + 1], header[at + 2], header[at + 3]];
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    let (source, destination) = (address(12), address(16));
    Some(Flow {
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        index,
    })
}

fn read_v6(packet: &[u8], index: u32) -> Option<Flow> {
    let header: &[u8; 40] = packet.first_chunk()?;
    let address = |at: usize| {
        let bytes: Option<&[u8; 16]> = header[at..].first_chunk();
        bytes.map(|bytes| IpAddr::V6(Ipv6Addr::from(*bytes)))
    };
    let (source, destination) = (address(8)?, address(24)?);
    let (protocol, rest) = skip_extensions(header[6], &packet[40..]);
    let (source_port, destination_port) = rest.map_or((0, 0), |rest| ports(protocol, rest));
    Some(Flow {
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        index,
    })
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

    fn summary(packet: &[u8]) -> Option<(u8, u16, u16)> {
        read(packet, 1).map(|flow| (flow.protocol, flow.source_port, flow.destination_port))
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
                let _ = read(&packet[..length], 1);
            }
        }
        for _ in 0..100_000 {
            let length = fastrand::usize(..100);
            let mut packet: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
                .take(length)
                .collect();
            if let Some(first) = packet.first_mut() {
                *first = if fastrand::bool() { 0x45 } else { 0x60 };
            }
            let _ = read(&packet, 1);
        }
    }
}
