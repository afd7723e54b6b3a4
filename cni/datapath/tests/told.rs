//! What is refused is told, whoever else makes noise; and who changes the rules is seen.

#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot do")]

mod rig;

use std::{future::Future, net::Ipv4Addr, time::Duration};

use rig::{
    INTERNET, INTERNET6, World,
    frame::{self, IPV4, IPV6, transmit},
    pod4, pod6,
    talk::throw,
};
use turnpike_datapath::{Cause, Denials, Denied, Mac, Watch};

const ARP: u16 = 0x0806;
const VLAN: u16 = 0x8100;
const FOREIGN: Mac = Mac([2, 0xde, 0xad, 0, 0, 1]);
const POD: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 6);

/// The first report for which `wanted` holds.
async fn told(denials: &mut Denials, wanted: impl Fn(&Denied) -> bool) -> Option<Denied> {
    let found = async {
        loop {
            let denied = denials.next().await.unwrap();
            if wanted(&denied) {
                return denied;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), found)
        .await
        .ok()
}

/// Opened on the runtime's own threads, which are in the node's namespace.
async fn inside<T: Send + 'static>(open: impl Future<Output = T> + Send + 'static) -> T {
    tokio::spawn(open).await.unwrap()
}

#[test]
fn frames_that_are_not_the_pods_are_told() {
    let world = World::new("spoof");
    let datapath = world.open();
    let mut pod = world.pod(6);
    pod.plan.addresses.retain(|address| address.is_ipv4());
    let applied = pod.apply(&world, &datapath);
    let own = applied.pod_mac;
    let datagram = |from: Ipv4Addr| {
        frame::ipv4(
            17,
            from,
            INTERNET,
            &frame::udp(from.into(), INTERNET.into(), 9999, b"x"),
        )
    };
    let mut options = frame::ipv4(17, POD, INTERNET, &[7, 7, 4, 0, 0, 0, 0, 0, b'x']);
    options[0] = 0x47;
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 2];
    arp.extend([own.0.as_slice(), &[10, 0, 1, 5], &[0; 6], &[169, 254, 1, 1]].concat());
    let frames = [
        ("another pod's address", own, IPV4, datagram(pod4(5))),
        ("another MAC", FOREIGN, IPV4, datagram(POD)),
        ("an option", own, IPV4, options),
        (
            "an IPv6 address",
            own,
            IPV6,
            frame::ipv6(
                17,
                pod6(6),
                INTERNET6,
                &frame::udp(pod6(6).into(), INTERNET6.into(), 9, b"x"),
            ),
        ),
        ("ARP for another", own, ARP, arp),
        (
            "a VLAN",
            own,
            VLAN,
            [&[0, 5, 8, 0], &datagram(POD)[..]].concat(),
        ),
        ("no IP at all", own, 0x88b5, vec![0; 60]),
    ];
    for (what, from, kind, packet) in frames {
        let frame = frame::ethernet(applied.host_mac, from, kind, &packet);
        let netns = &pod.netns;
        let denied = world.wait(async {
            let mut denials = inside(async { Denials::open().unwrap() }).await;
            transmit(netns, "eth0", frame);
            // The kernel has taken the VLAN's tag off by then.
            let kind = if kind == VLAN { IPV4 } else { kind };
            told(&mut denials, |denied| denied.ethertype == kind).await
        });
        let denied = denied.unwrap_or_else(|| panic!("{what} was not told"));
        assert_eq!(denied.cause, Cause::Spoofed, "{what}");
        assert_eq!(denied.interface, applied.host_interface, "{what}");
        match kind {
            IPV4 | VLAN => assert_eq!(denied.destination, INTERNET, "{what}"),
            IPV6 => assert_eq!(
                (denied.source, denied.destination),
                (pod6(6).into(), INTERNET6.into())
            ),
            ARP => assert_eq!(denied.source, pod4(5), "{what}"),
            _ => assert!(denied.source.is_unspecified(), "{what}"),
        }
    }
}

#[test]
fn a_flood_hides_nobody_else() {
    let world = World::new("flood");
    let datapath = world.open();
    let (mut loud, mut quiet) = (world.pod(6), world.pod(5));
    for pod in [&mut loud, &mut quiet] {
        pod.plan.policy.selected = true;
        pod.apply(&world, &datapath);
    }
    assert_eq!(world.wait(datapath.refusals()).unwrap().untold, 0);
    let (found, refusals) = world.wait(async {
        let mut denials = inside(async { Denials::open().unwrap() }).await;
        loud.netns.run(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            for n in 0..3000 {
                // Every second one meets the refusal of the one before.
                let _ = socket.send_to(b"x", (INTERNET, 10_000 + n));
            }
        });
        throw(&quiet.netns, (INTERNET, 9999), b"x");
        let found = told(&mut denials, |denied| denied.destination_port == 9999).await;
        (found, datapath.refusals().await.unwrap())
    });
    assert_eq!(
        found.expect("the quiet pod's packet is told").source,
        pod4(5)
    );
    assert!(
        refusals.untold > 500,
        "the flood was told of whole: {refusals:?}"
    );
    assert!(refusals.all > refusals.untold + 100, "{refusals:?}");
}

#[test]
fn a_pods_address_from_outside_is_a_strangers() {
    let world = World::new("alien");
    let datapath = world.open();
    let mut pod = world.pod(6);
    pod.plan.policy.selected = true;
    pod.apply(&world, &datapath);
    let to = Ipv4Addr::new(198, 51, 100, 1);
    let packet = frame::ipv4(6, POD, to, &frame::tcp(POD.into(), to.into(), 443, 2, b""));
    let outside = &world.outside;
    let denied = world.wait(async {
        let mut denials = inside(async { Denials::open().unwrap() }).await;
        transmit(
            outside,
            "e0",
            frame::ethernet(rig::PRIMARY_MAC, FOREIGN, IPV4, &packet),
        );
        told(&mut denials, |denied| denied.source == POD).await
    });
    let denied = denied.expect("it is told");
    assert_eq!(
        (denied.cause, &*denied.interface),
        (Cause::Uninvited, "eth0")
    );
}

#[test]
fn who_takes_the_rules_away_is_seen_and_nobody_else() {
    let world = World::new("meddle");
    let datapath = world.open();
    let mut watch = world.wait(inside(async { Watch::open().unwrap() }));
    let mut pod = world.pod(6);
    pod.plan.policy.selected = true;
    pod.apply(&world, &datapath);
    let members: Vec<_> = (0..2000u32)
        .map(|n| Ipv4Addr::from(0x0a02_0000 + n).into())
        .collect();
    world
        .wait(datapath.set_members("cluster/b", &members, &[]))
        .unwrap();
    world.wait(datapath.repair()).unwrap();
    world.node.nft(&["add", "table", "inet", "other"]);
    let soon = Duration::from_millis(300);
    let nobody = world.wait(async { tokio::time::timeout(soon, watch.next()).await });
    assert!(
        nobody.is_err(),
        "our own work, or another's table: {nobody:?}"
    );

    for meddling in [
        &["flush", "ruleset"][..],
        &["delete", "table", "netdev", "turnpike"],
        &["add", "rule", "inet", "turnpike", "forward", "accept"],
        &[
            "delete",
            "element",
            "inet",
            "turnpike",
            "selected4",
            "{ 10.0.1.6 }",
        ],
    ] {
        world.node.nft(meddling);
        let seen =
            world.wait(async { tokio::time::timeout(Duration::from_secs(5), watch.next()).await });
        seen.unwrap_or_else(|_| panic!("{meddling:?} was not seen"))
            .unwrap();
        world.wait(datapath.repair()).unwrap();
        // What is left of the same deed.
        while world
            .wait(async { tokio::time::timeout(soon, watch.next()).await })
            .is_ok()
        {}
        let rules = world.node.nft(&["list", "ruleset"]);
        assert!(
            rules.contains("elements = { 10.0.1.6 }") && rules.contains("in_eni"),
            "{rules}"
        );
        let forward = world
            .node
            .nft(&["list", "chain", "inet", "turnpike", "forward"]);
        assert!(!forward.contains("accept\n\t}"), "{forward}");
    }
}
