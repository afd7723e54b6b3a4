//! How many interfaces and addresses an instance type has, from AWS's published table.

/// What bounds the network of an instance type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub name: &'static str,
    pub interfaces: usize,
    /// Per interface, the primary included; a prefix takes one place.
    pub ipv4_per_interface: usize,
    pub vcpus: u32,
    pub memory_mib: u32,
    /// Prefixes need it.
    pub nitro: bool,
}

const fn nitro(
    name: &'static str,
    interfaces: usize,
    ipv4_per_interface: usize,
    vcpus: u32,
    memory_gib: u32,
) -> Limits {
    Limits {
        name,
        interfaces,
        ipv4_per_interface,
        vcpus,
        memory_mib: memory_gib * 1024,
        nitro: true,
    }
}

const fn xen(
    name: &'static str,
    interfaces: usize,
    ipv4_per_interface: usize,
    vcpus: u32,
    memory_gib: u32,
) -> Limits {
    Limits {
        nitro: false,
        ..nitro(name, interfaces, ipv4_per_interface, vcpus, memory_gib)
    }
}

const TYPES: [Limits; 27] = [
    xen("t2.medium", 3, 6, 2, 4),
    xen("m4.large", 2, 10, 2, 8),
    nitro("t3.micro", 2, 2, 2, 1),
    nitro("t3.small", 3, 4, 2, 2),
    nitro("t3.medium", 3, 6, 2, 4),
    nitro("t3.large", 3, 12, 2, 8),
    nitro("t3.xlarge", 4, 15, 4, 16),
    nitro("t3.2xlarge", 4, 15, 8, 32),
    nitro("t4g.medium", 3, 6, 2, 4),
    nitro("m5.large", 3, 10, 2, 8),
    nitro("m5.xlarge", 4, 15, 4, 16),
    nitro("m5.2xlarge", 4, 15, 8, 32),
    nitro("m5.4xlarge", 8, 30, 16, 64),
    nitro("m5.12xlarge", 8, 30, 48, 192),
    nitro("m5.24xlarge", 15, 50, 96, 384),
    nitro("m6i.large", 3, 10, 2, 8),
    nitro("m6i.xlarge", 4, 15, 4, 16),
    nitro("m6g.large", 3, 10, 2, 8),
    nitro("m7g.large", 3, 10, 2, 8),
    nitro("c5.large", 3, 10, 2, 4),
    nitro("c5.xlarge", 4, 15, 4, 8),
    nitro("c5.4xlarge", 8, 30, 16, 32),
    nitro("c5.18xlarge", 15, 50, 72, 144),
    nitro("c6i.large", 3, 10, 2, 4),
    nitro("c7g.large", 3, 10, 2, 4),
    nitro("r5.large", 3, 10, 2, 16),
    nitro("r5.xlarge", 4, 15, 4, 32),
];

pub fn find(name: &str) -> Option<&'static Limits> {
    TYPES.iter().find(|limits| limits.name == name)
}

pub fn all() -> impl Iterator<Item = &'static Limits> {
    TYPES.iter()
}

pub fn names() -> impl Iterator<Item = &'static str> {
    all().map(|limits| limits.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_there_once_and_give_the_published_pod_counts() {
        for (index, name) in names().enumerate() {
            assert_eq!(
                names().position(|other| other == name),
                Some(index),
                "{name} twice"
            );
        }
        let pods = |name| {
            let limits = find(name).unwrap();
            limits.interfaces * (limits.ipv4_per_interface - 1) + 2
        };
        // From amazon-eks-ami's eni-max-pods.txt.
        for (name, max) in [
            ("m5.large", 29),
            ("t3.medium", 17),
            ("m5.4xlarge", 234),
            ("m5.24xlarge", 737),
            ("t3.micro", 4),
        ] {
            assert_eq!(pods(name), max, "{name}");
        }
    }
}
