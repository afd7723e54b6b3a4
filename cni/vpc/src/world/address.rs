//! Which addresses of a subnet are free, and which of them EC2 gives out: scattered, so that a
//! subnet in use soon has few aligned blocks left, as in AWS.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::Ipv4Net;

/// Length of an IPv4 prefix delegated to an interface.
pub const PREFIX: u8 = 28;
const PREFIX_SIZE: u32 = 16;
/// Network, router, resolver and one for the future.
const RESERVED_FIRST: u32 = 4;

/// Neither reserved nor outside.
pub fn is_usable(subnet: Ipv4Net, address: Ipv4Addr) -> bool {
    let Some(offset) = u32::from(address).checked_sub(u32::from(subnet.network())) else {
        return false;
    };
    subnet.contains(&address) && offset >= RESERVED_FIRST && address != subnet.broadcast()
}

/// A free address from a random place on.
pub fn pick(
    subnet: Ipv4Net,
    taken: &BTreeSet<Ipv4Addr>,
    rng: &mut fastrand::Rng,
) -> Option<Ipv4Addr> {
    let (base, size) = (u32::from(subnet.network()), size(subnet));
    let usable = size - RESERVED_FIRST - 1;
    let start = rng.u32(0..usable);
    (0..usable)
        .map(|step| Ipv4Addr::from(base + RESERVED_FIRST + (start + step) % usable))
        .find(|address| !taken.contains(address))
}

/// A free aligned /28 from a random place on.
pub fn pick_prefix(
    subnet: Ipv4Net,
    taken: &BTreeSet<Ipv4Addr>,
    rng: &mut fastrand::Rng,
) -> Option<Ipv4Net> {
    let (base, blocks) = (u32::from(subnet.network()), size(subnet) / PREFIX_SIZE);
    let start = rng.u32(0..blocks.max(1));
    (0..blocks)
        .map(|step| base + ((start + step) % blocks) * PREFIX_SIZE)
        .map(|first| Ipv4Net::new_assert(Ipv4Addr::from(first), PREFIX))
        .find(|block| is_free_block(subnet, *block, taken))
}

/// Aligned, inside the subnet, clear of what is reserved and of what is taken.
pub fn is_free_block(subnet: Ipv4Net, block: Ipv4Net, taken: &BTreeSet<Ipv4Addr>) -> bool {
    block.prefix_len() == PREFIX
        && block.addr() == block.network()
        && subnet.contains(&block)
        && is_usable(subnet, block.network())
        && is_usable(subnet, block.broadcast())
        && taken
            .range(block.network()..=block.broadcast())
            .next()
            .is_none()
}

/// Every address of a prefix counts as taken.
pub fn expand(block: Ipv4Net) -> impl Iterator<Item = Ipv4Addr> {
    (u32::from(block.network())..=u32::from(block.broadcast())).map(Ipv4Addr::from)
}

/// `AvailableIpAddressCount`.
pub fn available(subnet: Ipv4Net, taken: &BTreeSet<Ipv4Addr>) -> u32 {
    let used = u32::try_from(taken.len()).unwrap_or(u32::MAX);
    (size(subnet) - RESERVED_FIRST - 1).saturating_sub(used)
}

fn size(subnet: Ipv4Net) -> u32 {
    1 << (32 - subnet.prefix_len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Filling a subnet gives each usable address once, then none.
        #[test]
        fn a_subnet_is_given_out_to_the_last(seed: u64, length in 24u8..=28) {
            let subnet = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 1, 0), length);
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut taken = BTreeSet::new();
            let all = available(subnet, &taken);
            for given in 0..all {
                let address = pick(subnet, &taken, &mut rng).unwrap();
                prop_assert!(is_usable(subnet, address));
                prop_assert!(taken.insert(address), "{address} was given twice");
                prop_assert_eq!(available(subnet, &taken), all - given - 1);
            }
            prop_assert_eq!(pick(subnet, &taken, &mut rng), None);
        }

        /// A block is aligned, whole, and shares no address with anything.
        #[test]
        fn blocks_overlap_nothing(seed: u64, singles in 0usize..60) {
            let subnet = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 2, 0), 24);
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut taken = BTreeSet::new();
            for _ in 0..singles {
                taken.extend(pick(subnet, &taken, &mut rng));
            }
            while let Some(block) = pick_prefix(subnet, &taken, &mut rng) {
                let before = taken.len();
                taken.extend(expand(block));
                prop_assert_eq!(taken.len(), before + 16);
                prop_assert!(taken.iter().all(|address| is_usable(subnet, *address)));
            }
        }
    }

    #[test]
    fn a_whole_24_has_14_blocks() {
        let subnet: Ipv4Net = "10.0.0.0/24".parse().unwrap();
        let (mut taken, mut rng, mut blocks) = (BTreeSet::new(), fastrand::Rng::with_seed(7), 0);
        while let Some(block) = pick_prefix(subnet, &taken, &mut rng) {
            taken.extend(expand(block));
            blocks += 1;
        }
        // The first holds the router, the last the broadcast address.
        assert_eq!(blocks, 14);
    }
}
