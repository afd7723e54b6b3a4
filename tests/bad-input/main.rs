//! What people and attackers send by mistake or on purpose: refused with a reason, without a side
//! effect, and without harm to the neighbours.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use serde_json::Value;
use turnpike_rig::{Options, World, cluster, http, wait_for};
use turnpike_vpc::netns::{Command, Output};

const SOON: Duration = Duration::from_secs(10);
const WEB: &str = "http://10.96.0.20/";

fn world(name: &str) -> World {
    let mut world = World::up(Options::test(name), &|_| ()).unwrap();
    world.furnish().unwrap();
    world
        .start_pod(&cluster::nginx("web-1", "web", "node-a", 0), true)
        .unwrap();
    world
        .start_pod(&cluster::client("shop", "client", "client", "node-b"), true)
        .unwrap();
    world
        .start_pod(
            &cluster::client("legacy", "caller", "caller", "node-b"),
            false,
        )
        .unwrap();
    assert!(wait_for(SOON, || served(&world).then_some(())).is_some());
    world
}

fn served(world: &World) -> bool {
    let line = [
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "--max-time",
        "3",
        WEB,
    ];
    world
        .exec("shop", "client", &line)
        .is_ok_and(|said| said.out == "200")
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
    let mut child = Command::new(turnpike_rig::world::program("turnpike-cni").unwrap())
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

#[test]
fn a_bad_object_is_reported_with_its_place_and_changes_nothing() {
    let world = world("bad-yaml");
    let policy = |spec: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: t, namespace: shop}}\nspec:\n{spec}"
        )
    };
    let cases = [
        ("syntax", "kind: [unclosed".to_owned(), "line"),
        ("kind", "apiVersion: turnpike.dev/v1alpha1\nkind: TraficPolicy\nmetadata: {name: t}\n".into(), "TrafficPolicy"),
        ("field", policy("  targetRefs: [{kind: Service, name: web}]\n  timeuots: {request: 1s}\n"), "timeouts"),
        ("value", policy("  targetRefs: [{kind: Service, name: web}]\n  timeouts: {request: soon}\n"), "request"),
        (
            "egress",
            "apiVersion: turnpike.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: e, namespace: shop}\nspec:\n  selector: {}\n  allow:\n  - hosts: [\"*\"]\n    ports: [{port: 443, protocol: TLS}]\n".into(),
            "hosts",
        ),
    ];
    for (name, yaml, told) in cases {
        let file = format!("bad-{name}");
        world.directory.write(&file, &yaml).unwrap();
        let reported = wait_for(SOON, || {
            let rejections = world.ask_controller("/debug/rejections").ok()?.body;
            let all: Value = serde_json::from_str(&rejections).ok()?;
            let list = all.get("rejections").unwrap_or(&all).as_array()?.clone();
            list.into_iter()
                .find(|rejection| rejection.to_string().contains(&file))
        });
        let reported = reported.unwrap_or_else(|| panic!("{name} was not reported"));
        assert!(
            reported["line"].as_u64().is_some_and(|line| line > 0),
            "{name}: {reported}"
        );
        assert!(
            reported.to_string().contains(told),
            "{name} should mention {told}: {reported}"
        );
        assert!(served(&world), "{name} changed something");
        world.directory.remove(&file).unwrap();
    }
    conflict(&world, &policy);
    let clear = wait_for(SOON, || {
        let body = world.ask_controller("/debug/rejections").ok()?.body;
        (!body.contains("bad-")).then_some(())
    });
    assert!(clear.is_some(), "a file that is gone is reported no more");
}

/// Each of two policies for one Service is good by itself: the second is told where it stands.
fn conflict(world: &World, policy: &dyn Fn(&str) -> String) {
    let first = policy("  targetRefs: [{kind: Service, name: web}]\n  timeouts: {request: 9s}\n");
    let second = policy("  timeouts: {request: 1s}\n  targetRefs: [{kind: Service, name: web}]\n")
        .replace("name: t,", "name: u,");
    world.directory.write("a-first", &first).unwrap();
    world.directory.write("b-second", &second).unwrap();
    let told = wait_for(SOON, || {
        let status = world.ask_controller("/debug/status").ok()?.body;
        let status: Value = serde_json::from_str(&status).ok()?;
        let policies = status["policies"].as_array()?;
        let second = |policy: &&Value| policy["object"] == "TrafficPolicy shop/u";
        let conflicted = policies.iter().find(second)?.clone();
        conflicted
            .to_string()
            .contains("Conflicted")
            .then_some(conflicted)
    });
    let told = told.expect("the conflict was not reported");
    let place = serde_json::json!({"file": "b-second.yaml", "line": 6, "field": "spec.targetRefs"});
    assert_eq!(told["place"], place, "{told}");
    for name in ["`shop/t`", "Service `shop/web`"] {
        assert!(told.to_string().contains(name), "{told}");
    }
    world.directory.remove("a-first").unwrap();
    world.directory.remove("b-second").unwrap();
}

#[test]
fn garbage_on_the_wire_is_closed_and_neighbours_are_served() {
    let world = world("bad-wire");
    let web = world.pod("shop", "web-1").unwrap();
    let target = SocketAddr::new(web.address, 8080);
    let caller = &world.pod("legacy", "caller").unwrap().namespace;
    let huge = format!(
        "GET / HTTP/1.1\r\nHost: w\r\nX-Big: {}\r\n\r\n",
        "a".repeat(512 * 1024)
    );
    let both = "POST / HTTP/1.1\r\nHost: w\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    let cases: [(&str, Vec<u8>); 7] = [
        ("smuggling", both.into()),
        ("huge header", huge.into()),
        (
            "two Hosts",
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n".to_vec(),
        ),
        (
            "space before colon",
            b"GET / HTTP/1.1\r\nHost : a\r\nConnection: close\r\n\r\n".to_vec(),
        ),
        (
            "CONNECT without authority",
            b"CONNECT / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".to_vec(),
        ),
        (
            "TLS garbage",
            [&[0x16, 3, 1, 0xff, 0xff][..], &[0xff; 300]].concat(),
        ),
        ("zeros", vec![0; 4096]),
    ];
    for (name, bytes) in cases {
        // Refused by a 4xx answer or by closing; never passed on, never answered 200.
        if let Ok(response) = http::exchange(caller, target, &bytes) {
            assert!(
                (400..500).contains(&response.status),
                "{name}: {}",
                response.status
            );
        }
        assert!(served(&world), "after {name}");
    }
    assert!(
        slow_loris(&world, target.ip()),
        "the neighbours were not served beside slow peers"
    );
    let mut sidecar = world
        .pods
        .get(&("shop".into(), "web-1".into()))
        .unwrap()
        .sidecar
        .as_ref();
    assert!(sidecar.take().is_some_and(|daemon| daemon.pid().is_some()));
}

/// Forty callers that never finish their request, while others are served.
fn slow_loris(world: &World, address: IpAddr) -> bool {
    let caller = &world.pod("legacy", "caller").unwrap().namespace;
    let held = caller
        .run(|| {
            (0..40)
                .filter_map(|_| {
                    let mut stream = std::net::TcpStream::connect((address, 8080)).ok()?;
                    stream
                        .write_all(b"GET / HTTP/1.1\r\nHost: w\r\nX-Slow: ")
                        .ok()?;
                    Some(stream)
                })
                .collect::<Vec<_>>()
        })
        .unwrap();
    let served = (0..5).all(|_| served(world));
    held.len() == 40 && served
}
