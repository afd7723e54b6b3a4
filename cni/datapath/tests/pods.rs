//! Pods get a network, lose it, and nothing is left.

#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot do")]

mod rig;

use std::{collections::BTreeSet, net::IpAddr};

use rig::{
    INTERNET, INTERNET6, NODE, Namespace, Pod, World, pod4, pod6, state,
    talk::{ANY, ask, greet},
};
use turnpike_datapath::{Error, Removal};
use turnpike_rules::pod::Capture;

fn capture() -> Capture {
    Capture {
        proxy_uid: 1337,
        outbound_port: 15001,
        inbound_port: 15006,
        probe_ports: vec![8080],
    }
}

#[test]
fn pods_reach_each_other_the_node_and_the_outside_with_their_own_addresses() {
    let world = World::new("reach");
    let datapath = world.open();
    let (one, two) = (world.pod(5), world.pod(6));
    let applied = [&one, &two].map(|pod| pod.apply(&world, &datapath));
    for namespace in [&one.netns, &two.netns, &world.node, &world.outside] {
        greet(namespace, (ANY, 80));
    }
    let calls: [(&Namespace, IpAddr, IpAddr); 9] = [
        (&one.netns, pod4(6).into(), pod4(5).into()),
        (&two.netns, pod4(5).into(), pod4(6).into()),
        (&one.netns, pod6(6).into(), pod6(5).into()),
        (&two.netns, pod6(5).into(), pod6(6).into()),
        (&one.netns, NODE.into(), pod4(5).into()),
        (&world.node, pod4(6).into(), NODE.into()),
        (&one.netns, INTERNET.into(), pod4(5).into()),
        (&two.netns, INTERNET.into(), pod4(6).into()),
        (&two.netns, INTERNET6.into(), pod6(6).into()),
    ];
    for (from, to, seen) in calls {
        assert_eq!(
            ask(from, (to, 80)).unwrap_or_else(|error| panic!("{to}: {error}")),
            seen
        );
    }
    for (pod, applied) in [&one, &two].into_iter().zip(&applied) {
        let differences = world.wait(datapath.check(&pod.plan, applied)).unwrap();
        assert_eq!(differences, Vec::<String>::new());
    }
    let spoofed = world.wait(datapath.counts()).unwrap().spoofed;
    assert_eq!(spoofed.packets, 0, "an honest pod counts as spoofing");
}

#[test]
fn removal_leaves_nothing_and_may_be_repeated() {
    let world = World::new("remove");
    let datapath = world.open();
    let mut pods: Vec<Pod> = (5..25).map(|number| world.pod(number)).collect();
    for pod in &mut pods {
        pod.plan.policy.selected = pod.plan.table.is_some();
        pod.plan.capture = Some(capture());
    }
    let (node, inside) = (state(&world.node), state(&pods[0].netns));
    let applied: Vec<_> = pods
        .iter()
        .map(|pod| pod.apply(&world, &datapath))
        .collect();
    let found = world.wait(datapath.list()).unwrap();
    let names = |ids: Vec<Option<String>>| ids.into_iter().flatten().collect::<BTreeSet<_>>();
    assert_eq!(
        names(
            found
                .iter()
                .map(|found| found.container_id.clone())
                .collect()
        ),
        names(
            applied
                .iter()
                .map(|applied| Some(applied.container_id.clone()))
                .collect()
        ),
    );
    let one = found
        .iter()
        .find(|it| it.container_id.as_deref() == Some("container6"))
        .unwrap();
    assert_eq!(Removal::from(one), Removal::from(&applied[1]));
    assert!(one.up);
    assert_eq!(
        (one.pod_mac, one.mtu),
        (Some(applied[1].pod_mac), applied[1].mtu)
    );

    // Half of them with the namespace gone first, as some runtimes do; all at once.
    drop(pods.split_off(10));
    world.wait(async {
        let removals = applied.iter().map(|applied| datapath.remove(applied));
        for outcome in futures_util::future::join_all(removals).await {
            outcome.unwrap();
        }
    });
    assert_eq!(state(&world.node), node);
    for applied in &applied {
        world.wait(datapath.remove(applied)).unwrap();
    }
    assert_eq!(state(&world.node), node);
    // The runtime deletes the namespace; what is in it until then reaches nobody.
    let left = state(&pods[0].netns);
    assert!(!left.contains("eth0"), "{left}");
    assert_ne!(left, inside, "capture stays");
    assert!(world.wait(datapath.list()).unwrap().is_empty());
}

#[test]
fn a_late_del_of_an_older_container_harms_no_newer_one() {
    let world = World::new("late");
    let datapath = world.open();
    let (older, mut newer) = (world.pod(5), world.pod(7));
    let old = older.apply(&world, &datapath);
    newer.plan.pod = older.plan.pod.clone();
    let error = world.wait(datapath.apply(&newer.plan)).unwrap_err();
    let Error::Occupied { container_id, .. } = &error.cause else {
        panic!("{error}")
    };
    assert_eq!(container_id.as_deref(), Some("container5"));

    world.wait(datapath.remove(&old)).unwrap();
    let new = newer.apply(&world, &datapath);
    world.wait(datapath.remove(&old)).unwrap();
    assert_eq!(
        world.wait(datapath.check(&newer.plan, &new)).unwrap(),
        Vec::<String>::new()
    );
}

#[test]
fn check_says_what_differs() {
    let world = World::new("check");
    let datapath = world.open();
    let mut pod = world.pod(6);
    pod.plan.capture = Some(capture());
    pod.plan.policy.selected = true;
    let applied = pod.apply(&world, &datapath);
    let check = || {
        world
            .wait(datapath.check(&pod.plan, &applied))
            .unwrap()
            .join("; ")
    };
    assert_eq!(check(), "");

    world.node.nft(&[
        "delete",
        "element",
        "inet",
        "turnpike",
        "selected4",
        "{ 10.0.1.6 }",
    ]);
    assert!(
        check().contains("no rule for Selected(10.0.1.6)"),
        "{}",
        check()
    );
    world.wait(datapath.repair()).unwrap();
    assert_eq!(check(), "");

    pod.netns
        .nft(&["flush", "chain", "inet", "turnpike", "outbound"]);
    assert_eq!(check(), "the capture in the pod was changed");
    pod.netns.nft(&["delete", "table", "inet", "turnpike"]);
    assert_eq!(check(), "the pod's traffic is not captured");

    let shell = |namespace: &Namespace, command: &'static str| {
        namespace.run(move || {
            let words = command.split(' ');
            assert!(
                std::process::Command::new("ip")
                    .args(words)
                    .status()
                    .unwrap()
                    .success()
            );
        });
    };
    shell(&pod.netns, "route del default");
    assert!(
        check().contains("the pod has no route default by eth0"),
        "{}",
        check()
    );
    shell(&pod.netns, "addr del 10.0.1.6/32 dev eth0");
    assert!(
        check().contains("the pod does not have 10.0.1.6"),
        "{}",
        check()
    );
    shell(&pod.netns, "link set eth0 mtu 1400");
    assert!(
        check().contains("eth0 has MTU 1400 instead of 1500"),
        "{}",
        check()
    );
    shell(&world.node, "route flush table 512");
    assert!(check().contains("10.0.1.6 is not routed to"), "{}", check());
    shell(&pod.netns, "link del eth0");
    assert!(check().contains("is not there"), "{}", check());
}
