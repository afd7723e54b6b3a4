//! What a user writes: every field as typed, with its default.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// The spec file, JSON or YAML. Unknown fields are refused.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SpecFile {
    #[serde(default = "region")]
    pub region: String,
    pub cidr: Ipv4Net,
    #[serde(default)]
    pub ipv6_cidr: Option<Ipv6Net>,
    /// The public address that the NAT gateway gives to connections from the VPC.
    #[serde(default = "nat_address")]
    pub nat_address: Ipv4Addr,
    pub subnets: Vec<Subnet>,
    /// The first is the default group. None: one that allows all within the VPC and all out.
    #[serde(default)]
    pub security_groups: Vec<SecurityGroup>,
    pub instances: Vec<Instance>,
    #[serde(default)]
    pub hosts: Vec<Host>,
    #[serde(default)]
    pub faults: Faults,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Subnet {
    pub id: String,
    pub zone: String,
    pub cidr: Ipv4Net,
    #[serde(default)]
    pub ipv6_cidr: Option<Ipv6Net>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecurityGroup {
    pub id: String,
    pub name: String,
    #[serde(default)]
    pub ingress: Vec<Permission>,
    #[serde(default)]
    pub egress: Vec<Permission>,
}

/// One permission; a port range without a protocol is refused.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Permission {
    pub cidrs: Vec<IpNet>,
    /// Absent: any.
    #[serde(default)]
    pub protocol: Option<Protocol>,
    /// First and last port, for TCP and UDP.
    #[serde(default)]
    pub ports: Option<(u16, u16)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Icmp,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Instance {
    pub name: String,
    #[serde(rename = "type")]
    pub instance_type: String,
    pub subnet: String,
    /// Absent: one is chosen at start.
    #[serde(default)]
    pub address: Option<Ipv4Addr>,
    /// Whether its kernel forwards from the start, as a Kubernetes node image has it.
    #[serde(default)]
    pub forwarding: bool,
    /// Hops that an answer of the metadata service survives.
    #[serde(default = "hop_limit")]
    pub metadata_hop_limit: u8,
}

/// A host of the pretended internet.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Host {
    pub name: String,
    pub v4: Ipv4Addr,
    #[serde(default)]
    pub v6: Option<Ipv6Addr>,
    #[serde(default)]
    pub role: Role,
    /// Further names and the addresses that they resolve to.
    #[serde(default)]
    pub aliases: BTreeMap<String, Vec<IpAddr>>,
    /// Whether the name has an HTTPS record with address hints.
    #[serde(default)]
    pub https_record: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Answers HTTP and HTTPS.
    #[default]
    Server,
    /// Takes whatever comes, on every port, and every name below its own resolves to it.
    Attacker,
}

/// How the cloud misbehaves. All of it is drawn from the seed.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Faults {
    pub seed: u64,
    /// Before each answer of the EC2 API.
    pub latency: Span,
    /// From pending to available, attaching to attached, detaching to detached.
    pub transition: Span,
    /// How old the state is that a Describe call sees.
    pub describe_lag: Span,
    /// How old the state is that the metadata service sees.
    pub metadata_lag: Span,
    /// Share of EC2 calls that fail with InternalError, 0 to 1; they change nothing.
    pub failures: f64,
    /// Absent: nothing is throttled.
    pub throttle: Option<Throttle>,
}

/// Token buckets, one for each action of the API.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Throttle {
    pub describe_burst: u32,
    pub describe_per_second: f64,
    pub mutate_burst: u32,
    pub mutate_per_second: f64,
}

/// A range of milliseconds; each use draws from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Span {
    pub min_ms: u64,
    pub max_ms: u64,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            seed: 1,
            latency: Span::default(),
            transition: Span {
                min_ms: 20,
                max_ms: 60,
            },
            describe_lag: Span::default(),
            metadata_lag: Span::default(),
            failures: 0.0,
            throttle: Some(Throttle::default()),
        }
    }
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            describe_burst: 100,
            describe_per_second: 20.0,
            mutate_burst: 50,
            mutate_per_second: 5.0,
        }
    }
}

fn region() -> String {
    "eu-west-1".into()
}

fn nat_address() -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, 1)
}

fn hop_limit() -> u8 {
    1
}
