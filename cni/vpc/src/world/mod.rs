//! What EC2 knows: instances, interfaces and their addresses, and what may be done to them.
//!
//! Pure: an operation takes what was asked and `now` (time since the box began), and changes the
//! world or refuses with EC2's own code. Nothing here touches the kernel; [`World::ports`] says
//! what the fabric has to carry, and whoever applies it compares.

pub mod address;
mod change;
mod ids;
pub mod limits;
mod refusal;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ipnet::{Ipv4Net, Ipv6Net};

pub use self::{
    change::{Addresses, NewInterface, Wanted},
    ids::{AttachmentId, InstanceId, InterfaceId, Mac},
    limits::Limits,
    refusal::Refusal,
};
use crate::spec::{SecurityGroup, Span, Spec, Subnet};

/// Time since the box began.
pub type Now = Duration;

pub type Tags = BTreeMap<String, String>;

/// All of the account's state. Cloned before a change, so that a refusal changes nothing.
#[derive(Clone, Debug)]
pub struct World {
    pub vpc: String,
    pub owner: String,
    pub region: String,
    pub cidr: Ipv4Net,
    pub subnets: Vec<Subnet>,
    pub groups: Vec<SecurityGroup>,
    pub instances: BTreeMap<InstanceId, Instance>,
    pub interfaces: BTreeMap<InterfaceId, Interface>,
    /// Tags of whatever is not an interface.
    pub tags: BTreeMap<String, Tags>,
    /// ClientToken → the request it came with, and what was made.
    tokens: BTreeMap<String, (NewInterface, InterfaceId)>,
    transition: Span,
    rng: fastrand::Rng,
}

#[derive(Clone, Debug)]
pub struct Instance {
    pub id: InstanceId,
    /// The spec's name, and a tag.
    pub name: String,
    pub limits: &'static Limits,
    pub subnet: String,
    pub metadata_hop_limit: u8,
}

#[derive(Clone, Debug)]
pub struct Interface {
    pub id: InterfaceId,
    pub subnet: String,
    pub mac: Mac,
    pub description: String,
    pub groups: Vec<String>,
    /// The primary first; never empty.
    pub addresses: Vec<Ipv4Addr>,
    pub prefixes: Vec<Ipv4Net>,
    pub ipv6: Option<Ipv6Addr>,
    /// A /80, as IPv6 clusters use it.
    pub ipv6_prefix: Option<Ipv6Net>,
    pub source_check: bool,
    pub tags: Tags,
    state: InterfaceState,
}

#[derive(Clone, Debug)]
enum InterfaceState {
    Pending { until: Now },
    Available,
    Attached(Attachment),
}

#[derive(Clone, Debug)]
pub struct Attachment {
    pub id: AttachmentId,
    pub instance: InstanceId,
    pub device: u32,
    pub delete_on_termination: bool,
    pub since: Now,
    pub state: AttachmentState,
}

/// Named by what is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachmentState {
    Attaching { until: Now },
    Attached,
    Detaching { until: Now },
}

impl AttachmentState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Attaching { .. } => "attaching",
            Self::Attached => "attached",
            Self::Detaching { .. } => "detaching",
        }
    }
}

/// What the fabric carries for one interface that is plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub instance: String,
    pub device: u32,
    pub mac: Mac,
    pub subnet: String,
    pub primary: Ipv4Addr,
    /// Assigned addresses, those of prefixes included.
    pub addresses: BTreeSet<Ipv4Addr>,
    pub ipv6: BTreeSet<Ipv6Net>,
    pub source_check: bool,
    pub groups: Vec<String>,
    /// Hops that an answer of the metadata service survives.
    pub hop_limit: u8,
}

impl Interface {
    pub fn primary(&self) -> Ipv4Addr {
        self.addresses
            .first()
            .copied()
            .unwrap_or(Ipv4Addr::UNSPECIFIED)
    }

    pub fn status(&self) -> &'static str {
        match self.state {
            InterfaceState::Pending { .. } => "pending",
            InterfaceState::Available => "available",
            InterfaceState::Attached(_) => "in-use",
        }
    }

    pub fn attachment(&self) -> Option<&Attachment> {
        match &self.state {
            InterfaceState::Attached(attachment) => Some(attachment),
            InterfaceState::Pending { .. } | InterfaceState::Available => None,
        }
    }

    /// Places taken of those that the instance type gives.
    fn slots(&self) -> usize {
        self.addresses.len() + self.prefixes.len()
    }

    fn held(&self) -> impl Iterator<Item = Ipv4Addr> {
        let prefixed = self.prefixes.iter().copied().flat_map(address::expand);
        self.addresses.iter().copied().chain(prefixed)
    }

    fn transition_due(&self) -> Option<Now> {
        match &self.state {
            InterfaceState::Pending { until } => Some(*until),
            InterfaceState::Available => None,
            InterfaceState::Attached(attachment) => match attachment.state {
                AttachmentState::Attaching { until } | AttachmentState::Detaching { until } => {
                    Some(until)
                }
                AttachmentState::Attached => None,
            },
        }
    }
}

impl World {
    /// The spec's instances, each running with its primary interface attached.
    pub fn new(spec: &Spec) -> Result<Self, Refusal> {
        let mut world = Self {
            vpc: "vpc-0b0c0".into(),
            owner: "123456789012".into(),
            region: spec.region().into(),
            cidr: spec.cidr(),
            subnets: spec.subnets().to_vec(),
            groups: spec.security_groups().to_vec(),
            instances: BTreeMap::new(),
            interfaces: BTreeMap::new(),
            tags: BTreeMap::new(),
            tokens: BTreeMap::new(),
            transition: spec.faults().transition,
            rng: fastrand::Rng::with_seed(spec.faults().seed),
        };
        // Fixed addresses first, so that no automatic one takes them.
        let mut instances: Vec<_> = spec.instances().iter().collect();
        instances.sort_by_key(|instance| instance.address.is_none());
        for instance in instances {
            world.launch(instance)?;
        }
        Ok(world)
    }

    pub fn subnet(&self, id: &str) -> Result<&Subnet, Refusal> {
        self.subnets
            .iter()
            .find(|subnet| subnet.id == id)
            .ok_or_else(|| Refusal::no_subnet(id))
    }

    pub fn interface(&self, id: &InterfaceId) -> Result<&Interface, Refusal> {
        self.interfaces
            .get(id)
            .ok_or_else(|| Refusal::no_interface(id))
    }

    pub fn instance(&self, id: &InstanceId) -> Result<&Instance, Refusal> {
        self.instances
            .get(id)
            .ok_or_else(|| Refusal::no_instance(id))
    }

    pub fn group_name(&self, id: &str) -> &str {
        self.groups
            .iter()
            .find(|group| group.id == id)
            .map_or("", |group| &group.name)
    }

    /// Interfaces attached to an instance in whatever state, by device index.
    pub fn attached_to(&self, instance: &InstanceId) -> Vec<(&Interface, &Attachment)> {
        let mut attached: Vec<_> = self
            .interfaces
            .values()
            .filter_map(|interface| Some((interface, interface.attachment()?)))
            .filter(|(_, attachment)| attachment.instance == *instance)
            .collect();
        attached.sort_by_key(|(_, attachment)| attachment.device);
        attached
    }

    /// The instance that a packet with this source comes from.
    pub fn instance_of_address(&self, source: Ipv4Addr) -> Option<&Instance> {
        let interface = self
            .interfaces
            .values()
            .find(|interface| interface.held().any(|held| held == source))?;
        self.instances.get(&interface.attachment()?.instance)
    }

    /// Free addresses of a subnet, as DescribeSubnets gives them.
    pub fn available(&self, subnet: &Subnet) -> u32 {
        address::available(subnet.cidr, &self.taken(&subnet.id))
    }

    fn taken(&self, subnet: &str) -> BTreeSet<Ipv4Addr> {
        let inside = self
            .interfaces
            .values()
            .filter(|interface| interface.subnet == subnet);
        inside.flat_map(Interface::held).collect()
    }

    /// What has to be plugged in now.
    pub fn ports(&self) -> BTreeMap<InterfaceId, Port> {
        let plugged = self.interfaces.values().filter_map(|interface| {
            let attachment = interface.attachment()?;
            if attachment.state != AttachmentState::Attached {
                return None;
            }
            let instance = self.instances.get(&attachment.instance)?;
            let single = interface.ipv6.map(Ipv6Net::from);
            let port = Port {
                instance: instance.name.clone(),
                device: attachment.device,
                mac: interface.mac,
                subnet: interface.subnet.clone(),
                primary: interface.primary(),
                addresses: interface.held().collect(),
                ipv6: single.into_iter().chain(interface.ipv6_prefix).collect(),
                source_check: interface.source_check,
                groups: interface.groups.clone(),
                hop_limit: instance.metadata_hop_limit,
            };
            Some((interface.id.clone(), port))
        });
        plugged.collect()
    }

    /// When [`advance`](Self::advance) will next change something.
    pub fn next_change(&self) -> Option<Now> {
        self.interfaces
            .values()
            .filter_map(Interface::transition_due)
            .min()
    }

    /// Carries out the transitions that are due.
    pub fn advance(&mut self, now: Now) {
        for interface in self.interfaces.values_mut() {
            if interface.transition_due().is_none_or(|due| due > now) {
                continue;
            }
            match &mut interface.state {
                InterfaceState::Available => {}
                InterfaceState::Pending { .. } => interface.state = InterfaceState::Available,
                InterfaceState::Attached(attachment) => match attachment.state {
                    AttachmentState::Attaching { .. } => {
                        attachment.state = AttachmentState::Attached;
                    }
                    AttachmentState::Detaching { .. } => {
                        interface.state = InterfaceState::Available;
                    }
                    AttachmentState::Attached => {}
                },
            }
        }
    }

    fn soon(&mut self, now: Now) -> Now {
        let Span { min_ms, max_ms } = self.transition;
        now + Duration::from_millis(self.rng.u64(min_ms..=max_ms))
    }
}
