//! Addresses that are never a destination outside the cluster, whatever a policy or DNS says.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why an address is no destination for the gate to dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    /// The instance's metadata service or another of AWS's link-local services: it would answer
    /// as to the node.
    Metadata,
    LinkLocal,
    Loopback,
    Multicast,
    Unspecified,
    /// Broadcast and ranges that nobody may use.
    Reserved,
    /// An IPv4 address inside an IPv6 one (mapped, NAT64, 6to4, Teredo): the IPv4 rules would not
    /// see it.
    Embedded,
}

impl Special {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Metadata => "an instance metadata address",
            Self::LinkLocal => "a link-local address",
            Self::Loopback => "a loopback address",
            Self::Multicast => "a multicast address",
            Self::Unspecified => "the unspecified address",
            Self::Reserved => "a reserved address",
            Self::Embedded => "an IPv4 address inside an IPv6 one",
        }
    }
}

/// `None`: an ordinary address.
pub fn special(address: IpAddr) -> Option<Special> {
    match address {
        IpAddr::V4(address) => special_v4(address),
        IpAddr::V6(address) => special_v6(address),
    }
}

fn special_v4(address: Ipv4Addr) -> Option<Special> {
    let [a, b, ..] = address.octets();
    match a {
        0 => Some(Special::Unspecified),
        127 => Some(Special::Loopback),
        // The last two are AWS's Pod Identity and the container credentials of ECS.
        169 if b == 254 => match address.octets()[2..] {
            [169, 254 | 253 | 123] | [170, 2 | 23] => Some(Special::Metadata),
            _ => Some(Special::LinkLocal),
        },
        224..=239 => Some(Special::Multicast),
        240.. => Some(Special::Reserved),
        _ => None,
    }
}

fn special_v6(address: Ipv6Addr) -> Option<Special> {
    let s = address.segments();
    match s {
        [0, 0, 0, 0, 0, 0, 0, 0] => Some(Special::Unspecified),
        [0, 0, 0, 0, 0, 0, 0, 1] => Some(Special::Loopback),
        // Compatible, mapped, translated.
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => Some(Special::Embedded),
        // NAT64, 6to4, Teredo.
        [0x64, 0xff9b, ..] | [0x2002, ..] | [0x2001, 0, ..] => Some(Special::Embedded),
        [0xfd00, 0x0ec2, ..] => Some(Special::Metadata),
        [0xfe80..=0xfebf, ..] => Some(Special::LinkLocal),
        // Site-local, long withdrawn; discard only.
        [0xfec0..=0xfeff, ..] | [0x100, 0, 0, 0, ..] => Some(Special::Reserved),
        [0xff00..=0xffff, ..] => Some(Special::Multicast),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_lead_elsewhere_are_known() {
        for (address, expected) in [
            ("169.254.169.254", Some(Special::Metadata)),
            ("169.254.170.23", Some(Special::Metadata)),
            ("169.254.20.10", Some(Special::LinkLocal)),
            ("fd00:ec2::254", Some(Special::Metadata)),
            ("127.0.0.53", Some(Special::Loopback)),
            ("::1", Some(Special::Loopback)),
            ("0.0.0.0", Some(Special::Unspecified)),
            ("::", Some(Special::Unspecified)),
            ("224.0.0.1", Some(Special::Multicast)),
            ("ff02::1", Some(Special::Multicast)),
            ("255.255.255.255", Some(Special::Reserved)),
            ("240.0.0.1", Some(Special::Reserved)),
            ("fe80::1", Some(Special::LinkLocal)),
            ("febf::1", Some(Special::LinkLocal)),
            ("::ffff:203.0.113.1", Some(Special::Embedded)),
            ("::ffff:0:203.0.113.1", Some(Special::Embedded)),
            ("::203.0.113.1", Some(Special::Embedded)),
            ("64:ff9b::203.0.113.1", Some(Special::Embedded)),
            ("64:ff9b:1::1", Some(Special::Embedded)),
            ("2002:cb00:7101::1", Some(Special::Embedded)),
            ("2001::1", Some(Special::Embedded)),
            ("203.0.113.1", None),
            ("10.0.0.1", None),
            ("2001:db8:113::1", None),
            ("fd00:20::10", None),
            ("2600::1", None),
        ] {
            assert_eq!(special(address.parse().unwrap()), expected, "{address}");
        }
    }
}
