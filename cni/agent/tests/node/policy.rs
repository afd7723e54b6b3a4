//! What the control plane says of a pod, from before its first packet to a change of it.

use std::{fs, path::Path, thread, time::Duration};

use nix::sys::signal::Signal;
use turnpike_wire::node::feed_event::Event;

use super::{
    CALM, network,
    rig::{Rig, residue, wait_for},
    system_pod,
    talk::{reaches, talk},
};

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
fn what_the_gate_was_not_told_of_before_a_restart_it_is_told_the_number_of() {
    let mut rig = Rig::up("ag13", CALM, &[("WARM_IP_TARGET", "3")]);
    rig.end(Signal::SIGTERM);
    rig.policy(&[network(true)]);
    rig.start();
    let count = || fs::metadata(rig.path("state/refused")).and_then(|it| it.modified());
    wait_for("the count of refused packets", || count().is_ok());
    let before = count().unwrap();
    let pod = rig.pod("c", "shop", "cart");
    rig.add(&pod).address();
    let control = "10.0.0.10".parse().unwrap();
    assert!(!reaches(&pod.netns, &rig.control, control));
    // One packet, which nobody hears of, and which the count has seen.
    wait_for("the count to be kept", || count().unwrap() > before);
    rig.end(Signal::SIGKILL);
    rig.start();
    let mut feed = rig.feed();
    let told = loop {
        if let Event::Lapse(lapse) = feed.next() {
            break lapse;
        }
    };
    assert!(told.packets >= 1, "{told:?}");
    assert!(told.reason.contains("told to nobody"), "{told:?}");
    // The gate has been told: no later start tells it again.
    wait_for("the count with what the gate has heard", || {
        let text = fs::read_to_string(rig.path("state/refused")).unwrap();
        text.parse::<u64>().unwrap() >= told.packets
    });
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

fn told_interface(rig: &Rig) -> String {
    rig.pods_json()[0]["hostInterface"]
        .as_str()
        .unwrap()
        .to_owned()
}
