//! The agent as a runtime meets it: through the CNI executable, killed and restarted, in a box.
//!
//! Needs root, and `turnpike-cni` built beside `turnpike-node`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use rig::{Pod, Rig, residue, talk, wait_for};
use serde_json::json;
use turnpike_rules::{Identity, pod::PodNetwork};
use turnpike_vpc::netns::Namespace;
use turnpike_wire::node::feed_event::Event;

const CALM: &str = "";
/// Failures often enough that also an attachment is answered with an error that says nothing.
const ROUGH: &str = r"
faults:
  seed: 11
  latency: {minMs: 0, maxMs: 30}
  transition: {minMs: 50, maxMs: 600}
  describeLag: {minMs: 0, maxMs: 400}
  failures: 0.3
";

/// A pod of a namespace that needs no word from the control plane.
fn system_pod(rig: &Rig, id: &str, name: &str) -> Pod {
    rig.pod(id, "kube-system", name)
}

#[test]
fn a_pod_outlives_the_agent_and_the_agent_knows_it_again() {
    let mut rig = Rig::up(
        "ag1",
        CALM,
        &[("WARM_IP_TARGET", "4"), ("IP_COOLDOWN_PERIOD", "1")],
    );
    let empty = rig.kernel();
    let (a, b) = (
        system_pod(&rig, "a", "dns-a"),
        system_pod(&rig, "b", "dns-b"),
    );
    let said = rig.add(&a);
    let (at_a, at_b) = (said.address(), rig.add(&b).address());
    assert_eq!(talk(&a.netns, &b.netns, at_b).unwrap(), at_a);
    assert_eq!(
        talk(&b.netns, &rig.control, "10.0.0.10".parse().unwrap()).unwrap(),
        at_b
    );

    rig.end(Signal::SIGKILL);
    assert_eq!(
        talk(&a.netns, &b.netns, at_b).unwrap(),
        at_a,
        "the agent is not in the way"
    );
    rig.start();
    assert_eq!(rig.leases()["a"], at_a);
    assert_eq!(rig.leases()["b"], at_b);
    assert_eq!(talk(&b.netns, &a.netns, at_a).unwrap(), at_b);
    let checked = rig.cni("CHECK", &a, &json!({"prevResult": said.json}));
    assert!(checked.ok, "{}", checked.json);
    let mut another = said.json.clone();
    another["ips"][0]["address"] = json!(format!("{at_b}/32"));
    let checked = rig.cni("CHECK", &a, &json!({"prevResult": another}));
    assert!(
        !checked.ok && checked.json["code"] == 101,
        "{}",
        checked.json
    );
    let again = rig.add(&a);
    assert_eq!(again.json, said.json, "the same ADD, the same answer");

    assert!(
        rig.end(Signal::SIGTERM).success(),
        "a clean end is no failure"
    );
    assert_eq!(
        talk(&a.netns, &b.netns, at_b).unwrap(),
        at_a,
        "the datapath stays"
    );
    assert!(
        rig.del(&b).ok,
        "DEL succeeds while nobody is there to do it"
    );
    let tombstone = rig.path("removed/b@eth0.json");
    let words = fs::read(&tombstone).unwrap();
    rig.start();
    assert_eq!(rig.leases().len(), 1, "the DEL was done at the start");
    assert!(!tombstone.exists());
    assert!(talk(&a.netns, &b.netns, at_b).is_err());

    // One that comes to light late does not end the attachment's next life.
    fs::write(&tombstone, words).unwrap();
    let at_b = rig.add(&b).address();
    assert!(!tombstone.exists(), "done before the ADD, not after it");
    assert_eq!(talk(&a.netns, &b.netns, at_b).unwrap(), at_a);

    for pod in [&a, &a, &b] {
        assert!(rig.del(pod).ok, "DEL twice is fine");
    }
    assert!(rig.leases().is_empty());
    assert_eq!(
        residue(&empty, &rig.kernel()),
        "",
        "nothing of the pods is left"
    );
}

#[test]
fn a_new_sandbox_replaces_the_old_one_and_a_late_del_does_not_hurt_it() {
    let rig = Rig::up("ag2", CALM, &[("WARM_IP_TARGET", "4")]);
    let other = system_pod(&rig, "o", "other");
    let at_other = rig.add(&other).address();
    let (old, new) = (
        system_pod(&rig, "old", "set-0"),
        system_pod(&rig, "new", "set-0"),
    );
    let at_old = rig.add(&old).address();
    let at_new = rig.add(&new).address();
    assert_ne!(at_old, at_new, "the old address cools");
    assert!(rig.del(&old).ok);
    assert_eq!(talk(&new.netns, &other.netns, at_other).unwrap(), at_new);
    assert_eq!(rig.leases()["new"], at_new);

    let valid = json!({"cni.dev/valid-attachments": [{"containerID": "new", "ifname": "eth0"}]});
    assert!(rig.cni("GC", &new, &valid).ok);
    assert_eq!(rig.leases().into_keys().collect::<Vec<_>>(), ["new"]);
    assert!(rig.cni("STATUS", &new, &json!({})).ok);
}

#[test]
fn without_policy_a_pod_does_not_start_and_a_del_calls_the_add_off() {
    let rig = Rig::up(
        "ag3",
        CALM,
        &[("WARM_IP_TARGET", "3"), ("TURNPIKE_POLICY_WAIT", "2")],
    );
    let empty = rig.kernel();
    let pod = rig.pod("p", "shop", "cart");
    let refused = rig.add(&pod);
    assert_eq!(refused.json["code"], 11, "{}", refused.json);
    let text = refused.json["msg"].as_str().unwrap();
    assert!(
        text.contains("shop/cart") && text.contains("no connection"),
        "{text}"
    );

    thread::scope(|scope| {
        let add = scope.spawn(|| rig.add(&pod));
        thread::sleep(Duration::from_millis(500));
        assert!(rig.del(&pod).ok);
        let called_off = add.join().unwrap();
        assert_eq!(called_off.json["code"], 11, "{}", called_off.json);
        assert!(
            called_off.json["msg"]
                .as_str()
                .unwrap()
                .contains("called off")
        );
    });
    assert!(rig.leases().is_empty());
    assert_eq!(residue(&empty, &rig.kernel()), "");

    let gone = system_pod(&rig, "g", "gone");
    gone.netns.remove(Duration::from_secs(1)).unwrap();
    assert!(!rig.add(&gone).ok, "its namespace is not there");
    assert!(rig.leases().is_empty(), "rolled back");
    assert_eq!(residue(&empty, &rig.kernel()), "");
}

fn network(selected: bool) -> PodNetwork {
    PodNetwork {
        uid: "uid-cart".into(),
        namespace: "shop".into(),
        name: "cart".into(),
        identity: Identity::new("cluster.local", "shop", "cart-account").unwrap(),
        capture: None,
        selected,
        inbound: Vec::new(),
    }
}

#[test]
fn a_selected_pod_is_denied_and_the_gate_is_told() {
    let mut rig = Rig::up("ag7", CALM, &[("WARM_IP_TARGET", "3")]);
    rig.end(Signal::SIGTERM);
    rig.policy(&[network(true)]);
    rig.start();
    let mut feed = rig.feed();
    assert!(matches!(feed.next(), Event::Synced(_)));

    let pod = rig.pod("c", "shop", "cart");
    let address = rig.add(&pod).address();
    let Event::Added(told) = feed.next() else {
        panic!("no pod")
    };
    assert_eq!(
        (&*told.uid, &*told.namespace, &*told.name),
        ("uid-cart", "shop", "cart")
    );
    assert_eq!(
        (&*told.service_account, told.selected),
        ("cart-account", true)
    );
    assert_eq!(told.addresses, [address.octets().to_vec()]);

    let control = "10.0.0.10".parse().unwrap();
    assert!(
        talk(&pod.netns, &rig.control, control).is_err(),
        "nothing leaves a selected pod"
    );
    let denied = loop {
        if let Event::Denied(denied) = feed.next() {
            break denied;
        }
    };
    assert_eq!(denied.source, address.octets());
    assert_eq!(denied.destination, [10, 0, 0, 10]);
    assert_eq!(denied.protocol, 6);
    assert_eq!(denied.interface, told_interface(&rig));
    assert_eq!(denied.container_id, "c");

    rig.end(Signal::SIGKILL);
    assert!(
        talk(&pod.netns, &rig.control, control).is_err(),
        "denied while the agent is away"
    );
    rig.start();
    let mut feed = rig.feed();
    assert!(rig.del(&pod).ok);
    let told = loop {
        if let Event::Removed(told) = feed.next() {
            break told;
        }
    };
    assert_eq!(told.container_id, "c");
}

#[test]
fn a_change_reaches_the_running_pod_and_no_restart_without_a_record_of_it_frees_the_pod() {
    let mut rig = Rig::up("ag10", CALM, &[("WARM_IP_TARGET", "3")]);
    rig.end(Signal::SIGTERM);
    rig.policy(&[network(false)]);
    rig.start();
    let pod = rig.pod("c", "shop", "cart");
    rig.add(&pod);
    let control = "10.0.0.10".parse().unwrap();
    assert!(reaches(&pod.netns, &rig.control, control));
    rig.end(Signal::SIGKILL);
    let (state, kept) = (rig.path("state"), rig.path("kept"));
    copy(&state, &kept);

    rig.policy(&[network(true)]);
    rig.start();
    wait_for("the policy's change", || {
        talk(&pod.netns, &rig.control, control).is_err()
    });
    let mut feed = rig.feed();
    // The kernel is changed first, then the gate is told.
    loop {
        match feed.next() {
            Event::Added(told) if told.selected => break,
            Event::Removed(told) => panic!("{told:?}"),
            _ => {}
        }
    }
    rig.end(Signal::SIGKILL);
    // As where the disk had refused the change.
    fs::remove_dir_all(&state).unwrap();
    copy(&kept, &state);
    rig.start();
    let Event::Added(told) = rig.feed().next() else {
        panic!("no pod")
    };
    assert!(told.selected);
    assert!(
        talk(&pod.netns, &rig.control, control).is_err(),
        "a restart freed the pod"
    );
    assert!(
        !reaches(&pod.netns, &rig.control, control),
        "a datagram left the pod"
    );
    rig.end(Signal::SIGKILL);
    rig.policy(&[network(false)]);
    rig.start();
    assert!(
        !reaches(&pod.netns, &rig.control, control),
        "what only the disk says freed the pod"
    );
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// Whether a datagram comes from one to the other.
fn reaches(from: &Namespace, to: &Namespace, address: Ipv4Addr) -> bool {
    let server = to.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)));
    let server = server.unwrap().unwrap();
    let to = SocketAddr::from((address, server.local_addr().unwrap().port()));
    let sent = from.run(move || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?.send_to(b"?", to));
    sent.unwrap().unwrap();
    server
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    server.recv(&mut [0; 1]).is_ok()
}

fn told_interface(rig: &Rig) -> String {
    rig.pods_json()[0]["hostInterface"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn a_burst_on_a_small_pool_waits_for_addresses_and_gets_them_on_a_second_interface() {
    let rig = Rig::up(
        "ag4",
        ROUGH,
        &[("WARM_IP_TARGET", "2"), ("TURNPIKE_ADDRESS_WAIT", "40")],
    );
    let pods: Vec<_> = (0..14)
        .map(|n| system_pod(&rig, &format!("p{n}"), &format!("burst-{n}")))
        .collect();
    let addresses: Vec<_> = thread::scope(|scope| {
        let adds: Vec<_> = pods
            .iter()
            .map(|pod| scope.spawn(|| rig.add(pod)))
            .collect();
        adds.into_iter()
            .map(|add| add.join().unwrap().address())
            .collect()
    });
    let unique: BTreeSet<_> = addresses.iter().collect();
    assert_eq!(unique.len(), pods.len(), "one address, two pods");
    let enis = rig.enis();
    assert!(enis["enis"].as_array().unwrap().len() >= 2, "{enis}");
    let control = "10.0.0.10".parse().unwrap();
    for (pod, address) in pods.iter().zip(&addresses) {
        assert_eq!(talk(&pod.netns, &rig.control, control).unwrap(), *address);
        assert_eq!(talk(&rig.control, &pod.netns, *address).unwrap(), control);
    }
}

#[test]
fn killed_at_any_moment_of_adds_and_dels_it_converges_with_nothing_left() {
    let mut rig = Rig::up(
        "ag5",
        CALM,
        &[
            ("WARM_IP_TARGET", "6"),
            ("IP_COOLDOWN_PERIOD", "0"),
            ("MAX_ENI", "1"),
        ],
    );
    let empty = rig.kernel();
    for round in 0..8u64 {
        let pods: Vec<_> = (0..4)
            .map(|n| system_pod(&rig, &format!("r{round}n{n}"), &format!("pod-{n}")))
            .collect();
        let mut killed = false;
        let mut answers = Vec::new();
        thread::scope(|scope| {
            let adds: Vec<_> = pods
                .iter()
                .map(|pod| scope.spawn(|| rig.add(pod)))
                .collect();
            thread::sleep(Duration::from_millis(10 + round * 6));
            if let Some(agent) = &rig.agent {
                let pid = nix::unistd::Pid::from_raw(agent.id() as i32);
                killed = nix::sys::signal::kill(pid, Signal::SIGKILL).is_ok();
            }
            answers.extend(adds.into_iter().map(|add| add.join().unwrap()));
        });
        assert!(killed);
        rig.agent.take().unwrap().wait().unwrap();
        rig.start();
        let leases = rig.leases();
        for (pod, said) in pods.iter().zip(&answers).filter(|(_, said)| said.ok) {
            assert_eq!(
                leases[&pod.id],
                said.address(),
                "an acknowledged ADD was lost"
            );
        }
        let addresses: Vec<_> = pods.iter().map(|pod| rig.add(pod).address()).collect();
        assert_eq!(
            talk(&pods[0].netns, &pods[3].netns, addresses[3]).unwrap(),
            addresses[0]
        );
        for pod in &pods {
            assert!(rig.del(pod).ok);
        }
        assert!(rig.leases().is_empty(), "round {round}");
        assert_eq!(residue(&empty, &rig.kernel()), "", "round {round}");
    }
}

#[test]
fn a_restart_without_ec2_and_metadata_serves_from_what_it_knows() {
    let mut rig = Rig::up("ag6", CALM, &[("WARM_IP_TARGET", "5")]);
    let first = system_pod(&rig, "f", "first");
    let at_first = rig.add(&first).address();
    wait_for("a warm pool", || rig.enis()["counts"]["allocatable"] == 5);
    rig.end(Signal::SIGKILL);
    // Neither answers any more.
    let block = "add table inet outage; \
        add chain inet outage out { type filter hook output priority 0; }; \
        add rule inet outage out ip daddr { 169.254.169.254, 10.0.0.2 } reject";
    let blocked = turnpike_vpc::netns::Command::new("nft")
        .arg(block)
        .output(&rig.node)
        .unwrap();
    assert!(blocked.status.success(), "{blocked:?}");
    rig.launch();
    wait_for("the agent", || {
        rig.get(61678, "/metrics").starts_with("HTTP/1.1 200")
    });
    assert_eq!(rig.leases()["f"], at_first);
    let second = system_pod(&rig, "s", "second");
    let at_second = rig.add(&second).address();
    assert_eq!(
        talk(&second.netns, &first.netns, at_first).unwrap(),
        at_second
    );
    assert!(rig.del(&first).ok);
}

#[test]
fn the_runtime_finds_executable_and_configuration_once_adds_can_be_served() {
    let host = tempfile::tempdir().unwrap();
    let [bin, conf] = ["bin", "net.d"].map(|name| host.path().join(name));
    for folder in [&bin, &conf] {
        fs::create_dir(folder).unwrap();
    }
    let mut rig = Rig::up(
        "ag8",
        CALM,
        &[
            ("TURNPIKE_CNI_BIN_DIR", bin.to_str().unwrap()),
            ("TURNPIKE_CNI_CONF_DIR", conf.to_str().unwrap()),
        ],
    );
    // `up` waited for readiness.
    let plugin = bin.join("turnpike-cni");
    let ours = Path::new(env!("CARGO_BIN_EXE_turnpike-node")).with_file_name("turnpike-cni");
    assert!(fs::read(&plugin).unwrap() == fs::read(ours).unwrap());
    assert_eq!(fs::metadata(&plugin).unwrap().mode() & 0o777, 0o755);
    let conflist = conf.join("10-turnpike.conflist");
    let text = fs::read_to_string(&conflist).unwrap();
    assert!(
        text.contains(rig.path("cni.sock").to_str().unwrap()),
        "{text}"
    );

    fs::remove_file(&conflist).unwrap();
    wait_for("the configuration comes back", || conflist.exists());
    let rival = conf.join("10-aws.conflist");
    fs::write(&rival, "{}").unwrap();
    wait_for("the agent says who is in its way", || {
        let answer = rig.get(61678, "/healthz/ready");
        answer.starts_with("HTTP/1.1 503") && answer.contains("10-aws.conflist comes before")
    });
    fs::remove_file(&rival).unwrap();
    wait_for("the agent is ready again", || {
        rig.get(61678, "/healthz/ready").starts_with("HTTP/1.1 200")
    });
    assert!(rig.get(61678, "/healthz/live").starts_with("HTTP/1.1 200"));

    assert!(rig.end(Signal::SIGTERM).success());
    assert!(
        plugin.exists() && conflist.exists(),
        "pods keep their network"
    );
}

#[test]
fn each_capability_that_its_container_has_is_needed() {
    let mut rig = Rig::up("ag9", CALM, &[("WARM_IP_TARGET", "4")]);
    rig.end(Signal::SIGTERM);
    for missing in rig::capabilities() {
        rig.capabilities = rig::capabilities();
        rig.capabilities.retain(|name| *name != missing);
        rig.launch();
        let mut ended = false;
        wait_for("the agent ends, or is ready", || {
            ended = rig.has_ended();
            ended || rig.get(61678, "/healthz/ready").starts_with("HTTP/1.1 200")
        });
        if !ended {
            let pod = system_pod(&rig, "a", "dns-a");
            let said = rig.add(&pod);
            assert!(!said.ok, "a pod was started without {missing}");
            assert!(
                said.json.to_string().contains("not permitted"),
                "{}",
                said.json
            );
            rig.del(&pod);
            rig.end(Signal::SIGTERM);
        }
    }
    rig.capabilities = rig::capabilities();
    rig.start();
}
