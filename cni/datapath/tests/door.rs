//! The gate's place in the rules: connections of a selected pod arrive at its door, and what it dials
//! for the pod leaves with the pod's own address.

#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot do")]

mod rig;

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
};

use nix::unistd::setfsuid;
use rig::{
    INTERNET, INTERNET6, NODE, Namespace, Pod, World,
    frame::{self, Sniffer, token},
    pod4, pod6,
    talk::{ANY, PATIENCE, ask, greet, say},
};
use socket2::{Domain, Socket, Type};
use turnpike_datapath::{Datapath, Mac, Snat, marks};

fn domain(address: IpAddr) -> Domain {
    if address.is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    }
}

fn transparent(address: IpAddr) -> Socket {
    let socket = Socket::new(domain(address), Type::STREAM, None).unwrap();
    if address.is_ipv4() {
        socket.set_ip_transparent_v4(true).unwrap();
    } else {
        socket.set_ip_transparent_v6(true).unwrap();
    }
    socket
}

/// Dials with a pod's address, as a user and with a mark.
fn dial(from: SocketAddr, to: SocketAddr, uid: u32, mark: u32) -> io::Result<TcpStream> {
    setfsuid(uid.into());
    let socket = transparent(to.ip());
    setfsuid(0.into());
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    socket.set_mark(mark)?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    socket.set_mark(0)?;
    Ok(socket.into())
}

fn dial_as_gate(from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    dial(from, to, marks::GATE_UID, marks::DIAL_PERMIT)
}

/// Accepts at the door and dials on with the very same addresses and ports.
fn open_door(world: &World) {
    for any in [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ] {
        let listener = world.node.run(move || {
            let socket = transparent(any);
            if any.is_ipv6() {
                socket.set_only_v6(true).unwrap();
            }
            socket.set_reuse_address(true).unwrap();
            socket
                .bind(&SocketAddr::new(any, marks::DOOR_PORT).into())
                .unwrap();
            socket.listen(64).unwrap();
            socket
        });
        let node = world.node.clone();
        std::thread::spawn(move || {
            node.enter();
            while let Ok((accepted, peer)) = listener.accept() {
                let peer = peer.as_socket().unwrap();
                std::thread::spawn({
                    let node = node.clone();
                    move || {
                        node.enter();
                        serve(accepted.into(), peer);
                    }
                });
            }
        });
    }
}

fn serve(accepted: TcpStream, peer: SocketAddr) {
    let to = accepted.local_addr().unwrap();
    let dialled = match dial_as_gate(peer, to) {
        Ok(dialled) => dialled,
        Err(error) => return eprintln!("dialling {to} for {peer}: {error}"),
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = io::copy(&mut &accepted, &mut &dialled);
            let _ = dialled.shutdown(Shutdown::Write);
        });
        let _ = io::copy(&mut &dialled, &mut &accepted);
        let _ = accepted.shutdown(Shutdown::Write);
    });
}

fn scene(name: &str, snat: Option<Snat>) -> (World, Datapath, Vec<Pod>) {
    let world = World::new(name);
    let mut plan = world.plan();
    plan.snat = snat;
    let datapath = world.wait(async { Datapath::open(&plan).await }).unwrap();
    // One on each ENI.
    let mut pods = vec![world.pod(5), world.pod(6)];
    for pod in &mut pods {
        pod.plan.policy.selected = true;
        pod.apply(&world, &datapath);
    }
    for at in [IpAddr::from(INTERNET), INTERNET6.into()] {
        greet(&world.outside, (at, 443));
    }
    (world, datapath, pods)
}

#[test]
fn connections_go_by_the_door_and_leave_with_the_pods_address() {
    let (world, datapath, pods) = scene("door", None);
    assert!(
        ask(&pods[0].netns, (INTERNET, 443)).is_err(),
        "no gate, no door"
    );
    open_door(&world);
    for (pod, number) in pods.iter().zip([5, 6]) {
        for _ in 0..20 {
            assert_eq!(ask(&pod.netns, (INTERNET, 443)).unwrap(), pod4(number));
            assert_eq!(ask(&pod.netns, (INTERNET6, 443)).unwrap(), pod6(number));
        }
    }
    let counts = world.wait(datapath.counts()).unwrap();
    for address in [
        IpAddr::from(pod4(5)),
        pod4(6).into(),
        pod6(5).into(),
        pod6(6).into(),
    ] {
        assert!(counts.dial[&address].packets >= 20, "{counts:?}");
    }
    assert_eq!(counts.forward_original_offcluster.packets, 0);
    assert_eq!(counts.output_unrecorded.packets, 0);
}

/// The dialled leg has the very tuple of the accepted one, in the same connection tracker: much data
/// both ways, at once, on many connections shows whether one is ever taken for the other.
#[test]
fn both_legs_carry_much_at_the_same_time() {
    const SIZE: usize = 300_000;
    let (world, datapath, pods) = scene("bulk", None);
    open_door(&world);
    let listener = world
        .outside
        .run(|| TcpListener::bind((INTERNET, 9000)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            std::thread::spawn(move || io::copy(&mut &stream, &mut &stream));
        }
    });
    let carry = || {
        let stream = TcpStream::connect_timeout(&(INTERNET, 9000).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let data: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
            .take(SIZE)
            .collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                (&stream)
                    .write_all(&data)
                    .and_then(|()| stream.shutdown(Shutdown::Write))
            });
            let mut back = Vec::new();
            (&stream).read_to_end(&mut back)?;
            if back == data {
                Ok(())
            } else {
                Err(io::Error::other("other data came back"))
            }
        })
    };
    let callers: Vec<_> = (0..4)
        .map(|number| {
            pods[number % 2]
                .netns
                .start(move || (0..15).try_for_each(|_| carry()))
        })
        .collect();
    for caller in callers {
        caller.join().unwrap().unwrap();
    }
    let counts = world.wait(datapath.counts()).unwrap();
    assert_eq!(counts.output_unrecorded.packets, 0, "{counts:?}");
    assert!(
        counts.dial[&IpAddr::from(pod4(6))].bytes > 30 * SIZE as u64,
        "{counts:?}"
    );
}

#[test]
fn translated_where_the_node_translates_and_still_the_gates() {
    let direct = vec!["10.0.0.0/16".parse().unwrap()];
    let (world, datapath, pods) = scene("snat", Some(Snat { direct }));
    open_door(&world);
    let mut free = world.pod(8);
    free.plan.policy.selected = false;
    free.apply(&world, &datapath);
    for pod in pods.iter().chain([&free]) {
        assert_eq!(ask(&pod.netns, (INTERNET, 443)).unwrap(), NODE);
    }
    assert_eq!(
        ask(&pods[1].netns, (INTERNET6, 443)).unwrap(),
        pod6(6),
        "IPv6 is not translated"
    );
    // Inside the VPC, and in answer to a caller from beyond it, the pod has its own address.
    greet(&world.outside, ([10, 0, 1, 1], 80));
    assert_eq!(ask(&free.netns, ([10, 0, 1, 1], 80)).unwrap(), pod4(8));
    // A Service's VIP is nobody's range; its endpoint is what counts.
    world.node.nft(&[
        "table ip proxy { chain pre { type nat hook prerouting priority dstnat; \
         ip daddr 10.96.0.5 tcp dport 80 dnat to 10.0.1.1:80; }; }",
    ]);
    let secondary = Sniffer::new(&world.outside, &["e1"]);
    assert_eq!(
        say(&free.netns, ([10, 96, 0, 5], 80), &token(1)).unwrap(),
        pod4(8)
    );
    assert!(
        secondary.saw(token(1)),
        "it left by another ENI than its address's"
    );
    greet(&free.netns, (ANY, 80));
    let caller = world.outside.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket
            .bind(&SocketAddr::from((INTERNET, 0)).into())
            .unwrap();
        socket.connect_timeout(&SocketAddr::from((pod4(8), 80)).into(), PATIENCE)
    });
    caller.unwrap();
}

#[test]
fn nobody_else_comes_to_the_door() {
    let (world, _datapath, pods) = scene("porch", None);
    open_door(&world);
    assert_eq!(ask(&pods[0].netns, (INTERNET, 443)).unwrap(), pod4(5));
    assert!(ask(&world.outside, (NODE, marks::DOOR_PORT)).is_err());
    let reached = world.outside.run(|| {
        let door = (IpAddr::from(NODE), marks::DOOR_PORT).into();
        TcpStream::connect_timeout(&door, std::time::Duration::from_millis(500)).is_ok()
    });
    assert!(!reached, "an outsider takes a place at the door");
}

/// Conntrack gives up on a segment outside its flow's window, and with it on translating it back.
#[test]
fn a_segment_beyond_the_window_resets_no_translated_connection() {
    let direct = vec!["10.0.0.0/16".parse().unwrap()];
    let (world, datapath, _pods) = scene("stray", Some(Snat { direct }));
    let mut free = world.pod(8);
    free.plan.policy.selected = false;
    free.apply(&world, &datapath);
    let listener = world
        .outside
        .run(|| TcpListener::bind((INTERNET, 9000)).unwrap());
    let mut pods_end = free.netns.run(|| {
        let to = (INTERNET, 9000).into();
        TcpStream::connect_timeout(&to, PATIENCE).unwrap()
    });
    let (mut stream, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), IpAddr::from(NODE));
    let before = resets(&world.node);
    world.node.nft(&[
        "table inet look { chain pre { type filter hook prerouting priority -300; \
         tcp sport 9000 counter; }; }",
    ]);
    // Far from what either end has said: before it, which is fine, and beyond it.
    for place in [1000, 1000 + (1 << 31)] {
        let segment = frame::segment((INTERNET, 9000), (NODE, peer.port()), place, 0x10, b"");
        let packet = frame::ipv4(6, INTERNET, NODE, &segment);
        let from = Mac([2, 0, 0, 0, 0, 0x77]);
        let strange = frame::ethernet(rig::PRIMARY_MAC, from, frame::IPV4, &packet);
        frame::transmit(&world.outside, "e0", strange);
    }
    let came = || {
        let listing = world.node.nft(&["list", "table", "inet", "look"]);
        listing.contains("packets 2 ")
    };
    while !came() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    pods_end.write_all(b"still").unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
    assert_eq!(resets(&world.node), before);
}

/// Resets that the namespace's kernel sent.
fn resets(namespace: &Namespace) -> u64 {
    let table = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut rows = table.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let names = rows.next().unwrap().split(' ');
    let mut columns = names.zip(rows.next().unwrap().split(' '));
    let (_, count) = columns.find(|(name, _)| *name == "OutRsts").unwrap();
    count.parse().unwrap()
}

type Dial = (&'static str, SocketAddr, SocketAddr, u32, u32, bool);

/// From and to where, as which user, with which mark, and whether it may.
fn dials() -> [Dial; 8] {
    let (pod, at): (SocketAddr, SocketAddr) = ((pod4(6), 0).into(), (INTERNET, 443).into());
    let (gate, permit) = (marks::GATE_UID, marks::DIAL_PERMIT);
    [
        ("the gate", pod, at, gate, permit, true),
        ("without a permit", pod, at, gate, 0, false),
        ("with another mark", pod, at, gate, 0x100_0000, false),
        ("as root", pod, at, 0, permit, false),
        ("as the sidecar", pod, at, 1337, permit, false),
        (
            "to the metadata service",
            pod,
            ([169, 254, 169, 254], 80).into(),
            gate,
            permit,
            false,
        ),
        (
            "to another pod of the node",
            pod,
            (pod4(7), 80).into(),
            gate,
            permit,
            false,
        ),
        (
            "with the node's own address",
            (NODE, 0).into(),
            at,
            0,
            0,
            true,
        ),
    ]
}

#[test]
fn nobody_else_dials_with_a_pods_address() {
    let (world, datapath, _pods) = scene("dial", None);
    let bystander = world.pod(7);
    bystander.apply(&world, &datapath);
    for listener in [&world.outside, &bystander.netns] {
        greet(listener, (ANY, 80));
    }
    let unrecorded = || {
        world
            .wait(datapath.counts())
            .unwrap()
            .output_unrecorded
            .packets
    };
    for (what, from, to, uid, mark, allowed) in dials() {
        let before = unrecorded();
        let outcome = world.node.run(move || dial(from, to, uid, mark).map(drop));
        assert_eq!(outcome.is_ok(), allowed, "{what}: {outcome:?}");
        assert_eq!(
            unrecorded() == before,
            allowed,
            "{what}: it is not counted as it should be"
        );
    }
}
