//! A Service's endpoints, in shards that depend on nothing but the set of endpoints.
//!
//! Endpoints with one mapping of ports form a group. A group is a binary trie over a hash of the
//! endpoint: a node with more endpoints than a shard may carry is split, one with fewer is a
//! shard. So an added endpoint changes one shard (or splits it), whatever came before, and two
//! models that hold the same endpoints have the same shards.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use turnpike_rules::service::{Endpoint, EndpointShard, EndpointState, PortMapping};

use crate::key::Key;

/// (Service port, port on the pod), ascending.
pub(crate) type Mapping = Vec<(u16, u16)>;

/// The object an endpoint was learned from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Source {
    Pod(Key),
    Slice(Key),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Slot {
    uid: Arc<str>,
    address: IpAddr,
    source: Source,
}

/// What a source says now.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Contribution(BTreeMap<(Mapping, Arc<str>, IpAddr), Endpoint>);

impl Contribution {
    /// Of two entries for one address the serving one counts.
    pub(crate) fn add(&mut self, mapping: Mapping, endpoint: Endpoint) {
        let key = (mapping, endpoint.uid.clone(), endpoint.address);
        let known = self.0.get(&key);
        if known.is_none_or(|known| known.state == EndpointState::Terminating) {
            self.0.insert(key, endpoint);
        }
    }
}

/// What a change did to the shards.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// Suffixes of the shards that changed, came or went.
    pub(crate) shards: BTreeSet<String>,
    /// The list of shards is another one.
    pub(crate) layout: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Shards {
    groups: BTreeMap<Mapping, Node>,
    contributed: HashMap<Source, Contribution>,
}

impl Shards {
    /// Puts `new` in place of what `source` said before.
    pub(crate) fn replace(&mut self, source: &Source, new: Contribution, touched: &mut Touched) {
        let old = self.contributed.remove(source).unwrap_or_default();
        let slot = |uid: &Arc<str>, address: &IpAddr| Slot {
            uid: uid.clone(),
            address: *address,
            source: source.clone(),
        };
        for (key, endpoint) in &old.0 {
            if new.0.get(key) != Some(endpoint) {
                let (mapping, uid, address) = key;
                self.remove(mapping, &slot(uid, address), touched);
            }
        }
        for (key, endpoint) in &new.0 {
            if old.0.get(key) != Some(endpoint) {
                let (mapping, uid, address) = key;
                self.insert(mapping, slot(uid, address), endpoint.clone(), touched);
            }
        }
        if !new.0.is_empty() {
            self.contributed.insert(source.clone(), new);
        }
    }

    pub(crate) fn sources(&self) -> impl Iterator<Item = &Source> {
        self.contributed.keys()
    }

    /// The suffixes of all shards, in a stable order.
    pub(crate) fn suffixes(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (mapping, node) in &self.groups {
            node.walk(&mut String::new(), &mut |path| {
                found.push(suffix(mapping, path))
            });
        }
        found
    }

    /// The shard `name`, which ends in `suffix`.
    pub(crate) fn shard(&self, name: &str, suffix: &str) -> Option<EndpointShard> {
        let (mapping, path) = read_suffix(suffix)?;
        if self::suffix(&mapping, path) != suffix {
            return None;
        }
        let slots = self.groups.get(&mapping)?.leaf(path)?;
        let mut endpoints: Vec<Endpoint> = Vec::with_capacity(slots.len());
        for (slot, endpoint) in slots {
            // Two slices may both name an endpoint while it moves from one to the other.
            match endpoints.last_mut() {
                Some(last) if last.uid == slot.uid && last.address == slot.address => {
                    if last.state == EndpointState::Terminating {
                        *last = endpoint.clone();
                    }
                }
                _ => endpoints.push(endpoint.clone()),
            }
        }
        let ports = mapping
            .iter()
            .map(|(service_port, target_port)| PortMapping {
                service_port: *service_port,
                target_port: *target_port,
            })
            .collect();
        Some(EndpointShard {
            name: name.into(),
            ports,
            endpoints,
        })
    }

    fn insert(&mut self, mapping: &Mapping, slot: Slot, endpoint: Endpoint, to: &mut Touched) {
        let group = self.groups.entry(mapping.clone()).or_insert_with(|| {
            to.layout = true;
            Node::Leaf(BTreeMap::new())
        });
        let mut path = String::new();
        group.insert(slot, endpoint, &mut path, &mut |path, layout| {
            to.shards.insert(suffix(mapping, path));
            to.layout |= layout;
        });
    }

    fn remove(&mut self, mapping: &Mapping, slot: &Slot, to: &mut Touched) {
        let Some(group) = self.groups.get_mut(mapping) else {
            return;
        };
        let mut path = String::new();
        group.remove(slot, &mut path, &mut |path, layout| {
            to.shards.insert(suffix(mapping, path));
            to.layout |= layout;
        });
        if group.len() == 0 {
            self.groups.remove(mapping);
            to.layout = true;
        }
    }
}

/// Called with the path of each shard that changed, and whether it came or went.
type Report<'a> = &'a mut dyn FnMut(&str, bool);

#[derive(Debug)]
enum Node {
    Leaf(BTreeMap<Slot, Endpoint>),
    Branch { halves: Box<[Self; 2]>, len: usize },
}

impl Node {
    /// Beyond this many bits a shard is left larger than its limit: only endpoints whose whole
    /// hash is equal get there.
    const DEPTH: usize = 64;

    fn len(&self) -> usize {
        match self {
            Self::Leaf(slots) => slots.len(),
            Self::Branch { len, .. } => *len,
        }
    }

    fn insert(&mut self, slot: Slot, endpoint: Endpoint, path: &mut String, report: Report<'_>) {
        match self {
            Self::Leaf(slots) => {
                slots.insert(slot, endpoint);
                report(path, slots.len() == 1);
                self.split(path, report);
            }
            Self::Branch { halves, len } => {
                let before = halves[0].len() + halves[1].len();
                let half = bit(&slot, path.len());
                path.push(if half == 1 { '1' } else { '0' });
                halves[half].insert(slot, endpoint, path, report);
                *len = *len + halves[0].len() + halves[1].len() - before;
            }
        }
    }

    fn split(&mut self, path: &mut String, report: Report<'_>) {
        let Self::Leaf(slots) = self else { return };
        let len = slots.len();
        if len <= EndpointShard::LIMIT || path.len() >= Self::DEPTH {
            return;
        }
        report(path, true);
        let (ones, zeros) = std::mem::take(slots)
            .into_iter()
            .partition(|(slot, _)| bit(slot, path.len()) == 1);
        let mut halves = Box::new([Self::Leaf(zeros), Self::Leaf(ones)]);
        for (half, digit) in halves.iter_mut().zip(['0', '1']) {
            path.push(digit);
            if half.len() > 0 {
                report(path, true);
            }
            half.split(path, report);
            path.pop();
        }
        *self = Self::Branch { halves, len };
    }

    fn remove(&mut self, slot: &Slot, path: &mut String, report: Report<'_>) {
        match self {
            Self::Leaf(slots) => {
                if slots.remove(slot).is_some() {
                    report(path, slots.is_empty());
                }
            }
            Self::Branch { halves, len } => {
                let half = bit(slot, path.len());
                let before = halves[half].len();
                path.push(if half == 1 { '1' } else { '0' });
                halves[half].remove(slot, path, report);
                path.pop();
                *len = *len + halves[half].len() - before;
                if *len <= EndpointShard::LIMIT {
                    self.walk(path, &mut |path| report(path, true));
                    let mut slots = BTreeMap::new();
                    std::mem::replace(self, Self::Leaf(BTreeMap::new())).drain_into(&mut slots);
                    *self = Self::Leaf(slots);
                    report(path, true);
                }
            }
        }
    }

    fn drain_into(self, slots: &mut BTreeMap<Slot, Endpoint>) {
        match self {
            Self::Leaf(mut own) => slots.append(&mut own),
            Self::Branch { halves, .. } => halves.into_iter().for_each(|h| h.drain_into(slots)),
        }
    }

    /// The paths of the leaves that hold anything.
    fn walk(&self, path: &mut String, visit: &mut dyn FnMut(&str)) {
        match self {
            Self::Leaf(slots) if slots.is_empty() => {}
            Self::Leaf(_) => visit(path),
            Self::Branch { halves, .. } => {
                for (half, digit) in halves.iter().zip(['0', '1']) {
                    path.push(digit);
                    half.walk(path, visit);
                    path.pop();
                }
            }
        }
    }

    fn leaf(&self, path: &str) -> Option<&BTreeMap<Slot, Endpoint>> {
        match (self, path.as_bytes().first()) {
            (Self::Leaf(slots), None) => Some(slots).filter(|slots| !slots.is_empty()),
            (Self::Branch { halves, .. }, Some(b'0')) => halves[0].leaf(&path[1..]),
            (Self::Branch { halves, .. }, Some(b'1')) => halves[1].leaf(&path[1..]),
            _ => None,
        }
    }
}

/// Bit `depth` of the endpoint's hash. The source is left out, so that an endpoint named by two
/// slices stays in one shard.
fn bit(slot: &Slot, depth: usize) -> usize {
    let bytes = slot.uid.bytes();
    let hash = match slot.address {
        IpAddr::V4(address) => bytes.chain(address.octets()).fold(FNV_OFFSET, fnv),
        IpAddr::V6(address) => bytes.chain(address.octets()).fold(FNV_OFFSET, fnv),
    };
    usize::from((mix(hash) >> (63 - depth.min(63))) & 1 == 1)
}

/// FNV-1a, finished like MurmurHash3, since the first bits decide. The standard library's hashers
/// may change with its version, and then every shard in the mesh would.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv(hash: u64, byte: u8) -> u64 {
    (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
}

fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// `80-8080.443-8443`, and `_` with the path where the group is split.
fn suffix(mapping: &Mapping, path: &str) -> String {
    let mut text = String::new();
    for (service_port, target_port) in mapping {
        let dot = if text.is_empty() { "" } else { "." };
        text.push_str(&format!("{dot}{service_port}-{target_port}"));
    }
    if !path.is_empty() {
        text.push('_');
        text.push_str(path);
    }
    text
}

fn read_suffix(suffix: &str) -> Option<(Mapping, &str)> {
    let (ports, path) = suffix.split_once('_').unwrap_or((suffix, ""));
    let pair = |text: &str| {
        let (service_port, target_port) = text.split_once('-')?;
        Some((service_port.parse().ok()?, target_port.parse().ok()?))
    };
    let mapping = ports.split('.').map(pair).collect::<Option<Mapping>>()?;
    Some((mapping, path))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint(number: u32) -> Endpoint {
        Endpoint {
            uid: format!("uid-{number}").into(),
            address: IpAddr::from((0x0a00_0000 + number).to_be_bytes()),
            identity: None,
            zone: "".into(),
            state: EndpointState::Serving,
            names: None,
        }
    }

    fn source(number: u32) -> Source {
        Source::Pod(Key::new("shop", &format!("web-{number}")))
    }

    fn set(shards: &mut Shards, number: u32, present: bool) -> Touched {
        let mut touched = Touched::default();
        let mut contribution = Contribution::default();
        if present {
            contribution.add(vec![(80, 8080)], endpoint(number));
        }
        shards.replace(&source(number), contribution, &mut touched);
        touched
    }

    fn snapshot(shards: &Shards) -> BTreeMap<String, EndpointShard> {
        let suffixes = shards.suffixes();
        suffixes
            .into_iter()
            .map(|s| (s.clone(), shards.shard("", &s).unwrap()))
            .collect()
    }

    #[test]
    fn one_more_endpoint_touches_one_shard() {
        let mut shards = Shards::default();
        for number in 0..1000 {
            set(&mut shards, number, true);
        }
        let before = shards.suffixes();
        assert!(before.len() >= 10);
        let touched = set(&mut shards, 1000, true);
        assert_eq!(touched.shards.len(), 1, "{touched:?}");
        assert!(!touched.layout);
        assert_eq!(shards.suffixes(), before);
    }

    #[test]
    fn the_same_again_touches_nothing() {
        let mut shards = Shards::default();
        set(&mut shards, 1, true);
        assert!(set(&mut shards, 1, true).shards.is_empty());
        assert!(shards.shard("", "80-8081").is_none());
        assert!(shards.shard("", "80-8080_0").is_none());
        assert!(shards.shard("", "nonsense").is_none());
    }

    #[test]
    fn an_endpoint_in_two_slices_is_one_endpoint() {
        let mut shards = Shards::default();
        let mut touched = Touched::default();
        for (name, state) in [
            ("a", EndpointState::Terminating),
            ("b", EndpointState::Serving),
        ] {
            let mut contribution = Contribution::default();
            contribution.add(
                vec![(80, 8080)],
                Endpoint {
                    state,
                    ..endpoint(1)
                },
            );
            let slice = Source::Slice(Key::new("shop", name));
            shards.replace(&slice, contribution, &mut touched);
        }
        let shard = shards.shard("", "80-8080").unwrap();
        assert_eq!(shard.endpoints, [endpoint(1)]);
    }

    proptest! {
        #[test]
        fn shards_depend_on_the_set_alone_and_every_change_is_reported(
            steps in proptest::collection::vec((0u32..400, any::<bool>()), 1..900)
        ) {
            let mut shards = Shards::default();
            let mut seen = BTreeMap::new();
            let mut present = BTreeSet::new();
            for (number, add) in steps {
                let touched = set(&mut shards, number, add);
                if add { present.insert(number); } else { present.remove(&number); }
                let layout: Vec<String> = seen.keys().cloned().collect();
                for suffix in &touched.shards {
                    match shards.shard("", suffix) {
                        Some(shard) => seen.insert(suffix.clone(), shard),
                        None => seen.remove(suffix),
                    };
                }
                let changed = !seen.keys().eq(&layout);
                prop_assert!(touched.layout || !changed);
            }
            prop_assert_eq!(&snapshot(&shards), &seen);
            let mut fresh = Shards::default();
            for number in present.iter().rev() {
                set(&mut fresh, *number, true);
            }
            prop_assert_eq!(snapshot(&fresh), seen);
            let sizes: Vec<usize> = snapshot(&fresh).values().map(|s| s.endpoints.len()).collect();
            prop_assert!(sizes.iter().all(|size| (1..=EndpointShard::LIMIT).contains(size)));
            prop_assert_eq!(sizes.iter().sum::<usize>(), present.len());
        }
    }
}
