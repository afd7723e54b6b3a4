//! What the rules counted.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::Value;

use crate::{Error, nft};

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

/// Lists the tables. Two processes of nft, however many pods there are.
pub(crate) fn read() -> Result<Counts, Error> {
    let mut counts = Counts::default();
    if let Some(listing) = nft::list(&["table", "inet", "turnpike"])? {
        collect(&listing, &mut counts);
    }
    if let Some(listing) = nft::list(&["counter", "netdev", "turnpike", "spoofed"])? {
        collect(&listing, &mut counts);
    }
    Ok(counts)
}

/// How much was refused, in packets since the tables were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    pub all: u64,
    /// Of these, beyond what is logged of one pod in a second.
    pub untold: u64,
}

/// One process of nft.
pub(crate) fn refusals() -> Result<Refusals, Error> {
    let listing = nft::list(&["counters"])?.unwrap_or_default();
    let mut refusals = Refusals::default();
    let objects = listing["nftables"].as_array().into_iter().flatten();
    let counters = objects.map(|object| &object["counter"]);
    for counter in counters.filter(|counter| counter["table"] == "turnpike") {
        let packets = count(counter).packets;
        match counter["name"].as_str() {
            Some("forward_denied" | "spoofed") => refusals.all += packets,
            Some("untold") => refusals.untold += packets,
            _ => {}
        }
    }
    Ok(refusals)
}

fn collect(listing: &Value, counts: &mut Counts) {
    for object in listing["nftables"].as_array().into_iter().flatten() {
        let counter = &object["counter"];
        match counter["name"].as_str() {
            Some("spoofed") => counts.spoofed = count(counter),
            Some("forward_denied") => counts.forward_denied = count(counter),
            Some("forward_original_offcluster") => {
                counts.forward_original_offcluster = count(counter);
            }
            Some("output_unrecorded") => counts.output_unrecorded = count(counter),
            _ => {}
        }
        let set = &object["set"];
        let per_pod = match set["name"].as_str() {
            Some("acct_dial4" | "acct_dial6") => &mut counts.dial,
            Some("acct_inbound4" | "acct_inbound6") => &mut counts.inbound,
            Some("acct_deny4" | "acct_deny6") => &mut counts.deny,
            _ => continue,
        };
        for element in set["elem"].as_array().into_iter().flatten() {
            let element = &element["elem"];
            let address = element["val"].as_str().and_then(|text| text.parse().ok());
            per_pod.extend(address.map(|address: IpAddr| (address, count(&element["counter"]))));
        }
    }
}

fn count(counter: &Value) -> Count {
    let number = |name: &str| counter[name].as_u64().unwrap_or_default();
    Count {
        packets: number("packets"),
        bytes: number("bytes"),
    }
}
