//! A box comes, goes, and leaves nothing, however it ends. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    fs,
    net::IpAddr,
    path::Path,
    process::{Child, Command as StdCommand},
};

use common::{
    Vpc,
    dns::{addresses, ask, ask_by_tcp},
    eventually, spawn,
};
use hickory_proto::{op::ResponseCode, rr::RecordType};
use nix::sys::signal::Signal;
use turnpike_vpc::{
    claim,
    netns::{Command, Namespace},
    resolver::{Names, write_zone},
    spec::DEFAULT,
};

fn leftovers(name: &str) -> Vec<String> {
    let named = fs::read_dir("/run/netns").into_iter().flatten();
    let mut left: Vec<String> = named
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|entry| entry.starts_with(&format!("{name}-")))
        .collect();
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    left.extend(
        mounts
            .lines()
            .filter(|line| line.contains(&format!("/{name}-")))
            .map(Into::into),
    );
    let claims = fs::read_dir("/run/turnpike-vpc").into_iter().flatten();
    let claims = claims.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    left.extend(claims.filter(|file| file.starts_with(&format!("{name}."))));
    left
}

fn down(name: &str) -> std::process::Output {
    let mut command = StdCommand::new(env!("CARGO_BIN_EXE_turnpike-vpc"));
    command.args(["down", "--name", name]).output().unwrap()
}

/// A process of a pod's that ignores SIGTERM.
fn stubborn(namespace: &Namespace) -> Child {
    let script = "trap '' TERM; echo up; while :; do sleep 1; done";
    let command = Command::new("/bin/sh").args(["-c", script]).new_session();
    command
        .stdout(turnpike_vpc::netns::Output::Null)
        .spawn(namespace)
        .unwrap()
}

#[test]
fn sigterm_removes_everything() {
    let mut vpc = Vpc::start("term");
    assert!(!leftovers(&vpc.name).is_empty());
    vpc.signal(Signal::SIGTERM);
    assert!(vpc.wait().success());
    assert_eq!(leftovers(&vpc.name), [""; 0]);
    assert!(!vpc.state.path().join("ready").exists());
}

#[test]
fn down_removes_what_a_killed_box_left() {
    let mut vpc = Vpc::start("kill");
    let pod = vpc.pod("node-a", "pod", &[]);
    let mut inside = stubborn(&pod);
    let mut beside = stubborn(&vpc.namespace("node-b"));
    vpc.signal(Signal::SIGKILL);
    vpc.wait();
    assert!(leftovers(&vpc.name).len() > 5);
    let output = down(&vpc.name);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(leftovers(&vpc.name), [""; 0]);
    assert!(!inside.wait().unwrap().success());
    assert!(!beside.wait().unwrap().success());
    // Once more is no error, and says so.
    let again = down(&vpc.name);
    assert!(again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("no box"));
}

#[test]
fn down_ends_a_running_box() {
    let mut vpc = Vpc::start("end");
    assert!(down(&vpc.name).status.success());
    assert!(vpc.wait().success());
    assert_eq!(leftovers(&vpc.name), [""; 0]);
}

#[test]
fn a_start_cleans_up_after_a_killed_box_and_refuses_beside_a_living_one() {
    let mut old = Vpc::start("again");
    let spec = old.state.path().join("spec.yaml");
    let state = tempfile::tempdir().unwrap();
    let mut second = spawn(&old.name, &spec, state.path());
    assert!(!second.wait().unwrap().success());
    let said = fs::read_to_string(state.path().join("stderr")).unwrap();
    assert!(
        said.contains("turnpike-vpc down --name tpt-again"),
        "{said}"
    );
    assert!(
        old.namespace("node-a").exists(),
        "the refused start took the box along"
    );

    old.signal(Signal::SIGKILL);
    old.wait();
    let mut third = spawn(&old.name, &spec, state.path());
    eventually("the second box", || {
        state.path().join("ready").exists().then_some(())
    });
    assert!(down(&old.name).status.success());
    assert!(third.wait().unwrap().success());
    assert_eq!(leftovers(&old.name), [""; 0]);
}

#[test]
fn a_bad_spec_or_name_makes_nothing() {
    let state = tempfile::tempdir().unwrap();
    let run = |name: &str, text: &str| {
        let file = state.path().join("spec");
        fs::write(&file, text).unwrap();
        let mut child = spawn(name, &file, state.path());
        assert!(!child.wait().unwrap().success());
        fs::read_to_string(state.path().join("stderr")).unwrap()
    };
    let said = run("tpt-badspec", &DEFAULT.replace("m5.large", "m5.gigantic"));
    assert!(
        said.contains("instances[0].type") && said.contains("m5.xlarge"),
        "{said}"
    );
    assert!(run("tpt-badspec", "cidr: [").contains("spec"));
    assert!(run("../tpt-badname", DEFAULT).contains("name"));
    assert_eq!(leftovers("tpt-badspec"), [""; 0]);
}

#[test]
fn a_claim_is_extended_only_where_there_is_one() {
    let pod = Namespace::handle("tpt-nobody-pod").unwrap();
    assert!(matches!(
        claim::add("tpt-nobody", &pod),
        Err(claim::Error::Unknown(_))
    ));
    assert!(!claim::release("tpt-nobody").unwrap());
    assert!(matches!(
        claim::release("../etc"),
        Err(claim::Error::Name(_))
    ));
}

#[test]
fn the_resolver_knows_the_internet_and_what_the_zone_file_adds() {
    let vpc = Vpc::start("names");
    let (node, server) = (vpc.namespace("node-b"), vpc.ready.resolver);
    let code = |name: &str| {
        ask(&node, server, name, RecordType::A)
            .metadata
            .response_code
    };
    let v4 = |name: &str| addresses(&ask(&node, server, name, RecordType::A));
    assert_eq!(
        v4("API.Payments.example."),
        [IpAddr::from([203, 0, 113, 10])]
    );
    assert_eq!(
        v4("rebind.attacker.example."),
        [IpAddr::from([10, 0, 0, 10])]
    );
    let v6 = ask(&node, server, "partner.example.", RecordType::AAAA);
    assert_eq!(
        addresses(&v6),
        ["2001:db8:113::20".parse::<IpAddr>().unwrap()]
    );
    assert!(addresses(&ask(&node, server, "svcb.example.", RecordType::AAAA)).is_empty());
    assert_eq!(
        ask(&node, server, "svcb.example.", RecordType::HTTPS)
            .answers
            .len(),
        1
    );
    assert_eq!(
        v4("ip-10-0-0-10.eu-west-1.compute.internal."),
        [IpAddr::from([10, 0, 0, 10])]
    );
    assert_eq!(code("nowhere.example."), ResponseCode::NXDomain);
    assert_eq!(code("10.0.0.10.in-addr.arpa."), ResponseCode::NXDomain);

    let name = "web.shop.svc.cluster.local";
    assert_eq!(code(&format!("{name}.")), ResponseCode::NXDomain);
    let zone = |count: u8| {
        let all = (1..=count).map(|n| IpAddr::from([10, 0, 9, n])).collect();
        write_zone(&vpc.ready.zone_file, &Names::from([(name.into(), all)])).unwrap();
    };
    zone(1);
    assert_eq!(v4(&format!("{name}.")), [IpAddr::from([10, 0, 9, 1])]);
    // Too much for UDP without EDNS: cut, and whole over TCP.
    zone(60);
    let cut = ask(&node, server, &format!("{name}."), RecordType::A);
    assert!(cut.metadata.truncation);
    let whole = ask_by_tcp(&node, server, &format!("{name}."), RecordType::A);
    assert_eq!(addresses(&whole).len(), 60);
    // A file that cannot be read changes nothing.
    fs::write(&vpc.ready.zone_file, "{").unwrap();
    assert_eq!(
        addresses(&ask_by_tcp(
            &node,
            server,
            &format!("{name}."),
            RecordType::A
        ))
        .len(),
        60
    );
    assert!(Path::new(&vpc.ready.root).exists());
}
