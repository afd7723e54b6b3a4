//! A pod's TCP is turned to its sidecar, except where it must not be.

#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot do")]

mod rig;

use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use nix::{
    sys::socket::{getsockopt, sockopt},
    unistd::setfsuid,
};
use rig::{
    INTERNET, INTERNET6, NODE, NODE6, Namespace, World, pod4, pod6,
    talk::{ANY, PATIENCE, ask, greet, say_here},
};
use turnpike_rules::pod::Capture;

/// Listens as the sidecar does and tells where each connection wanted to go.
fn sidecar(pod: &Namespace, port: u16) -> Receiver<SocketAddr> {
    let (sender, receiver) = channel();
    let listener = pod.run(move || TcpListener::bind((ANY, port)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = sender.send(original(&stream.unwrap()));
        }
    });
    receiver
}

fn original(stream: &TcpStream) -> SocketAddr {
    if stream.peer_addr().unwrap().ip().to_canonical().is_ipv4() {
        let address = getsockopt(stream, sockopt::OriginalDst).unwrap();
        let ip = u32::from_be(address.sin_addr.s_addr);
        (IpAddr::V4(ip.into()), u16::from_be(address.sin_port)).into()
    } else {
        let address = getsockopt(stream, sockopt::Ip6tOriginalDst).unwrap();
        let ip = address.sin6_addr.s6_addr;
        (IpAddr::V6(ip.into()), u16::from_be(address.sin6_port)).into()
    }
}

/// Connects and hangs up.
fn touch(from: &Namespace, at: SocketAddr) -> std::io::Result<()> {
    from.run(move || TcpStream::connect_timeout(&at, PATIENCE).map(drop))
}

#[test]
fn traffic_is_captured_where_it_should_be() {
    let world = World::new("capture");
    let datapath = world.open();
    let (mut pod, peer) = (world.pod(5), world.pod(6));
    pod.plan.capture = Some(Capture {
        proxy_uid: 1337,
        outbound_port: 15001,
        inbound_port: 15006,
        probe_ports: vec![8081],
    });
    pod.apply(&world, &datapath);
    peer.apply(&world, &datapath);
    let (outbound, inbound) = (sidecar(&pod.netns, 15001), sidecar(&pod.netns, 15006));
    for port in [8080, 8081, 15020, 15021] {
        greet(&pod.netns, (ANY, port));
    }
    greet(&pod.netns, ([127, 0, 0, 1], 15000));
    greet(&world.outside, (ANY, 443));
    let wait = Duration::from_secs(2);

    // Out.
    for to in [
        IpAddr::from(INTERNET),
        INTERNET6.into(),
        pod4(6).into(),
        pod6(6).into(),
    ] {
        touch(&pod.netns, (to, 443).into()).unwrap_or_else(|error| panic!("{to}: {error}"));
        assert_eq!(outbound.recv_timeout(wait).unwrap(), (to, 443).into());
    }
    for (to, seen) in [
        (IpAddr::from(INTERNET), IpAddr::from(pod4(5))),
        (INTERNET6.into(), pod6(5).into()),
    ] {
        let own = pod.netns.run(move || {
            setfsuid(1337.into());
            say_here((to, 443).into(), b"")
        });
        assert_eq!(own.unwrap(), seen, "the sidecar's own connection");
    }
    let here =
        ["127.0.0.1", "::1", "10.0.1.5", "fd00:1::5"].map(|it| it.parse::<IpAddr>().unwrap());
    for to in here {
        ask(&pod.netns, (to, 8080)).unwrap_or_else(|error| panic!("itself at {to}: {error}"));
    }

    // In.
    let (own, own6) = (IpAddr::from(pod4(5)), IpAddr::from(pod6(5)));
    for (from, to, port) in [
        (&peer.netns, own, 8080),
        (&peer.netns, own6, 8080),
        (&peer.netns, own, 8081),
        (&world.node, own, 8080),
        (&world.outside, own, 9999),
    ] {
        touch(from, (to, port).into()).unwrap();
        assert_eq!(inbound.recv_timeout(wait).unwrap(), (to, port).into());
    }
    for (from, to, port, seen) in [
        (&world.node, own, 8081, IpAddr::from(NODE)),
        (&world.node, own6, 8081, NODE6.into()),
        (&peer.netns, own, 15020, pod4(6).into()),
        (&peer.netns, own6, 15021, pod6(6).into()),
    ] {
        assert_eq!(
            ask(from, (to, port)).unwrap(),
            seen,
            "{to} {port} passes uncaptured"
        );
    }
    for port in [15000, 15001, 15006] {
        for to in [own, own6] {
            let error = touch(&peer.netns, (to, port).into()).unwrap_err();
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::ConnectionRefused,
                "{to} {port}"
            );
        }
    }
    let idle = Duration::from_millis(50);
    assert!(outbound.recv_timeout(idle).is_err() && inbound.recv_timeout(idle).is_err());
}
