//! Which packets the rules refused.

use std::{net::IpAddr, time::SystemTime};

use crate::Error;

/// Packets of one flow that the rules refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    pub time: SystemTime,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// 0 where the protocol has none or the fragment does not carry them.
    pub source_port: u16,
    pub destination_port: u16,
    /// Where it came in: the host's end of the pod's veth pair; empty if the link is gone.
    pub interface: String,
    pub count: u64,
}

/// The reader; one at a time in a network namespace.
#[derive(Debug)]
pub struct Denials {}

impl Denials {
    /// Binds to the rules' log group. Needs CAP_NET_ADMIN, and a tokio runtime.
    pub fn open() -> Result<Self, Error> {
        Err(Error::Closed)
    }

    /// The next flow to report: at once when its first packet is refused, and then once a second
    /// with the count of those that followed. Safe to drop and call again.
    pub async fn next(&mut self) -> Result<Denied, Error> {
        Err(Error::Closed)
    }
}
