//! What the rules counted.

use std::{collections::BTreeMap, net::IpAddr};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

/// Counts since the tables were made; a pod's own since its ADD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sent by sockets that the gate dialled for the pod.
    pub dial: BTreeMap<IpAddr, Count>,
    /// Sent by the pod in answer to admitted callers from outside the cluster.
    pub inbound: BTreeMap<IpAddr, Count>,
    /// Refused to the pod.
    pub deny: BTreeMap<IpAddr, Count>,
    /// Frames whose sender is not who may speak on that veth.
    pub spoofed: Count,
    pub forward_denied: Count,
    /// The second look: a selected pod's own packet on its way out of an ENI. Always zero.
    pub forward_original_offcluster: Count,
    /// A pod's source address on a socket without a recorded flow.
    pub output_unrecorded: Count,
}
