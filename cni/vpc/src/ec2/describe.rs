//! The Describe actions: what the world looks like, filtered and in pages.

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    filter::{self, tag_field},
    params::Params,
    xml::{self, Items, element, tag_set},
};
use crate::world::{
    Attachment, Instance, Interface, InterfaceId, Limits, Now, Refusal, Tags, World, limits,
};

const ACTIONS: [&str; 4] = [
    "DescribeInstances",
    "DescribeInstanceTypes",
    "DescribeSubnets",
    "DescribeNetworkInterfaces",
];

type Clock<'a> = &'a (dyn Fn(Now) -> OffsetDateTime + Sync);

pub(super) fn knows(action: &str) -> bool {
    ACTIONS.contains(&action)
}

pub(super) fn answer(
    action: &str,
    world: &World,
    params: &Params,
    clock: Clock<'_>,
) -> Result<String, Refusal> {
    match action {
        "DescribeInstances" => instances(world, params, clock),
        "DescribeInstanceTypes" => instance_types(params),
        "DescribeSubnets" => subnets(world, params),
        "DescribeNetworkInterfaces" => network_interfaces(world, params, clock),
        _ => Err(Refusal::unknown_action(action)),
    }
}

fn network_interfaces(world: &World, params: &Params, clock: Clock<'_>) -> Result<String, Refusal> {
    let ids = params.typed_list_of_interfaces("NetworkInterfaceId")?;
    check_paging(params, !ids.is_empty())?;
    let chosen: Vec<&Interface> = if ids.is_empty() {
        world.interfaces.values().collect()
    } else {
        let mut found = ids
            .iter()
            .map(|id| world.interface(id))
            .collect::<Result<Vec<_>, _>>()?;
        found.sort_by_key(|interface| &interface.id);
        found.dedup_by_key(|interface| &interface.id);
        found
    };
    let kept = filter::keep(chosen, &params.filters()?, |interface, name| {
        interface_field(world, interface, name)
    })?;
    let (page, token) = filter::page(kept, |i| i.id.to_string(), params, 5)?;
    let items: Items<_> = page
        .into_iter()
        .map(|interface| network_interface(world, interface, clock))
        .collect();
    Ok(element("networkInterfaceSet", &items) + &next_token(token))
}

fn instances(world: &World, params: &Params, clock: Clock<'_>) -> Result<String, Refusal> {
    let ids = params.list("InstanceId");
    check_paging(params, !ids.is_empty())?;
    let chosen: Vec<&Instance> = if ids.is_empty() {
        world.instances.values().collect()
    } else {
        ids.iter()
            .map(|id| world.instance(&(*id).into()))
            .collect::<Result<_, _>>()?
    };
    let kept = filter::keep(chosen, &params.filters()?, |instance, name| {
        instance_field(world, instance, name)
    })?;
    let (page, token) = filter::page(kept, |i| i.id.to_string(), params, 5)?;
    let items: Items<_> = page
        .into_iter()
        .map(|instance| reservation(world, instance, clock))
        .collect();
    Ok(element("reservationSet", &items) + &next_token(token))
}

fn subnets(world: &World, params: &Params) -> Result<String, Refusal> {
    let ids = params.list("SubnetId");
    check_paging(params, !ids.is_empty())?;
    let mut chosen: Vec<&crate::spec::Subnet> = if ids.is_empty() {
        world.subnets.iter().collect()
    } else {
        ids.iter()
            .map(|id| world.subnet(id))
            .collect::<Result<_, _>>()?
    };
    chosen.sort_by_key(|subnet| &subnet.id);
    let none = Tags::new();
    let tags = |id: &str| world.tags.get(id).unwrap_or(&none);
    let kept = filter::keep(chosen, &params.filters()?, |subnet, name| {
        let value = match name {
            "subnet-id" => subnet.id.clone(),
            "vpc-id" => world.vpc.clone(),
            "availability-zone" | "availabilityZone" => subnet.zone.clone(),
            "cidr-block" | "cidr" => subnet.cidr.to_string(),
            "state" => "available".into(),
            _ => return tag_field(tags(&subnet.id), name),
        };
        Some(vec![value])
    })?;
    let (page, token) = filter::page(kept, |subnet| subnet.id.clone(), params, 5)?;
    let items: Items<_> = page
        .into_iter()
        .map(|s| subnet(world, s, tags(&s.id)))
        .collect();
    Ok(element("subnetSet", &items) + &next_token(token))
}

fn instance_types(params: &Params) -> Result<String, Refusal> {
    let names = params.list("InstanceType");
    let mut chosen: Vec<&Limits> = if names.is_empty() {
        limits::all().collect()
    } else {
        let find = |name: &&str| {
            let message = format!("The following supplied instance types do not exist: [{name}]");
            limits::find(name).ok_or(Refusal::invalid_instance_type(message))
        };
        names.iter().map(find).collect::<Result<_, _>>()?
    };
    chosen.sort_by_key(|limits| limits.name);
    let kept = filter::keep(chosen, &params.filters()?, |limits, name| match name {
        "instance-type" => Some(vec![limits.name.into()]),
        "hypervisor" => Some(vec![hypervisor(limits).into()]),
        _ => None,
    })?;
    let (page, token) = filter::page(kept, |limits| limits.name.into(), params, 5)?;
    let items: Items<_> = page.into_iter().map(instance_type).collect();
    Ok(element("instanceTypeSet", &items) + &next_token(token))
}

/// Ids and MaxResults exclude each other.
fn check_paging(params: &Params, ids: bool) -> Result<(), Refusal> {
    if ids && params.get("MaxResults").is_some() {
        let message = "The parameter MaxResults cannot be used with a list of ids";
        return Err(Refusal::combination(message));
    }
    Ok(())
}

fn next_token(token: Option<String>) -> String {
    token.map_or_else(String::new, |token| element("nextToken", &token))
}

fn interface_field(world: &World, interface: &Interface, name: &str) -> Option<Vec<String>> {
    let attachment = interface.attachment();
    let of = |field: fn(&Attachment) -> String| attachment.map(field).into_iter().collect();
    let value = match name {
        "network-interface-id" => interface.id.to_string(),
        "subnet-id" => interface.subnet.clone(),
        "vpc-id" => world.vpc.clone(),
        "availability-zone" => zone(world, &interface.subnet),
        "status" => interface.status().into(),
        "description" => interface.description.clone(),
        "mac-address" => interface.mac.to_string(),
        "private-ip-address" => interface.primary().to_string(),
        "owner-id" | "attachment.instance-owner-id" => world.owner.clone(),
        "interface-type" => "interface".into(),
        "requester-managed" => "false".into(),
        "source-dest-check" => interface.source_check.to_string(),
        "group-id" => return Some(interface.groups.clone()),
        "addresses.private-ip-address" => {
            return Some(
                interface
                    .addresses
                    .iter()
                    .map(ToString::to_string)
                    .collect(),
            );
        }
        "attachment.instance-id" => return Some(of(|a| a.instance.to_string())),
        "attachment.attachment-id" => return Some(of(|a| a.id.to_string())),
        "attachment.status" => return Some(of(|a| a.state.as_str().into())),
        "attachment.device-index" => return Some(of(|a| a.device.to_string())),
        "attachment.delete-on-termination" => {
            return Some(of(|a| a.delete_on_termination.to_string()));
        }
        _ => return tag_field(&interface.tags, name),
    };
    Some(vec![value])
}

fn instance_field(world: &World, instance: &Instance, name: &str) -> Option<Vec<String>> {
    let attached = world.attached_to(&instance.id);
    let value = match name {
        "instance-id" => instance.id.to_string(),
        "instance-type" => instance.limits.name.into(),
        "instance-state-name" => "running".into(),
        "instance-state-code" => "16".into(),
        "subnet-id" => instance.subnet.clone(),
        "vpc-id" => world.vpc.clone(),
        "availability-zone" => zone(world, &instance.subnet),
        "private-ip-address" => {
            return Some(
                attached
                    .first()
                    .map(|(i, _)| i.primary().to_string())
                    .into_iter()
                    .collect(),
            );
        }
        "network-interface.network-interface-id" => {
            return Some(attached.iter().map(|(i, _)| i.id.to_string()).collect());
        }
        _ => {
            let none = Tags::new();
            return tag_field(world.tags.get(instance.id.as_str()).unwrap_or(&none), name);
        }
    };
    Some(vec![value])
}

pub(super) fn network_interface(
    world: &World,
    interface: &Interface,
    clock: Clock<'_>,
) -> xml::NetworkInterface {
    let Interface {
        id,
        subnet,
        mac,
        description,
        addresses,
        prefixes,
        ipv6,
        ipv6_prefix,
        source_check,
        tags,
        ..
    } = interface;
    let dns = |address: &std::net::Ipv4Addr| private_name(world, *address);
    xml::NetworkInterface {
        network_interface_id: id.to_string(),
        subnet_id: subnet.clone(),
        vpc_id: world.vpc.clone(),
        availability_zone: Some(zone(world, subnet)),
        description: description.clone(),
        owner_id: world.owner.clone(),
        requester_managed: Some(false),
        status: interface.status(),
        mac_address: mac.to_string(),
        private_ip_address: interface.primary().to_string(),
        private_dns_name: dns(&interface.primary()),
        source_dest_check: *source_check,
        group_set: groups(world, interface),
        attachment: interface.attachment().map(|a| attachment(world, a, clock)),
        private_ip_addresses_set: addresses
            .iter()
            .map(|address| xml::PrivateIp {
                private_ip_address: address.to_string(),
                private_dns_name: dns(address),
                primary: *address == interface.primary(),
            })
            .collect(),
        ipv4_prefix_set: (!prefixes.is_empty()).then(|| {
            prefixes
                .iter()
                .map(|net| xml::Ipv4Prefix {
                    ipv4_prefix: net.to_string(),
                })
                .collect()
        }),
        ipv6_addresses_set: ipv6
            .iter()
            .map(|v6| xml::Ipv6Address {
                ipv6_address: v6.to_string(),
                is_primary_ipv6: true,
            })
            .collect(),
        ipv6_prefix_set: ipv6_prefix.map(|net| {
            [xml::Ipv6Prefix {
                ipv6_prefix: net.to_string(),
            }]
            .into_iter()
            .collect()
        }),
        tag_set: Some(tag_set(tags)),
        interface_type: "interface",
    }
}

fn attachment(world: &World, attachment: &Attachment, clock: Clock<'_>) -> xml::Attachment {
    xml::Attachment {
        attachment_id: attachment.id.to_string(),
        instance_id: Some(attachment.instance.to_string()),
        instance_owner_id: Some(world.owner.clone()),
        device_index: attachment.device,
        network_card_index: 0,
        status: attachment.state.as_str(),
        attach_time: timestamp(clock(attachment.since)),
        delete_on_termination: attachment.delete_on_termination,
    }
}

fn reservation(world: &World, instance: &Instance, clock: Clock<'_>) -> xml::Reservation {
    let attached = world.attached_to(&instance.id);
    let primary = attached.first().map(|(interface, _)| *interface);
    let address = primary.map(Interface::primary);
    let none = Tags::new();
    let described = xml::Instance {
        instance_id: instance.id.to_string(),
        image_id: "ami-0b0c0",
        instance_state: xml::InstanceState {
            code: 16,
            name: "running",
        },
        private_dns_name: address.map_or_else(String::new, |a| private_name(world, a)),
        private_ip_address: address.map_or_else(String::new, |a| a.to_string()),
        instance_type: instance.limits.name,
        launch_time: timestamp(clock(Now::ZERO)),
        placement: xml::Placement {
            availability_zone: zone(world, &instance.subnet),
            tenancy: "default",
        },
        subnet_id: instance.subnet.clone(),
        vpc_id: world.vpc.clone(),
        architecture: "x86_64",
        hypervisor: "xen",
        source_dest_check: primary.is_none_or(|interface| interface.source_check),
        group_set: primary.map_or_else(|| [].into_iter().collect(), |i| groups(world, i)),
        network_interface_set: attached
            .into_iter()
            .map(|(interface, _)| within_instance(network_interface(world, interface, clock)))
            .collect(),
        tag_set: tag_set(world.tags.get(instance.id.as_str()).unwrap_or(&none)),
    };
    xml::Reservation {
        reservation_id: instance.id.as_str().replacen("i-", "r-", 1),
        owner_id: world.owner.clone(),
        group_set: [].into_iter().collect(),
        instances_set: [described].into_iter().collect(),
    }
}

/// An interface as part of an instance has fewer fields.
fn within_instance(mut interface: xml::NetworkInterface) -> xml::NetworkInterface {
    interface.availability_zone = None;
    interface.requester_managed = None;
    interface.tag_set = None;
    if let Some(attachment) = &mut interface.attachment {
        attachment.instance_id = None;
        attachment.instance_owner_id = None;
    }
    interface
}

fn subnet(world: &World, subnet: &crate::spec::Subnet, tags: &Tags) -> xml::Subnet {
    let zone_letter = subnet.zone.chars().last().unwrap_or('a');
    xml::Subnet {
        subnet_id: subnet.id.clone(),
        subnet_arn: format!(
            "arn:aws:ec2:{}:{}:subnet/{}",
            world.region, world.owner, subnet.id
        ),
        state: "available",
        vpc_id: world.vpc.clone(),
        owner_id: world.owner.clone(),
        cidr_block: subnet.cidr.to_string(),
        ipv6_cidr_block_association_set: subnet
            .ipv6_cidr
            .iter()
            .map(|v6| xml::Ipv6Association {
                association_id: format!("subnet-cidr-assoc-{zone_letter}"),
                ipv6_cidr_block: v6.to_string(),
                ipv6_cidr_block_state: xml::State {
                    state: "associated",
                },
            })
            .collect(),
        available_ip_address_count: world.available(subnet),
        availability_zone: subnet.zone.clone(),
        availability_zone_id: format!("box1-az{}", u32::from(zone_letter) % 32),
        default_for_az: false,
        map_public_ip_on_launch: false,
        assign_ipv6_address_on_creation: false,
        tag_set: tag_set(tags),
    }
}

fn instance_type(limits: &Limits) -> xml::InstanceType {
    xml::InstanceType {
        instance_type: limits.name,
        current_generation: limits.nitro,
        bare_metal: false,
        hypervisor: hypervisor(limits),
        v_cpu_info: xml::VCpus {
            default_v_cpus: limits.vcpus,
        },
        memory_info: xml::Memory {
            size_in_mi_b: limits.memory_mib,
        },
        network_info: xml::NetworkInfo {
            maximum_network_interfaces: limits.interfaces,
            maximum_network_cards: 1,
            default_network_card_index: 0,
            network_cards: [xml::NetworkCard {
                network_card_index: 0,
                maximum_network_interfaces: limits.interfaces,
            }]
            .into_iter()
            .collect(),
            ipv4_addresses_per_interface: limits.ipv4_per_interface,
            ipv6_addresses_per_interface: limits.ipv4_per_interface,
            ipv6_supported: true,
        },
    }
}

fn hypervisor(limits: &Limits) -> &'static str {
    if limits.nitro { "nitro" } else { "xen" }
}

fn groups(world: &World, interface: &Interface) -> Items<xml::Group> {
    let groups = interface.groups.iter();
    groups
        .map(|id| xml::Group {
            group_id: id.clone(),
            group_name: world.group_name(id).into(),
        })
        .collect()
}

fn zone(world: &World, subnet: &str) -> String {
    world
        .subnet(subnet)
        .map_or_else(|_| String::new(), |subnet| subnet.zone.clone())
}

pub(crate) fn private_name(world: &World, address: std::net::Ipv4Addr) -> String {
    let dashed = address.to_string().replace('.', "-");
    format!("ip-{dashed}.{}.compute.internal", world.region)
}

fn timestamp(at: OffsetDateTime) -> String {
    let millis = at.replace_millisecond(at.millisecond()).unwrap_or(at);
    millis.format(&Rfc3339).unwrap_or_default()
}

impl Params {
    fn typed_list_of_interfaces(&self, name: &str) -> Result<Vec<InterfaceId>, Refusal> {
        self.list(name).into_iter().map(str::parse).collect()
    }
}
