//! An ADD that fails, at whichever step, leaves the node and the pod as they were.

#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot do")]

mod rig;

use std::{io::Write as _, process::Stdio, time::Duration};

use rig::{Namespace, Pod, World, state};
use turnpike_rules::pod::Capture;

fn ip(namespace: &Namespace, command: &str) {
    let command = command.to_owned();
    namespace.run(move || {
        let status = std::process::Command::new("ip")
            .args(command.split(' '))
            .status()
            .unwrap();
        assert!(status.success(), "ip {command}");
    });
}

/// What goes wrong, how it is made to, and what the error must speak of.
type Case = (&'static str, fn(&World, &mut Pod), &'static str);

const CASES: &[Case] = &[
    (
        "no such namespace",
        |_, pod| pod.plan.netns = "/run/netns/tpt-none".into(),
        "tpt-none",
    ),
    (
        "an ordinary file",
        |_, pod| pod.plan.netns = "/etc/passwd".into(),
        "an ordinary file",
    ),
    (
        "another kind of namespace",
        |_, pod| pod.plan.netns = "/proc/self/ns/mnt".into(),
        "ns/mnt",
    ),
    (
        "the node's own namespace",
        |world, pod| pod.plan.netns = world.node.path(),
        "the node's own",
    ),
    (
        "the host's name is taken",
        |world, pod| {
            let name = pod.plan.pod.host_interface();
            ip(
                &world.node,
                &format!("link add {name} type veth peer name tpt-peer"),
            );
        },
        "exists",
    ),
    (
        "the pod's name is taken",
        |_, pod| ip(&pod.netns, "link add eth0 type veth peer name other"),
        "creating the pair",
    ),
    (
        "an MTU that no link can have",
        |_, pod| pod.plan.mtu = 70_000,
        "creating the pair",
    ),
    (
        "an ENI that is not there",
        |_, pod| pod.plan.table = Some(9),
        "no ENI with table 9",
    ),
    (
        "capture cannot be written",
        |_, pod| {
            // Owned by a process that lives as long as its input is open: until the test ends.
            let owner = pod.netns.run(|| {
                let mut nft = std::process::Command::new("nft");
                let mut owner = nft.arg("-i").stdin(Stdio::piped()).spawn().unwrap();
                let input = owner.stdin.as_mut().unwrap();
                input
                    .write_all(b"add table inet turnpike { flags owner; }\n")
                    .unwrap();
                owner
            });
            std::mem::forget(owner);
            while !state(&pod.netns).contains("flags owner") {
                std::thread::sleep(Duration::from_millis(10));
            }
        },
        "capture in the pod",
    ),
    (
        "the address is routed elsewhere",
        |world, _| ip(&world.node, "route add 10.0.1.6/32 dev eth0 table 512"),
        "routing 10.0.1.6 to the pod",
    ),
    (
        "the second address is routed elsewhere",
        |world, _| ip(&world.node, "-6 route add fd00:1::6/128 dev eth0 table 512"),
        "routing fd00:1::6 to the pod",
    ),
    (
        "the pod has a default route",
        |_, pod| ip(&pod.netns, "route add default dev lo"),
        "routing the pod by 169.254.1.1",
    ),
];

#[test]
fn nothing_is_left_whichever_step_fails() {
    for (number, (what, sabotage, told)) in CASES.iter().enumerate() {
        let world = World::new(&format!("fail{number}"));
        let datapath = world.open();
        let mut pod = world.pod(6);
        pod.plan.policy.selected = true;
        pod.plan.capture = Some(Capture {
            proxy_uid: 1337,
            outbound_port: 15001,
            inbound_port: 15006,
            probe_ports: vec![8080],
        });
        sabotage(&world, &mut pod);
        let before = (state(&world.node), state(&pod.netns));
        let error = world.wait(datapath.apply(&pod.plan)).expect_err(what);
        assert!(error.to_string().contains(told), "{what}: {error}");
        assert!(error.undo.is_empty(), "{what}: {error}");
        let after = (state(&world.node), state(&pod.netns));
        assert_eq!(after.0, before.0, "{what}: the node differs");
        assert_eq!(after.1, before.1, "{what}: the pod differs");
    }
}

#[test]
fn a_caller_that_gives_up_gets_nothing() {
    let world = World::new("giveup");
    let datapath = world.open();
    let pod = world.pod(6);
    let before = state(&world.node);
    world.wait(async {
        let hasty = tokio::time::timeout(Duration::ZERO, datapath.apply(&pod.plan));
        assert!(hasty.await.is_err());
        // Behind it in every queue.
        for _ in 0..200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            if datapath.list().await.unwrap().is_empty() {
                break;
            }
        }
        datapath.repair().await.unwrap();
    });
    assert_eq!(state(&world.node), before);
}
