//! What the box is made of: a file as typed ([`SpecFile`]), and the same once it is known to hold
//! together ([`Spec`]).

mod typed;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use self::typed::{
    Faults, Host, Instance, Permission, Protocol, Role, SecurityGroup, Span, SpecFile, Subnet,
    Throttle,
};
use crate::world::limits;

/// The box of the demo and the tests, as a file to start from.
pub const DEFAULT: &str = include_str!("default.yaml");

/// Instance metadata, as everywhere in AWS.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Why a spec is refused: the field, and what it may be.
#[derive(Debug, thiserror::Error)]
pub enum InvalidSpec {
    #[error("the spec cannot be read: {0}")]
    Syntax(String),
    #[error("spec field `{field}`: {reason}")]
    Field { field: String, reason: String },
}

/// A spec that holds together.
#[derive(Clone, Debug)]
pub struct Spec {
    file: SpecFile,
}

impl Spec {
    /// Reads JSON or YAML.
    pub fn parse(text: &str) -> Result<Self, InvalidSpec> {
        let file: SpecFile =
            serde_saphyr::from_str(text).map_err(|error| InvalidSpec::Syntax(error.to_string()))?;
        file.try_into()
    }

    pub fn region(&self) -> &str {
        &self.file.region
    }

    pub fn cidr(&self) -> Ipv4Net {
        self.file.cidr
    }

    pub fn ipv6_cidr(&self) -> Option<Ipv6Net> {
        self.file.ipv6_cidr
    }

    pub fn nat_address(&self) -> Ipv4Addr {
        self.file.nat_address
    }

    /// The VPC's resolver: the base of its CIDR plus two.
    pub fn resolver(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.file.cidr.network()) + 2)
    }

    pub fn subnets(&self) -> &[Subnet] {
        &self.file.subnets
    }

    /// Never empty; the first is the default.
    pub fn security_groups(&self) -> &[SecurityGroup] {
        &self.file.security_groups
    }

    pub fn instances(&self) -> &[Instance] {
        &self.file.instances
    }

    pub fn hosts(&self) -> &[Host] {
        &self.file.hosts
    }

    pub fn faults(&self) -> &Faults {
        &self.file.faults
    }
}

impl TryFrom<SpecFile> for Spec {
    type Error = InvalidSpec;

    fn try_from(mut file: SpecFile) -> Result<Self, InvalidSpec> {
        if file.security_groups.is_empty() {
            file.security_groups.push(default_group(&file));
        }
        check_networks(&file)?;
        check_groups(&file)?;
        check_instances(&file)?;
        check_hosts(&file)?;
        check_faults(&file.faults)?;
        Ok(Self { file })
    }
}

fn refuse(field: impl Into<String>, reason: impl Into<String>) -> Result<(), InvalidSpec> {
    Err(InvalidSpec::Field {
        field: field.into(),
        reason: reason.into(),
    })
}

fn default_group(file: &SpecFile) -> SecurityGroup {
    let within = [
        Some(IpNet::from(file.cidr)),
        file.ipv6_cidr.map(IpNet::from),
    ];
    let anywhere = [
        IpNet::from(Ipv4Net::default()),
        IpNet::from(Ipv6Net::default()),
    ];
    let permission = |cidrs| {
        vec![Permission {
            cidrs,
            protocol: None,
            ports: None,
        }]
    };
    SecurityGroup {
        id: "sg-0default".into(),
        name: "default".into(),
        ingress: permission(within.into_iter().flatten().collect()),
        egress: permission(anywhere.into()),
    }
}

fn check_networks(file: &SpecFile) -> Result<(), InvalidSpec> {
    let is_network = |net: Ipv4Net| net.addr() == net.network();
    let sized = |net: Ipv4Net| (16..=28).contains(&net.prefix_len()) && is_network(net);
    if !sized(file.cidr) {
        return refuse(
            "cidr",
            format!("{} is not a network of /16 to /28", file.cidr),
        );
    }
    if file.ipv6_cidr.is_some_and(|net| net.prefix_len() > 64) {
        return refuse("ipv6Cidr", "must be /64 or larger");
    }
    if file.cidr.contains(&file.nat_address) {
        return refuse("natAddress", "must be a public address, outside the VPC");
    }
    if file.subnets.is_empty() {
        return refuse("subnets", "at least one is needed");
    }
    for (index, subnet) in file.subnets.iter().enumerate() {
        let field = |name: &str| format!("subnets[{index}].{name}");
        if !subnet.id.starts_with("subnet-") {
            return refuse(
                field("id"),
                format!("`{}` does not begin with `subnet-`", subnet.id),
            );
        }
        if !sized(subnet.cidr) || !file.cidr.contains(&subnet.cidr) {
            let reason = format!("{} is not a /16 to /28 within {}", subnet.cidr, file.cidr);
            return refuse(field("cidr"), reason);
        }
        if let Some(v6) = subnet.ipv6_cidr
            && (v6.prefix_len() != 64 || !file.ipv6_cidr.is_some_and(|vpc| vpc.contains(&v6)))
        {
            return refuse(
                field("ipv6Cidr"),
                format!("{v6} is not a /64 within the VPC's ipv6Cidr"),
            );
        }
        for other in &file.subnets[..index] {
            if other.id == subnet.id {
                return refuse(field("id"), format!("`{}` is there twice", subnet.id));
            }
            let overlap = |a: Ipv4Net, b: Ipv4Net| a.contains(&b) || b.contains(&a);
            if overlap(other.cidr, subnet.cidr) {
                return refuse(field("cidr"), format!("overlaps with `{}`", other.id));
            }
            if subnet.ipv6_cidr.is_some() && subnet.ipv6_cidr == other.ipv6_cidr {
                return refuse(field("ipv6Cidr"), format!("is that of `{}` too", other.id));
            }
        }
    }
    Ok(())
}

fn check_groups(file: &SpecFile) -> Result<(), InvalidSpec> {
    let mut seen = BTreeSet::new();
    for (index, group) in file.security_groups.iter().enumerate() {
        let field = |name: &str| format!("securityGroups[{index}].{name}");
        if !group.id.starts_with("sg-") || !is_label(&group.id) {
            return refuse(
                field("id"),
                format!("`{}` is not `sg-` and letters, digits", group.id),
            );
        }
        if !seen.insert(&group.id) {
            return refuse(field("id"), format!("`{}` is there twice", group.id));
        }
        for permission in group.ingress.iter().chain(&group.egress) {
            let numbered = matches!(permission.protocol, Some(Protocol::Tcp | Protocol::Udp));
            match permission.ports {
                Some(_) if !numbered => {
                    return refuse(field("ports"), "need `protocol: tcp` or `protocol: udp`");
                }
                Some((first, last)) if first > last => {
                    return refuse(field("ports"), format!("{first} to {last} is empty"));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn check_instances(file: &SpecFile) -> Result<(), InvalidSpec> {
    let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    for (index, instance) in file.instances.iter().enumerate() {
        let field = |name: &str| format!("instances[{index}].{name}");
        let name = instance.name.as_str();
        if !is_label(name) || name.len() > 40 || ["router", "internet"].contains(&name) {
            let reason = format!("`{name}` is not a label of 1 to 40 letters, digits and `-`");
            return refuse(
                field("name"),
                reason + ", other than `router` and `internet`",
            );
        }
        if !names.insert(name) {
            return refuse(field("name"), format!("`{name}` is there twice"));
        }
        if limits::find(&instance.instance_type).is_none() {
            let known = limits::names().collect::<Vec<_>>().join(", ");
            let reason = format!(
                "`{}` is not known here; one of {known}",
                instance.instance_type
            );
            return refuse(field("type"), reason);
        }
        let Some(subnet) = file
            .subnets
            .iter()
            .find(|subnet| subnet.id == instance.subnet)
        else {
            return refuse(
                field("subnet"),
                format!("`{}` is not among subnets", instance.subnet),
            );
        };
        if let Some(address) = instance.address {
            if !crate::world::address::is_usable(subnet.cidr, address) {
                let reason = format!("{address} is not usable in {}", subnet.cidr);
                return refuse(
                    field("address"),
                    reason + " (first four and last are reserved)",
                );
            }
            if !addresses.insert(address) {
                return refuse(field("address"), format!("{address} is there twice"));
            }
        }
        if instance.metadata_hop_limit == 0 || instance.metadata_hop_limit > 64 {
            return refuse(field("metadataHopLimit"), "must be 1 to 64");
        }
    }
    Ok(())
}

fn check_hosts(file: &SpecFile) -> Result<(), InvalidSpec> {
    let mut taken: BTreeSet<IpAddr> = BTreeSet::from([file.nat_address.into()]);
    let mut names = BTreeSet::new();
    for (index, host) in file.hosts.iter().enumerate() {
        let field = |name: &str| format!("hosts[{index}].{name}");
        for name in std::iter::once(&host.name).chain(host.aliases.keys()) {
            if !is_name(name) {
                return refuse(
                    field("name"),
                    format!("`{name}` is not a lower-case DNS name"),
                );
            }
            if !names.insert(name) {
                return refuse(field("name"), format!("`{name}` is there twice"));
            }
        }
        for address in [Some(IpAddr::V4(host.v4)), host.v6.map(IpAddr::V6)]
            .into_iter()
            .flatten()
        {
            if !is_public(address, file) {
                return refuse(
                    field("v4/v6"),
                    format!("{address} is not a public unicast address"),
                );
            }
            if !taken.insert(address) {
                return refuse(field("v4/v6"), format!("{address} is taken already"));
            }
        }
    }
    Ok(())
}

fn check_faults(faults: &Faults) -> Result<(), InvalidSpec> {
    if !(0.0..=1.0).contains(&faults.failures) {
        return refuse("faults.failures", "must be between 0 and 1");
    }
    for (name, span) in [
        ("latency", faults.latency),
        ("transition", faults.transition),
        ("describeLag", faults.describe_lag),
        ("metadataLag", faults.metadata_lag),
    ] {
        if span.min_ms > span.max_ms || span.max_ms > 600_000 {
            return refuse(format!("faults.{name}"), "needs minMs ≤ maxMs ≤ 600000");
        }
    }
    if let Some(throttle) = faults.throttle {
        let rates = [throttle.describe_per_second, throttle.mutate_per_second];
        if rates
            .into_iter()
            .any(|rate| !rate.is_finite() || rate < 0.0)
        {
            return refuse("faults.throttle", "rates must be 0 or more");
        }
    }
    Ok(())
}

/// Anything that only the internet could hold, so that it cannot shadow a part of the box.
fn is_public(address: IpAddr, file: &SpecFile) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_broadcast()
                || v4.is_unspecified()
                || file.cidr.contains(&v4)
                // The link between router and internet.
                || Ipv4Net::new_assert(file.nat_address, 30).contains(&v4))
        }
        IpAddr::V6(v6) => {
            let global = (v6.segments()[0] & 0xe000) == 0x2000;
            global
                && !file.ipv6_cidr.is_some_and(|vpc| vpc.contains(&v6))
                && v6 != Ipv6Addr::LOCALHOST
        }
    }
}

/// Letters of a host name's label; also safe in a namespace's and an nft chain's name.
pub(crate) fn is_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_name(text: &str) -> bool {
    text.len() <= 253 && text.contains('.') && text.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut SpecFile)) -> String {
        let mut file: SpecFile = serde_saphyr::from_str(DEFAULT).unwrap();
        change(&mut file);
        Spec::try_from(file).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn the_default_is_valid_also_as_json() {
        let spec = Spec::parse(DEFAULT).unwrap();
        assert_eq!(spec.resolver(), Ipv4Addr::new(10, 0, 0, 2));
        assert_eq!(spec.instances().len(), 3);
        let json = serde_json::to_string(&spec.file).unwrap();
        assert_eq!(Spec::parse(&json).unwrap().file, spec.file);
    }

    #[test]
    fn a_refusal_names_the_field() {
        let cases: [(&str, String); 12] = [
            ("cidr", refused(|f| f.cidr = "10.0.0.0/8".parse().unwrap())),
            (
                "natAddress",
                refused(|f| f.nat_address = Ipv4Addr::new(10, 0, 3, 4)),
            ),
            (
                "subnets[1].cidr",
                refused(|f| f.subnets[1].cidr = f.subnets[0].cidr),
            ),
            (
                "subnets[1].id",
                refused(|f| f.subnets[1].id = f.subnets[0].id.clone()),
            ),
            ("subnets[0].ipv6Cidr", refused(|f| f.ipv6_cidr = None)),
            (
                "instances[1].type",
                refused(|f| f.instances[1].instance_type = "m5.tiny".into()),
            ),
            (
                "instances[0].address",
                refused(|f| f.instances[0].address = Some(f.cidr.network())),
            ),
            (
                "instances[2].subnet",
                refused(|f| f.instances[2].subnet = "subnet-x".into()),
            ),
            (
                "instances[1].name",
                refused(|f| f.instances[1].name = "../etc".into()),
            ),
            ("hosts[1].v4", refused(|f| f.hosts[1].v4 = f.hosts[0].v4)),
            (
                "hosts[0].name",
                refused(|f| f.hosts[0].name = "Upper.example".into()),
            ),
            ("faults.failures", refused(|f| f.faults.failures = 2.0)),
        ];
        for (field, message) in cases {
            assert!(message.contains(field), "{message} does not name {field}");
        }
    }

    #[test]
    fn unknown_fields_and_garbage_are_refused() {
        for text in [
            "",
            "{}",
            "cidr: 10.0.0.0/16\nsubnet: []",
            "\u{0}",
            "[1, 2",
            "cidr: [a",
        ] {
            assert!(
                matches!(Spec::parse(text), Err(InvalidSpec::Syntax(_))),
                "{text:?} was taken"
            );
        }
    }
}
