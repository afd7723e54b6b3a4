//! Turning a pod's traffic to its sidecar, inside the pod's own network namespace.

use std::{collections::BTreeSet, fmt::Write as _, net::IpAddr};

use turnpike_rules::pod::Capture;

use crate::{Error, netns::Netns, nft};

const TEXT: &str = include_str!("capture.nft");

/// The sidecar's ports beside those that [`Capture`] names.
const ADMIN_PORT: u16 = 15000;
const METRICS_PORT: u16 = 15020;
const HEALTH_PORT: u16 = 15021;

/// The pod's rules, replacing any of an earlier attempt in the same transaction.
pub(crate) fn render(capture: &Capture, own: &[IpAddr], node: &[IpAddr]) -> String {
    let Capture {
        proxy_uid,
        outbound_port,
        inbound_port,
        probe_ports,
    } = capture;
    let mut text = format!(
        "define PROXY_UID = {proxy_uid}\ndefine OUTBOUND = {outbound_port}\n\
         define INBOUND = {inbound_port}\ndefine ADMIN = {ADMIN_PORT}\n\
         define METRICS = {METRICS_PORT}\ndefine HEALTH = {HEALTH_PORT}\n\
         add table inet turnpike\ndelete table inet turnpike\n{TEXT}"
    );
    for (set, addresses) in [("own", own), ("node", node)] {
        for (digit, v4) in [('4', true), ('6', false)] {
            let items = addresses.iter().filter(|address| address.is_ipv4() == v4);
            add(&mut text, &format!("{set}{digit}"), items);
        }
    }
    add(&mut text, "probed", BTreeSet::from_iter(probe_ports));
    text
}

pub(crate) async fn undo(netns: &Netns) -> Result<(), Error> {
    let text = "add table inet turnpike\ndelete table inet turnpike\n";
    netns
        .run(move || nft::transact("taking the capture away", text))
        .await
}

fn add<T: ToString>(text: &mut String, set: &str, items: impl IntoIterator<Item = T>) {
    let items: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    if !items.is_empty() {
        let _ = writeln!(
            text,
            "add element inet turnpike {set} {{ {} }}",
            items.join(", ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_with_both_families_and_probes() {
        let capture = Capture {
            proxy_uid: 1337,
            outbound_port: 15001,
            inbound_port: 15006,
            probe_ports: vec![8081, 8080, 8081],
        };
        let own = ["10.0.1.5", "fd00:1::5"].map(|it| it.parse().unwrap());
        let node = ["10.0.1.10".parse().unwrap()];
        insta::assert_snapshot!(render(&capture, &own, &node));
    }
}
