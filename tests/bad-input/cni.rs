//! Calls of the CNI executable that no runtime should make.

use std::io::Write as _;

use serde_json::Value;
use turnpike_rig::{World, world::program};
use turnpike_vpc::netns::{Command, Output};

use super::world;

#[test]
fn malformed_cni_calls_are_answered_in_json_and_change_nothing() {
    let world = world("bad-cni");
    let before = network_state(&world);
    let good = format!(
        r#"{{"cniVersion":"1.1.0","name":"turnpike","type":"turnpike-cni","agentSocket":"{}"}}"#,
        world
            .node("node-a")
            .unwrap()
            .folder
            .join("cni.sock")
            .display()
    );
    let arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=legacy;K8S_POD_NAME=x";
    let cases: [(&str, &str, &str, &str); 7] = [
        ("ADD", "not json", "/run/netns/nowhere", arguments),
        ("ADD", "", "/run/netns/nowhere", arguments),
        (
            "ADD",
            r#"{"cniVersion":"9.9.9","name":"t","type":"t"}"#,
            "/run/netns/nowhere",
            arguments,
        ),
        ("FLY", &good, "/run/netns/nowhere", arguments),
        ("ADD", &good, "/run/netns/nowhere", arguments),
        ("ADD", &good, "", arguments),
        ("ADD", &good, "/run/netns/nowhere", "K8S_POD_NAME"),
    ];
    for (command, input, netns, arguments) in cases {
        let (code, out) = call_cni(&world, command, input, netns, arguments);
        let answer: Value = serde_json::from_str(&out)
            .unwrap_or_else(|error| panic!("{command} {input:.40}: {error}: {out}"));
        assert_ne!(code, Some(0), "{command} {input:.40} {netns}");
        assert!(
            answer["code"].as_u64().is_some_and(|code| code > 0),
            "{answer}"
        );
        assert!(
            answer["msg"].as_str().is_some_and(|text| text.len() > 10),
            "{answer}"
        );
    }
    assert_eq!(network_state(&world), before);
}

fn call_cni(
    world: &World,
    command: &str,
    input: &str,
    netns: &str,
    arguments: &str,
) -> (Option<i32>, String) {
    let mut child = Command::new(program("turnpike-cni").unwrap())
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "bad-input")
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_ARGS", arguments)
        .stdin_piped()
        .stdout(Output::Piped)
        .stderr(Output::Null)
        .spawn(&world.node("node-a").unwrap().namespace)
        .unwrap();
    // It may refuse before it reads.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

/// Everything the CNI could have changed on a node.
fn network_state(world: &World) -> String {
    let node = &world.node("node-a").unwrap().namespace;
    let show = |line: &[&str]| {
        let output = Command::new(line[0]).args(&line[1..]).output(node).unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let routes = show(&["ip", "route", "show", "table", "all"]);
    let links = show(&["ip", "-o", "link"]).lines().count();
    format!("{}{}{links}", show(&["ip", "rule"]), routes)
}
