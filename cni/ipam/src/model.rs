//! The nouns: interfaces, attachments, leases, and the limits and targets that people set.

use std::{fmt, net::Ipv4Addr, ops::Add, time::Duration};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// Milliseconds since the machine started (`CLOCK_BOOTTIME`): monotonic, unmoved by whoever sets
/// the wall clock, and the same after the agent restarts.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Moment(pub u64);

impl Moment {
    /// Zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    pub(crate) fn before(self, delay: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)),
        )
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, delay: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)),
        )
    }
}

/// EC2's name of a network interface, `eni-…`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EniId(String);

impl EniId {
    pub fn new(id: impl Into<String>) -> Self {
        Self(id.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EniId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What does not change about an attached interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eni {
    pub id: EniId,
    /// Lower case, colons.
    pub mac: String,
    /// 0 is the interface the instance started with: it is never given back.
    pub device_index: u32,
    /// The address that is the node's own on this interface; never a pod's.
    pub primary: Ipv4Addr,
    pub subnet: Ipv4Net,
}

impl Eni {
    pub fn is_primary(&self) -> bool {
        self.device_index == 0
    }
}

/// What the runtime names: one interface of one sandbox. The key of a lease, so that a late DEL
/// for an older container cannot free what its successor holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    pub container_id: String,
    pub ifname: String,
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodRef {
    pub namespace: String,
    pub name: String,
    /// Empty where the runtime does not say.
    pub uid: String,
}

/// Who holds a lease, with what is needed to find the pod again after a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub attachment: Attachment,
    /// Name of the CNI network, which GC is asked about.
    pub network: String,
    pub pod: PodRef,
    /// Path of the pod's network namespace. Empty: a stranger, see [`is_stranger`](Self::is_stranger).
    pub netns: String,
}

impl Holder {
    /// Whether no ADD on record made it: its link was found in the kernel, or the journal lost how
    /// its ADD ended. It may well be a running pod.
    pub fn is_stranger(&self) -> bool {
        self.netns.is_empty()
    }
}

/// An address in somebody's hands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub holder: Holder,
    pub address: Ipv4Addr,
    pub eni: EniId,
    pub at: Moment,
    /// What the holder's owner needs to take the pod over after a restart; opaque here. None: its
    /// ADD has not come to an end, unless the holder is a stranger.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// What the instance type allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    pub enis: u32,
    /// Including the interface's primary address.
    pub addresses_per_eni: u32,
}

impl Limits {
    /// Addresses an interface can hold for pods.
    pub fn secondary_per_eni(self) -> u32 {
        self.addresses_per_eni.saturating_sub(1)
    }

    /// What kubelet's max-pods should be: two pods of the host's network need no address.
    pub fn max_pods(self) -> u32 {
        self.enis * self.secondary_per_eni() + 2
    }
}

/// How much is kept ready, as users of the AWS CNI set it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Targets {
    /// WARM_ENI_TARGET: spare interfaces' worth of addresses. Without effect once one of the next
    /// two is set.
    pub warm_enis: u32,
    /// WARM_IP_TARGET: spare addresses.
    pub warm_addresses: Option<u32>,
    /// MINIMUM_IP_TARGET: floor on all addresses, in use or spare.
    pub minimum_addresses: Option<u32>,
    /// MAX_ENI: cap below the instance type's.
    pub max_enis: Option<u32>,
}

impl Default for Targets {
    fn default() -> Self {
        Self {
            warm_enis: 1,
            warm_addresses: None,
            minimum_addresses: None,
            max_enis: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    pub limits: Limits,
    pub targets: Targets,
    /// IP_COOLDOWN_PERIOD: how long a released address is kept from the next pod.
    pub cooldown: Duration,
}

/// The pool in numbers, as its metrics show it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub enis: u32,
    pub max_enis: u32,
    /// Most addresses that the node could ever give to pods.
    pub max_addresses: u32,
    /// Secondary addresses held.
    pub total: u32,
    pub leased: u32,
    pub cooling: u32,
    pub quarantined: u32,
    /// What the next ADDs can have. Cooling ones are not among them.
    pub allocatable: u32,
    /// Asked of EC2, not answered yet.
    pub arriving: u32,
}
