//! The operations: each changes the world or says why not. Callers work on a clone, so a refusal
//! halfway leaves nothing behind.

use std::net::Ipv4Addr;

use ipnet::{Ipv4Net, Ipv6Net};

use super::{
    Attachment, AttachmentId, AttachmentState, Instance, InstanceId, Interface, InterfaceId,
    InterfaceState, Mac, Now, Refusal, Tags, World, address, limits,
};
use crate::spec;

/// Interfaces of an account in a region.
const MAX_INTERFACES: usize = 5_000;
/// What no interface of any type exceeds; EC2 checks the type's own limit once it is attached.
const MAX_ADDRESSES: usize = 50;

/// What CreateNetworkInterface is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct NewInterface {
    pub subnet: String,
    pub description: String,
    /// Empty: the default group.
    pub groups: Vec<String>,
    pub primary: Option<Ipv4Addr>,
    pub secondary: Wanted<Ipv4Addr>,
    pub prefixes: Wanted<Ipv4Net>,
    pub tags: Tags,
}

/// Addresses by name, or any so many of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted<T> {
    These(Vec<T>),
    Any(usize),
}

impl<T> Default for Wanted<T> {
    fn default() -> Self {
        Self::Any(0)
    }
}

impl<T> Wanted<T> {
    fn count(&self) -> usize {
        match self {
            Self::These(list) => list.len(),
            Self::Any(count) => *count,
        }
    }
}

/// Addresses that an operation gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    pub single: Vec<Ipv4Addr>,
    pub prefixes: Vec<Ipv4Net>,
}

impl World {
    pub fn create(
        &mut self,
        asked: NewInterface,
        token: Option<String>,
        now: Now,
    ) -> Result<InterfaceId, Refusal> {
        if let Some((before, id)) = token.as_ref().and_then(|token| self.tokens.get(token)) {
            let same = *before == asked && self.interfaces.contains_key(id);
            return if same {
                Ok(id.clone())
            } else {
                Err(Refusal::token_reused())
            };
        }
        self.subnet(&asked.subnet)?;
        self.check_groups(&asked.groups)?;
        if self.interfaces.len() >= MAX_INTERFACES {
            return Err(Refusal::too_many_interfaces_in_account(MAX_INTERFACES));
        }
        let id = InterfaceId::random(&mut self.rng);
        let count = 1 + asked.secondary.count() + asked.prefixes.count();
        if count > MAX_ADDRESSES {
            return Err(Refusal::too_many_addresses(&id, count, MAX_ADDRESSES));
        }
        let several = count > 1;
        let primary = match asked.primary {
            Some(primary) => Wanted::These(vec![primary]),
            None => Wanted::Any(1),
        };
        let until = self.soon(now);
        let interface = Interface {
            id: id.clone(),
            mac: Mac::random(&mut self.rng),
            description: asked.description.clone(),
            groups: self.groups_or_default(&asked.groups),
            addresses: Vec::new(),
            prefixes: Vec::new(),
            ipv6: None,
            ipv6_prefix: None,
            source_check: true,
            tags: asked.tags.clone(),
            subnet: asked.subnet.clone(),
            state: InterfaceState::Pending { until },
        };
        self.interfaces.insert(id.clone(), interface);
        let given = self
            .give(&id, &primary, &Wanted::default())
            .and_then(|_| self.give(&id, &asked.secondary, &asked.prefixes));
        given.map_err(|refusal| match refusal.code {
            "InsufficientFreeAddressesInSubnet" | "InsufficientCidrBlocks" if several => {
                Refusal::subnet_full_at_create()
            }
            _ => refusal,
        })?;
        if let Some(token) = token {
            self.tokens.insert(token, (asked, id.clone()));
        }
        Ok(id)
    }

    pub fn attach(
        &mut self,
        id: &InterfaceId,
        instance: &InstanceId,
        device: u32,
        now: Now,
    ) -> Result<AttachmentId, Refusal> {
        let limits = self.instance(instance)?.limits;
        let zone = self.subnet(&self.instance(instance)?.subnet)?.zone.clone();
        let interface = self.interface(id)?;
        match interface.state {
            InterfaceState::Attached(_) => return Err(Refusal::interface_in_use(id)),
            InterfaceState::Pending { .. } => {
                let message = format!("Network interface '{id}' is not available: it is pending");
                return Err(Refusal::state(message));
            }
            InterfaceState::Available => {}
        }
        if self.subnet(&interface.subnet)?.zone != zone {
            let message =
                format!("You may not attach interface {id} to an instance in another zone");
            return Err(Refusal::combination(message));
        }
        if interface.slots() > limits.ipv4_per_interface {
            let (count, limit) = (interface.slots(), limits.ipv4_per_interface);
            return Err(Refusal::overfull_interface(id, count, limit));
        }
        if !interface.prefixes.is_empty() && !limits.nitro {
            let message = format!("{} does not support prefixes", limits.name);
            return Err(Refusal::combination(message));
        }
        let attached = self.attached_to(instance);
        if attached
            .iter()
            .any(|(_, attachment)| attachment.device == device)
        {
            let message = format!(
                "Instance '{instance}' already has an interface attached at device index '{device}'."
            );
            return Err(Refusal::invalid(message));
        }
        if attached.len() >= limits.interfaces {
            return Err(Refusal::too_many_interfaces(
                attached.len() + 1,
                limits.name,
            ));
        }
        let attachment = Attachment {
            id: AttachmentId::random(&mut self.rng),
            instance: instance.clone(),
            device,
            delete_on_termination: false,
            since: now,
            state: AttachmentState::Attaching {
                until: self.soon(now),
            },
        };
        let made = attachment.id.clone();
        self.interface_mut(id)?.state = InterfaceState::Attached(attachment);
        Ok(made)
    }

    /// `force` changes nothing here: every guest lets go.
    pub fn detach(&mut self, id: &AttachmentId, now: Now) -> Result<(), Refusal> {
        let until = self.soon(now);
        let attachment = self.attachment_mut(id)?;
        if attachment.device == 0 {
            return Err(Refusal::primary_interface());
        }
        if attachment.state != AttachmentState::Attached {
            let message = format!("The attachment '{id}' is {}", attachment.state.as_str());
            return Err(Refusal::state(message));
        }
        attachment.state = AttachmentState::Detaching { until };
        Ok(())
    }

    pub fn delete(&mut self, id: &InterfaceId) -> Result<(), Refusal> {
        match self.interface(id)?.state {
            InterfaceState::Attached(_) => return Err(Refusal::interface_in_use(id)),
            InterfaceState::Pending { .. } | InterfaceState::Available => {}
        }
        self.interfaces.remove(id);
        Ok(())
    }

    pub fn assign(
        &mut self,
        id: &InterfaceId,
        single: &Wanted<Ipv4Addr>,
        prefixes: &Wanted<Ipv4Net>,
        reassign: bool,
    ) -> Result<Addresses, Refusal> {
        if single.count() + prefixes.count() == 0 {
            return Err(Refusal::missing(
                "SecondaryPrivateIpAddressCount or PrivateIpAddress",
            ));
        }
        let interface = self.interface(id)?;
        let limits = interface
            .attachment()
            .and_then(|a| self.instances.get(&a.instance)?.limits.into());
        if prefixes.count() > 0 && limits.is_some_and(|limits: &limits::Limits| !limits.nitro) {
            return Err(Refusal::combination(
                "The instance type does not support prefixes",
            ));
        }
        let limit = limits.map_or(MAX_ADDRESSES, |limits| limits.ipv4_per_interface);
        let count = interface.slots() + single.count() + prefixes.count();
        if count > limit {
            return Err(Refusal::too_many_addresses(id, count, limit));
        }
        if reassign && let Wanted::These(list) = single {
            self.take_back(id, list);
        }
        self.give(id, single, prefixes)
    }

    pub fn unassign(
        &mut self,
        id: &InterfaceId,
        single: &[Ipv4Addr],
        prefixes: &[Ipv4Net],
    ) -> Result<(), Refusal> {
        if single.is_empty() && prefixes.is_empty() {
            return Err(Refusal::missing("PrivateIpAddress or Ipv4Prefix"));
        }
        let interface = self.interface_mut(id)?;
        for address in single {
            if *address == interface.primary() {
                let message = format!("The primary address {address} cannot be unassigned");
                return Err(Refusal::invalid(message));
            }
            if !interface.addresses.contains(address) {
                let message =
                    format!("Some of the specified addresses are not assigned to interface {id}");
                return Err(Refusal::invalid(message));
            }
        }
        if let Some(prefix) = prefixes
            .iter()
            .find(|prefix| !interface.prefixes.contains(prefix))
        {
            return Err(Refusal::invalid(format!(
                "{prefix} is not assigned to interface {id}"
            )));
        }
        interface
            .addresses
            .retain(|address| !single.contains(address));
        interface
            .prefixes
            .retain(|prefix| !prefixes.contains(prefix));
        Ok(())
    }

    pub fn set_description(&mut self, id: &InterfaceId, text: String) -> Result<(), Refusal> {
        self.interface_mut(id)?.description = text;
        Ok(())
    }

    pub fn set_source_check(&mut self, id: &InterfaceId, on: bool) -> Result<(), Refusal> {
        self.interface_mut(id)?.source_check = on;
        Ok(())
    }

    pub fn set_groups(&mut self, id: &InterfaceId, groups: &[String]) -> Result<(), Refusal> {
        self.check_groups(groups)?;
        let groups = self.groups_or_default(groups);
        self.interface_mut(id)?.groups = groups;
        Ok(())
    }

    pub fn set_delete_on_termination(
        &mut self,
        id: &InterfaceId,
        attachment: &AttachmentId,
        on: bool,
    ) -> Result<(), Refusal> {
        self.interface(id)?;
        let found = self.attachment_mut(attachment)?;
        found.delete_on_termination = on;
        Ok(())
    }

    /// Tags anything that exists.
    pub fn tag(&mut self, resource: &str, tags: &Tags) -> Result<(), Refusal> {
        if resource.starts_with("eni-") {
            let tagged = self.interface_mut(&resource.parse()?)?;
            tagged.tags.extend(tags.clone());
            return Ok(());
        }
        let exists = self.instances.contains_key(&resource.into())
            || self.subnets.iter().any(|subnet| subnet.id == resource)
            || self.groups.iter().any(|group| group.id == resource)
            || self.vpc == resource;
        if !exists {
            return Err(Refusal::unknown_resource(resource));
        }
        self.tags
            .entry(resource.into())
            .or_default()
            .extend(tags.clone());
        Ok(())
    }

    /// A running instance with its primary interface.
    pub(super) fn launch(&mut self, wanted: &spec::Instance) -> Result<(), Refusal> {
        let limits = limits::find(&wanted.instance_type).ok_or_else(|| {
            Refusal::invalid(format!(
                "Invalid value '{}' for InstanceType",
                wanted.instance_type
            ))
        })?;
        let id = InstanceId::random(&mut self.rng);
        let asked = NewInterface {
            subnet: wanted.subnet.clone(),
            primary: wanted.address,
            ..NewInterface::default()
        };
        let interface = self.create(asked, None, Now::ZERO)?;
        let attachment = Attachment {
            id: AttachmentId::random(&mut self.rng),
            instance: id.clone(),
            device: 0,
            delete_on_termination: true,
            since: Now::ZERO,
            state: AttachmentState::Attached,
        };
        let subnet = self.subnet(&wanted.subnet)?.ipv6_cidr;
        let number = u16::try_from(self.instances.len()).unwrap_or(u16::MAX);
        let made = self.interface_mut(&interface)?;
        made.state = InterfaceState::Attached(attachment);
        made.ipv6_prefix = subnet.map(|subnet| delegated(subnet, number));
        made.ipv6 = subnet.map(|subnet| {
            let host = u128::from(u32::from(made.primary()) & 0xffff);
            (u128::from(subnet.network()) | host).into()
        });
        let instance = Instance {
            id: id.clone(),
            name: wanted.name.clone(),
            limits,
            subnet: wanted.subnet.clone(),
            metadata_hop_limit: wanted.metadata_hop_limit,
        };
        self.tags.insert(
            id.to_string(),
            Tags::from([("Name".into(), wanted.name.clone())]),
        );
        self.instances.insert(id, instance);
        Ok(())
    }

    fn give(
        &mut self,
        id: &InterfaceId,
        single: &Wanted<Ipv4Addr>,
        prefixes: &Wanted<Ipv4Net>,
    ) -> Result<Addresses, Refusal> {
        let subnet = self.subnet(&self.interface(id)?.subnet)?.clone();
        let mut taken = self.taken(&subnet.id);
        let mut given = Addresses::default();
        for index in 0..prefixes.count() {
            let block = match prefixes {
                Wanted::Any(_) => address::pick_prefix(subnet.cidr, &taken, &mut self.rng)
                    .ok_or_else(|| Refusal::no_blocks(&subnet.id))?,
                Wanted::These(list) => list[index],
            };
            if !address::is_free_block(subnet.cidr, block, &taken) {
                return Err(Refusal::address_taken(block));
            }
            taken.extend(address::expand(block));
            given.prefixes.push(block);
        }
        for index in 0..single.count() {
            let address = match single {
                Wanted::Any(_) => address::pick(subnet.cidr, &taken, &mut self.rng)
                    .ok_or_else(|| Refusal::subnet_full(&subnet.id))?,
                Wanted::These(list) => list[index],
            };
            if !address::is_usable(subnet.cidr, address) {
                let message =
                    format!("Address {address} does not fall within the subnet's usable range");
                return Err(Refusal::invalid(message));
            }
            if !taken.insert(address) {
                return Err(Refusal::address_taken(address));
            }
            given.single.push(address);
        }
        let interface = self.interface_mut(id)?;
        interface.addresses.extend(&given.single);
        interface.prefixes.extend(&given.prefixes);
        Ok(given)
    }

    /// With AllowReassignment, secondary addresses move from whoever has them.
    fn take_back(&mut self, to: &InterfaceId, list: &[Ipv4Addr]) {
        for interface in self
            .interfaces
            .values_mut()
            .filter(|interface| interface.id != *to)
        {
            let primary = interface.primary();
            interface
                .addresses
                .retain(|held| *held == primary || !list.contains(held));
        }
    }

    fn interface_mut(&mut self, id: &InterfaceId) -> Result<&mut Interface, Refusal> {
        self.interfaces
            .get_mut(id)
            .ok_or_else(|| Refusal::no_interface(id))
    }

    fn attachment_mut(&mut self, id: &AttachmentId) -> Result<&mut Attachment, Refusal> {
        let attachments = self
            .interfaces
            .values_mut()
            .filter_map(|interface| match &mut interface.state {
                InterfaceState::Attached(attachment) => Some(attachment),
                InterfaceState::Pending { .. } | InterfaceState::Available => None,
            });
        let mut found = attachments.filter(|attachment| attachment.id == *id);
        found.next().ok_or_else(|| Refusal::no_attachment(id))
    }

    fn check_groups(&self, groups: &[String]) -> Result<(), Refusal> {
        let missing = groups
            .iter()
            .find(|id| !self.groups.iter().any(|group| group.id == **id));
        missing.map_or(Ok(()), |id| Err(Refusal::no_group(id)))
    }

    fn groups_or_default(&self, groups: &[String]) -> Vec<String> {
        if groups.is_empty() {
            self.groups
                .first()
                .map(|group| group.id.clone())
                .into_iter()
                .collect()
        } else {
            groups.to_vec()
        }
    }
}

/// The `number`th /80 of a subnet, counting from one: the zeroth holds the primary addresses.
fn delegated(subnet: Ipv6Net, number: u16) -> Ipv6Net {
    let bits = u128::from(subnet.network()) | (u128::from(number) + 1) << 48;
    Ipv6Net::new_assert(bits.into(), 80)
}

#[cfg(test)]
mod tests;
