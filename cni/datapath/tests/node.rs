//! The node's own part: laid once or many times, over anything, and mended.

#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot do")]

mod rig;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
};

use rig::{
    INTERNET, NODE, Namespace, World,
    frame::{Sniffer, token},
    pod4, state,
    talk::{ANY, PATIENCE, ask, greet},
};
use turnpike_datapath::{Datapath, Error, Mac, PodPolicy};

fn elements(world: &World, set: &str) -> String {
    let listing = world.node.nft(&["list", "set", "inet", "turnpike", set]);
    let elements = listing
        .split_once("elements = {")
        .map_or("", |(_, rest)| rest);
    let inside = elements.split_once('}').map_or("", |(inside, _)| inside);
    inside.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn laid_twice_it_is_the_same() {
    let world = World::new("twice");
    let _first = world.open();
    let before = state(&world.node);
    for text in [
        "10:",
        "512:",
        "1024:",
        "1536:",
        "169.254.20.10",
        "fd00:20::10",
    ] {
        assert!(before.contains(text), "{text} is missing in {before}");
    }
    let _second = world.open();
    assert_eq!(state(&world.node), before);
}

#[test]
fn a_restarted_agent_finds_pods_and_members_in_place_until_it_settles() {
    let world = World::new("restart");
    let (mut one, mut two, gone) = (world.pod(5), world.pod(6), world.pod(7));
    one.plan.policy.selected = true;
    two.plan.policy.selected = true;
    let member = ["10.0.2.7".parse().unwrap()];
    let range = ["10.96.0.0/16".parse().unwrap()];
    let applied = {
        let datapath = world.open();
        let applied = one.apply(&world, &datapath);
        two.apply(&world, &datapath);
        gone.apply(&world, &datapath);
        world
            .wait(datapath.set_members("cluster/node-b", &member, &range))
            .unwrap();
        applied
    };
    drop(gone);
    let again = world.open();
    assert_eq!(elements(&world, "selected4"), "10.0.1.5, 10.0.1.6");
    let all = "10.0.1.5, 10.0.1.6, 10.0.1.7, 10.0.2.7";
    assert_eq!(elements(&world, "cluster4"), all);
    assert_eq!(elements(&world, "services4"), "10.96.0.0/16");

    // It learns of one pod and of nothing else. The second one's link stands: it is held as before.
    world.wait(again.adopt(&one.plan, &applied)).unwrap();
    assert_eq!(elements(&world, "cluster4"), all);
    world.wait(again.settle()).unwrap();
    assert_eq!(elements(&world, "selected4"), "10.0.1.5, 10.0.1.6");
    assert_eq!(elements(&world, "cluster4"), "10.0.1.5, 10.0.1.6");
    assert_eq!(elements(&world, "services4"), "");
    assert_eq!(
        world.wait(again.check(&one.plan, &applied)).unwrap(),
        Vec::<String>::new()
    );
    world
        .wait(again.update("container5", &PodPolicy::default()))
        .unwrap();
    assert_eq!(elements(&world, "selected4"), "10.0.1.6");
}

#[test]
fn members_stand_while_any_source_names_them() {
    let world = World::new("members");
    let datapath = world.open();
    let set = |source: &str, addresses: &[&str], services: &[&str]| {
        let addresses: Vec<_> = addresses.iter().map(|it| it.parse().unwrap()).collect();
        let services: Vec<_> = services.iter().map(|it| it.parse().unwrap()).collect();
        world
            .wait(datapath.set_members(source, &addresses, &services))
            .unwrap();
    };
    set(
        "cluster/a",
        &["10.0.2.1", "10.0.2.2", "fd00:2::1"],
        &["10.96.0.0/16", "10.96.0.0/12"],
    );
    set("cluster/b", &["10.0.2.2", "10.0.2.3"], &["10.96.128.0/17"]);
    assert_eq!(elements(&world, "cluster4"), "10.0.2.1, 10.0.2.2, 10.0.2.3");
    assert_eq!(elements(&world, "cluster6"), "fd00:2::1");
    assert_eq!(elements(&world, "services4"), "10.96.0.0/12");
    set("cluster/a", &["10.0.2.1"], &[]);
    assert_eq!(elements(&world, "services4"), "10.96.128.0/17");
    world.wait(datapath.forget_members("cluster/a")).unwrap();
    assert_eq!(elements(&world, "cluster4"), "10.0.2.2, 10.0.2.3");
    // Many at once are few transactions.
    world.wait(async {
        let names: Vec<_> = (0..100).map(|n| format!("cluster/n{n}")).collect();
        let edits = names.iter().enumerate().map(|(n, name)| {
            let address = [10, 1, 0, u8::try_from(n).unwrap()].into();
            let datapath = datapath.clone();
            async move { datapath.set_members(name, &[address], &[]).await }
        });
        for outcome in futures_util::future::join_all(edits).await {
            outcome.unwrap();
        }
    });
    assert_eq!(elements(&world, "cluster4").matches("10.1.0.").count(), 100);
}

#[test]
fn tables_of_another_shape_are_made_anew_with_what_they_held() {
    let world = World::new("shape");
    world.node.nft(&[
        "table inet turnpike { set cluster4 { type ipv4_addr; flags interval; elements = \
         { 10.0.2.7 }; }; set selected4 { type ipv4_addr; elements = { 10.0.1.5 }; }; \
         chain forward { type filter hook forward priority 7; }; }",
    ]);
    let _datapath = world.open();
    assert_eq!(elements(&world, "cluster4"), "10.0.2.7");
    assert_eq!(elements(&world, "selected4"), "10.0.1.5");
    assert!(
        world
            .node
            .nft(&["list", "chain", "inet", "turnpike", "forward"])
            .contains("goto from4")
    );
}

#[test]
fn what_somebody_flushed_comes_back_with_the_next_change() {
    let world = World::new("flushed");
    let datapath = world.open();
    let mut pod = world.pod(6);
    pod.plan.policy.selected = true;
    let applied = pod.apply(&world, &datapath);
    let before = state(&world.node);
    world.node.nft(&["flush", "ruleset"]);
    world.wait(datapath.repair()).unwrap();
    assert_eq!(state(&world.node), before);
    world.node.nft(&["flush", "ruleset"]);
    let other = world.pod(7);
    let second = other.apply(&world, &datapath);
    for (pod, applied) in [(&pod, &applied), (&other, &second)] {
        assert_eq!(
            world.wait(datapath.check(&pod.plan, applied)).unwrap(),
            Vec::<String>::new()
        );
    }
}

#[test]
fn an_eni_comes_and_goes_while_pods_run() {
    let world = World::new("eni");
    let mut plan = world.plan();
    let eni = plan.secondary.pop().unwrap();
    let bare = state(&world.node);
    let datapath = world.wait(async { Datapath::open(&plan).await }).unwrap();
    let (one, two) = (world.pod(5), world.pod(6));
    one.apply(&world, &datapath);
    let error = world.wait(datapath.apply(&two.plan)).unwrap_err();
    assert!(matches!(error.cause, Error::Invalid { .. }), "{error}");

    let mut absent = eni.clone();
    absent.mac = Mac([2, 9, 9, 9, 9, 9]);
    let error = world.wait(datapath.attach_eni(&absent)).unwrap_err();
    assert!(matches!(error, Error::NoSuchEni { .. }), "{error}");
    for _ in 0..2 {
        world.wait(datapath.attach_eni(&eni)).unwrap();
    }
    let applied = two.apply(&world, &datapath);
    greet(&world.outside, (ANY, 80));
    assert_eq!(ask(&two.netns, (INTERNET, 80)).unwrap(), pod4(6));
    assert_eq!(ask(&one.netns, (INTERNET, 80)).unwrap(), pod4(5));

    world.wait(datapath.remove(&applied)).unwrap();
    world.wait(datapath.detach_eni(eni.mac)).unwrap();
    assert!(!state(&world.node).contains("1536:"));
    assert!(bare.contains("eth1"));
    assert_eq!(ask(&one.netns, (INTERNET, 80)).unwrap(), pod4(5));
}

#[test]
fn callers_of_a_node_port_are_answered_by_the_eni_they_came_by() {
    let world = World::new("nodeport");
    let datapath = world.open();
    let pod = world.pod(6);
    pod.apply(&world, &datapath);
    echo(&pod.netns, 8080);
    // As kube-proxy does it with externalTrafficPolicy Local.
    world.node.nft(&[
        "table ip proxy { chain pre { type nat hook prerouting priority dstnat; \
         ip daddr 10.0.1.10 tcp dport 30080 dnat to 10.0.1.6:8080; }; }",
    ]);
    let secondary = Sniffer::new(&world.outside, &["e1"]);
    for (number, at, by_secondary) in [
        (1, (NODE, 30080).into(), false),
        (2, (pod4(6), 8080).into(), true),
    ] {
        let (word, at): ([u8; 8], SocketAddr) = (token(number), at);
        let answer = world.outside.run(move || {
            let mut stream = TcpStream::connect_timeout(&at, PATIENCE)?;
            stream.write_all(&word)?;
            let mut answer = [0; 8];
            stream.read_exact(&mut answer).map(|()| answer)
        });
        assert_eq!(answer.unwrap(), word);
        assert_eq!(secondary.saw(word), by_secondary, "{at}");
    }
}

fn echo(namespace: &Namespace, port: u16) {
    let listener = namespace.run(move || TcpListener::bind((ANY, port)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            let _ = std::io::copy(&mut &stream, &mut &stream);
        }
    });
}
