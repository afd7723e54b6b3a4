//! What a selected pod tries, and what becomes of it: each attempt once with the rules, when nothing
//! may arrive, and once without them, when all must. The oracle is the wire outside.

#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot do")]

mod rig;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rig::{
    INTERNET, INTERNET6, METADATA, NODE, Pod, World,
    frame::{self, IPV4, IPV6, Sniffer, token, transmit},
    pod4, pod6,
    talk::{ANY, ask, greet, say, throw},
};
use turnpike_datapath::{Applied, Datapath, Mac, PodPolicy};
use turnpike_rules::pod::{InboundPort, Transport};

/// The pod that tries, its peer in the cluster, and what its frames must look like.
struct Scene {
    world: World,
    datapath: Datapath,
    pod: Pod,
    peer: Pod,
    applied: Applied,
}

impl Scene {
    fn new(name: &str, selected: bool) -> Self {
        let world = World::new(name);
        let datapath = world.open();
        let (mut pod, peer) = (world.pod(6), world.pod(5));
        pod.plan.policy.selected = selected;
        let applied = pod.apply(&world, &datapath);
        peer.apply(&world, &datapath);
        Self {
            world,
            datapath,
            pod,
            peer,
            applied,
        }
    }

    fn send(&self, from: Mac, kind: u16, packet: &[u8]) {
        let frame = frame::ethernet(self.applied.host_mac, from, kind, packet);
        transmit(&self.pod.netns, "eth0", frame);
    }

    fn send4(&self, protocol: u8, payload: &[u8]) {
        self.send(
            self.applied.pod_mac,
            IPV4,
            &frame::ipv4(protocol, POD, INTERNET, payload),
        );
    }

    /// A datagram that says it is from somebody else.
    fn spoof(&self, mac: Mac, from: Ipv4Addr, word: &[u8]) {
        let datagram = frame::udp(from.into(), INTERNET.into(), 9999, word);
        self.send(mac, IPV4, &frame::ipv4(17, from, INTERNET, &datagram));
    }
}

const POD: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 6);

type Attempt = (&'static str, fn(&Scene, &[u8]));

const ATTEMPTS: &[Attempt] = &[
    ("TCP", |s, word| {
        drop(say(&s.pod.netns, (INTERNET, 443), word))
    }),
    ("TCP over IPv6", |s, word| {
        drop(say(&s.pod.netns, (INTERNET6, 443), word))
    }),
    ("DNS over TCP to a resolver of its own", |s, word| {
        drop(say(&s.pod.netns, (INTERNET, 53), word));
    }),
    ("UDP", |s, word| throw(&s.pod.netns, (INTERNET, 9999), word)),
    ("QUIC", |s, word| throw(&s.pod.netns, (INTERNET, 443), word)),
    ("UDP over IPv6", |s, word| {
        throw(&s.pod.netns, (INTERNET6, 9999), word)
    }),
    ("DNS over UDP to a resolver of its own", |s, word| {
        throw(&s.pod.netns, (INTERNET, 53), word)
    }),
    ("ping", |s, word| s.send4(1, &frame::echo(word))),
    ("ping over IPv6", |s, word| {
        let message = frame::echo6(pod6(6), INTERNET6, word);
        s.send(
            s.applied.pod_mac,
            IPV6,
            &frame::ipv6(58, pod6(6), INTERNET6, &message),
        );
    }),
    ("SCTP", |s, word| s.send4(132, &[&[0; 12], word].concat())),
    ("DCCP", |s, word| s.send4(33, &[&[0; 16], word].concat())),
    ("GRE", |s, word| s.send4(47, &[&[0; 4], word].concat())),
    ("IP in IP", |s, word| {
        s.send4(4, &frame::ipv4(17, POD, INTERNET, word))
    }),
    ("IPv6 in IP", |s, word| {
        s.send4(41, &frame::ipv6(17, pod6(6), INTERNET6, word))
    }),
    ("ESP", |s, word| s.send4(50, &[&[0; 8], word].concat())),
    ("a protocol nobody has", |s, word| s.send4(253, word)),
    ("a later fragment alone", |s, word| {
        // Without connection tracking it would leave as it is; with it, it waits for the first one.
        let first = frame::ipv4_fragment(
            17,
            POD,
            INTERNET,
            0x2000,
            &[0x15, 0xb3, 0x27, 0x0f, 0, 16, 0, 0],
        );
        let later = frame::ipv4_fragment(17, POD, INTERNET, 1, word);
        s.send(s.applied.pod_mac, IPV4, &first);
        s.send(s.applied.pod_mac, IPV4, &later);
    }),
    ("a segment of no connection", |s, word| {
        s.send4(6, &frame::tcp(POD.into(), INTERNET.into(), 443, 0x10, word));
    }),
    ("data in a SYN", |s, word| {
        s.send4(6, &frame::tcp(POD.into(), INTERNET.into(), 443, 2, word))
    }),
    ("an option that records the route", |s, word| {
        let mut packet = frame::ipv4(
            17,
            POD,
            INTERNET,
            &[&[7, 7, 4, 0, 0, 0, 0, 0], word].concat(),
        );
        packet[0] = 0x47;
        packet[10..12].fill(0);
        let sum = packet[..28]
            .chunks(2)
            .map(|it| u32::from(it[0]) << 8 | u32::from(it[1]))
            .sum::<u32>();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        s.send(s.applied.pod_mac, IPV4, &packet);
    }),
    ("the address of another pod", |s, word| {
        s.spoof(s.applied.pod_mac, pod4(5), word)
    }),
    ("the address of the node", |s, word| {
        s.spoof(s.applied.pod_mac, pod4(12), word)
    }),
    ("an address of nobody", |s, word| {
        s.spoof(s.applied.pod_mac, [198, 51, 100, 7].into(), word)
    }),
    ("another MAC", |s, word| {
        s.spoof(Mac([2, 0xde, 0xad, 0, 0, 1]), POD, word)
    }),
    ("the IPv6 address of another pod", |s, word| {
        let datagram = frame::udp(pod6(5).into(), INTERNET6.into(), 9999, word);
        s.send(
            s.applied.pod_mac,
            IPV6,
            &frame::ipv6(17, pod6(5), INTERNET6, &datagram),
        );
    }),
    ("data in an IPv6 option", |s, word| {
        let mut header = vec![17, 1, 0x1e, 12];
        header.extend(word);
        header.resize(16, 0);
        header.extend(frame::udp(pod6(6).into(), INTERNET6.into(), 9999, b"x"));
        s.send(
            s.applied.pod_mac,
            IPV6,
            &frame::ipv6(60, pod6(6), INTERNET6, &header),
        );
    }),
    ("the metadata service", |s, word| {
        drop(say(&s.pod.netns, (METADATA, 80), word))
    }),
    ("the metadata service over IPv6", |s, word| {
        let metadata: IpAddr = "fd00:ec2::254".parse().unwrap();
        drop(say(&s.pod.netns, (metadata, 80), word));
    }),
    ("a Service whose endpoint is outside", |s, word| {
        drop(say(&s.pod.netns, ([10, 96, 0, 5], 80), word));
    }),
];

/// As kube-proxy does it: 10.96.0.5:80 is the internet's 443.
fn outside_service(world: &World) {
    world.node.run(|| {
        let rules = "table ip proxy { chain pre { type nat hook prerouting priority dstnat; \
                     ip daddr 10.96.0.5 tcp dport 80 dnat to 203.0.113.66:443; }; }";
        let status = std::process::Command::new("nft")
            .arg(rules)
            .status()
            .unwrap();
        assert!(status.success());
    });
}

#[test]
fn nothing_of_a_selected_pod_leaves_and_all_of_it_would_without_the_rules() {
    for closed in [true, false] {
        let scene = Scene::new(if closed { "closed" } else { "open" }, true);
        let Scene {
            world,
            datapath,
            pod,
            peer,
            ..
        } = &scene;
        let services = ["10.96.0.0/16".parse().unwrap()];
        world
            .wait(datapath.set_members("cluster/static", &[], &services))
            .unwrap();
        if !closed {
            world.node.nft(&["flush", "ruleset"]);
        }
        outside_service(world);
        for port in [80, 443, 53] {
            greet(&world.outside, (ANY, port));
        }
        greet(&peer.netns, (ANY, 80));
        greet(&world.node, (NODE, 10250));
        let sniffer = Sniffer::new(&world.outside, &["e0", "e1"]);
        for (number, (what, attempt)) in ATTEMPTS.iter().enumerate() {
            attempt(&scene, &token(number));
            assert_eq!(
                sniffer.saw(token(number)),
                !closed,
                "{what}, closed: {closed}"
            );
        }
        assert_eq!(
            ask(&pod.netns, (NODE, 10250)).is_err(),
            closed,
            "the node's own services"
        );
        assert_eq!(
            ask(&pod.netns, (pod4(5), 80)).unwrap(),
            pod4(6),
            "the cluster"
        );
        assert_eq!(
            ask(&pod.netns, (pod6(5), 80)).unwrap(),
            pod6(6),
            "the cluster over IPv6"
        );
        if closed {
            let counts = world.wait(datapath.counts()).unwrap();
            assert!(counts.spoofed.packets >= 6, "{counts:?}");
            assert!(counts.forward_denied.packets >= 15, "{counts:?}");
            assert!(
                counts.deny[&IpAddr::from(pod4(6))].packets >= 10,
                "{counts:?}"
            );
            assert!(
                counts.deny[&IpAddr::from(pod6(6))].packets >= 2,
                "{counts:?}"
            );
            assert_eq!(counts.forward_original_offcluster.packets, 0);
            assert_eq!(counts.output_unrecorded.packets, 0);
        }
    }
}

#[test]
fn callers_from_outside_reach_the_ports_that_are_admitted_while_they_are() {
    let scene = Scene::new("inbound", true);
    let Scene {
        world,
        datapath,
        pod,
        peer,
        ..
    } = &scene;
    let inside = |port: u16, v6: bool| -> (IpAddr, u16) {
        (if v6 { pod6(6).into() } else { pod4(6).into() }, port)
    };
    for port in [8080, 8443] {
        greet(&pod.netns, (ANY, port));
    }
    let admit = |port| PodPolicy {
        selected: true,
        inbound: vec![InboundPort {
            transport: Transport::Tcp,
            port,
        }],
    };
    for v6 in [false, true] {
        assert!(
            ask(&world.outside, inside(8443, v6)).is_err(),
            "not admitted yet"
        );
        world
            .wait(datapath.update("container6", &admit(8443)))
            .unwrap();
        ask(&world.outside, inside(8443, v6)).unwrap();
        assert!(
            ask(&world.outside, inside(8080, v6)).is_err(),
            "another port"
        );
        assert!(
            ask(&peer.netns, inside(8080, v6)).is_ok(),
            "the cluster needs no permission"
        );
        assert!(
            ask(&world.node, inside(8080, v6)).is_ok(),
            "nor does the node"
        );
        world
            .wait(datapath.update("container6", &admit(1)))
            .unwrap();
        assert!(
            ask(&world.outside, inside(8443, v6)).is_err(),
            "no longer admitted"
        );
    }
    // Not even one packet, whether it would be answered or not.
    let inside = Sniffer::new(&pod.netns, &["eth0"]);
    for (number, at) in [(1, IpAddr::from(pod4(6))), (2, pod6(6).into())] {
        throw(&world.outside, (at, 8443), &token(number));
        assert!(!inside.saw(token(number)), "an uninvited datagram to {at}");
        throw(&peer.netns, (at, 8443), &token(number));
        assert!(inside.saw(token(number)), "the cluster's datagram to {at}");
    }
    let counts = world.wait(datapath.counts()).unwrap();
    assert!(
        counts.inbound[&IpAddr::from(pod4(6))].bytes > 0,
        "{counts:?}"
    );
    assert_eq!(
        counts.output_unrecorded.packets, 0,
        "an uninvited caller was answered"
    );
}

#[test]
fn a_pod_is_selected_and_released_while_it_runs() {
    let scene = Scene::new("select", false);
    let Scene {
        world,
        datapath,
        pod,
        ..
    } = &scene;
    greet(&world.outside, (ANY, 443));
    let reach = || ask(&pod.netns, (INTERNET, 443)).is_ok();
    assert!(reach());
    let selected = PodPolicy {
        selected: true,
        inbound: Vec::new(),
    };
    world
        .wait(datapath.update("container6", &selected))
        .unwrap();
    assert!(!reach());
    world
        .wait(datapath.update("container6", &PodPolicy::default()))
        .unwrap();
    assert!(reach());
    let unknown = world
        .wait(datapath.update("nobody", &selected))
        .unwrap_err();
    assert!(
        matches!(unknown, turnpike_datapath::Error::Unknown { .. }),
        "{unknown}"
    );
}

#[test]
fn refused_packets_are_told_with_their_flow_and_interface() {
    let scene = Scene::new("told", true);
    let Scene {
        world,
        pod,
        applied,
        ..
    } = &scene;
    let told = world.wait(async {
        let mut denials = tokio::spawn(async { turnpike_datapath::Denials::open() });
        let mut denials = (&mut denials).await.unwrap().unwrap();
        for _ in 0..3 {
            // From one port, so that it is one flow.
            pod.netns.run(|| {
                let socket = std::net::UdpSocket::bind("0.0.0.0:7777").unwrap();
                let _ = socket.send_to(b"x", (INTERNET, 9999));
            });
        }
        throw(&pod.netns, (INTERNET6, 9998), b"x");
        let mut told = Vec::new();
        let mut repeated = 0;
        while told.len() < 2 || repeated < 2 {
            let next = tokio::time::timeout(Duration::from_secs(10), denials.next());
            let denied = next.await.expect("no more was told").unwrap();
            if denied.destination_port == 9999
                && !told.is_empty()
                && denied.count > 0
                && repeated < 2
            {
                repeated += denied.count;
                if told
                    .iter()
                    .any(|it: &turnpike_datapath::Denied| it.destination_port == 9999)
                {
                    continue;
                }
                repeated -= denied.count;
            }
            told.push(denied);
        }
        told
    });
    let by_port: BTreeMap<u16, _> = told
        .into_iter()
        .map(|it| (it.destination_port, it))
        .collect();
    let (v4, v6) = (&by_port[&9999], &by_port[&9998]);
    assert_eq!(
        (v4.source, v4.destination),
        (pod4(6).into(), INTERNET.into())
    );
    assert_eq!((v4.protocol, v4.source_port, v4.count), (17, 7777, 1));
    assert_eq!(
        (v6.source, v6.destination),
        (pod6(6).into(), INTERNET6.into())
    );
    for denied in [v4, v6] {
        assert_eq!(denied.interface, applied.host_interface);
    }
}

#[test]
fn the_base_is_laid_again_under_traffic_without_a_gap_or_a_hole() {
    let scene = Scene::new("again", true);
    let Scene {
        world,
        datapath,
        pod,
        peer,
        ..
    } = &scene;
    greet(&peer.netns, (ANY, 80));
    greet(&world.outside, (ANY, 443));
    let sniffer = Sniffer::new(&world.outside, &["e0", "e1"]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let mut calls = 0;
            while !done.load(Ordering::Relaxed) {
                ask(&pod.netns, (pod4(5), 80)).expect("traffic in the cluster was interrupted");
                calls += 1;
            }
            calls
        });
        let outside = scope.spawn(|| {
            let mut tries = 0;
            while !done.load(Ordering::Relaxed) {
                throw(&pod.netns, (INTERNET, 9999), &token(1));
                say(&pod.netns, (INTERNET, 443), &token(2)).expect_err("a hole for TCP");
                tries += 1;
            }
            tries
        });
        for _ in 0..10 {
            // As a restarted agent does it, knowing nothing.
            let again = world.open();
            world.wait(again.adopt(&pod.plan, &scene.applied)).unwrap();
        }
        for _ in 0..5 {
            world.wait(datapath.repair()).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        assert!(
            inside.join().unwrap() > 5 && outside.join().unwrap() > 5,
            "there was no traffic"
        );
    });
    assert!(
        !sniffer.any(|_| true),
        "something left while the rules were laid again"
    );
}
