//! The bits, tables and ports that all parts of a node agree on.

/// On a packet: deliver locally, whatever its destination. Set by the rules alone.
pub const CLAIM: u32 = 0x0010_0000;
/// On a socket of the gate while it connects: this SYN may open a flow.
pub const DIAL_PERMIT: u32 = 0x0020_0000;
/// On a conntrack entry: dialled by the gate and on record.
pub const RECORDED: u32 = 0x0040_0000;
/// On a packet and a conntrack entry: came in by the primary ENI, goes out by it.
pub const PRIMARY: u32 = 0x80;
/// On a packet, by kube-proxy in each of its modes: to be hidden behind an address of this node. The
/// other bit that Kubernetes takes is 0x8000.
pub const KUBE_MASQUERADE: u32 = 0x4000;
/// On a packet: the table of the ENI that owns its source address, in the topmost byte.
pub const ENI_MASK: u32 = 0xff00_0000;

/// The user that the gate runs as.
pub const GATE_UID: u32 = 1338;
/// Where the gate listens for claimed connections.
pub const DOOR_PORT: u16 = 15002;

/// Table of the route that delivers claimed packets locally.
pub const CLAIM_TABLE: u32 = 100;
/// Table of the routes to the node's pods, and of nothing else.
pub const PODS_TABLE: u32 = 512;

/// Order of the policy rules.
pub const PREF_CLAIM: u32 = 10;
pub const PREF_TO_POD: u32 = 512;
pub const PREF_PRIMARY: u32 = 1024;
pub const PREF_FROM_POD: u32 = 1536;

/// The netlink group that the rules report denied packets to.
pub const NFLOG_GROUP: u16 = 77;

pub const fn is_eni_table(table: u32) -> bool {
    table >= 1 && table < CLAIM_TABLE
}

/// The mark of packets whose source belongs to the ENI of this table.
pub const fn eni_mark(table: u32) -> u32 {
    table << 24
}
