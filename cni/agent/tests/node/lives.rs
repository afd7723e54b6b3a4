//! Pods outlive the agent, sandboxes are replaced, and a kill leaves nothing half.

use std::{fs, thread, time::Duration};

use nix::sys::signal::Signal;
use serde_json::json;

use super::{
    CALM,
    rig::{Rig, residue, wait_for},
    system_pod,
    talk::talk,
};

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
    // Nor does one that cannot be taken away: the next start would do its DEL.
    fs::create_dir(&tombstone).unwrap();
    let said = rig.add(&b);
    assert!(
        !said.ok && said.json["msg"].to_string().contains("earlier DEL"),
        "{}",
        said.json
    );
    fs::remove_dir(&tombstone).unwrap();
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
