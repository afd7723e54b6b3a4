//! What the kernel's tables hold, read back through nft's JSON.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use serde_json::Value;
use turnpike_rules::pod::Transport;

use super::elements::Element;
use crate::{Error, nft};

/// Every element of ours that stands. What cannot be understood is left out: it is then not kept
/// when the tables are made anew, and never a reason to fail.
pub(crate) fn elements() -> Result<BTreeSet<Element>, Error> {
    let mut elements = BTreeSet::new();
    for family in ["inet", "netdev"] {
        if let Some(listing) = nft::list(&["table", family, "turnpike"])? {
            read(&listing, &mut elements);
        }
    }
    Ok(elements)
}

fn read(listing: &Value, into: &mut BTreeSet<Element>) {
    let objects = listing["nftables"].as_array().into_iter().flatten();
    for object in objects {
        if let Some(chain) = object["chain"]["name"].as_str() {
            if let Some(interface) = chain.strip_prefix("in_") {
                into.insert(Element::Ingress(interface.to_owned()));
            }
            continue;
        }
        let set = if object["set"].is_object() {
            &object["set"]
        } else {
            &object["map"]
        };
        let Some(name) = set["name"].as_str() else {
            continue;
        };
        let items = set["elem"].as_array().into_iter().flatten();
        into.extend(items.filter_map(|item| element(name, item)));
    }
}

fn element(set: &str, item: &Value) -> Option<Element> {
    let parts = item["concat"].as_array();
    match set.strip_suffix(['4', '6'])? {
        "cluster" => Some(Element::Cluster(address(item)?)),
        "selected" => Some(Element::Selected(address(item)?)),
        "services" => Some(Element::Service(range(item)?)),
        "eni" => {
            let chain = item[1]["goto"]["target"].as_str()?;
            let table = chain.strip_prefix("eni_")?.parse().ok()?;
            Some(Element::Eni {
                address: address(&item[0])?,
                table,
            })
        }
        "who" => {
            let [interface, mac, speaker] = parts?.as_slice() else {
                return None;
            };
            let mac = mac.as_str()?.parse().ok()?;
            let interface = interface.as_str()?.to_owned();
            Some(Element::Speaks {
                interface,
                mac,
                address: address(speaker)?,
            })
        }
        "inbound" => {
            let [pod, transport, port] = parts?.as_slice() else {
                return None;
            };
            let transport = match transport.as_str()? {
                "tcp" => Transport::Tcp,
                "udp" => Transport::Udp,
                _ => return None,
            };
            let port = port.as_u64()?.try_into().ok()?;
            Some(Element::Inbound {
                address: address(pod)?,
                transport,
                port,
            })
        }
        _ => None,
    }
}

fn address(value: &Value) -> Option<IpAddr> {
    value.as_str()?.parse().ok()
}

fn range(value: &Value) -> Option<IpNet> {
    if let Some(single) = address(value) {
        return Some(single.into());
    }
    let prefix = &value["prefix"];
    let length = prefix["len"].as_u64()?.try_into().ok()?;
    IpNet::new(address(&prefix["addr"])?, length).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_the_forms_that_nft_writes() {
        let listing = json!({"nftables": [
            {"metainfo": {"version": "1.0.6"}},
            {"chain": {"family": "netdev", "table": "turnpike", "name": "in_eniaaa"}},
            {"chain": {"family": "netdev", "table": "turnpike", "name": "pod"}},
            {"set": {"name": "who4", "elem": [{"concat": ["eniaaa", "02:00:00:00:01:05", "10.0.1.5"]}]}},
            {"set": {"name": "cluster6", "elem": ["fd00:1::5"]}},
            {"set": {"name": "services4", "elem": [{"prefix": {"addr": "10.96.0.0", "len": 16}}, "10.97.0.1"]}},
            {"set": {"name": "inbound4", "elem": [{"concat": ["10.0.1.5", "tcp", 8080]}]}},
            {"set": {"name": "acct_deny4", "elem": [{"elem": {"val": "10.0.1.5"}}]}},
            {"set": {"name": "selected4"}},
            {"map": {"name": "eni4", "elem": [["10.0.1.5", {"goto": {"target": "eni_2"}}]]}}
        ]});
        let pod: IpAddr = [10, 0, 1, 5].into();
        let mut found = BTreeSet::new();
        read(&listing, &mut found);
        let expected = BTreeSet::from([
            Element::Ingress("eniaaa".into()),
            Element::Speaks {
                interface: "eniaaa".into(),
                mac: "02:00:00:00:01:05".parse().unwrap(),
                address: pod,
            },
            Element::Cluster("fd00:1::5".parse().unwrap()),
            Element::Service("10.96.0.0/16".parse().unwrap()),
            Element::Service("10.97.0.1/32".parse().unwrap()),
            Element::Inbound {
                address: pod,
                transport: Transport::Tcp,
                port: 8080,
            },
            Element::Eni {
                address: pod,
                table: 2,
            },
        ]);
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_malformed_is_left_out() {
        let listing = json!({"nftables": [
            {"set": {"name": "who4", "elem": [{"concat": ["eniaaa"]}, 7, null, {"concat": []}]}},
            {"set": {"name": "inbound4", "elem": [{"concat": ["10.0.1.5", "tcp", 99999]}]}},
            {"map": {"name": "eni4", "elem": [["10.0.1.5"], [], "x"]}},
            {"set": 3}, "odd"
        ]});
        let mut found = BTreeSet::new();
        read(&listing, &mut found);
        assert!(found.is_empty(), "{found:?}");
    }
}
