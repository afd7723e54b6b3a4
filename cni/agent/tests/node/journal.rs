//! The record is lost, damaged or another version's, and the pods run.

use std::fs;

use nix::sys::signal::Signal;
use turnpike_ipam::Record;
use turnpike_wire::node::feed_event::Event;

use super::{
    CALM, network,
    rig::{Pod, Rig, residue, wait_for},
    system_pod,
    talk::talk,
};

#[test]
fn a_pod_outlives_the_loss_of_the_journal_and_becomes_one_like_the_others() {
    let mut rig = Rig::up("ag11", CALM, &[("WARM_IP_TARGET", "3")]);
    let empty = rig.kernel();
    rig.end(Signal::SIGTERM);
    rig.policy(&[network(true)]);
    rig.start();
    let named = rig.pod("c", "shop", "cart");
    // Nobody names this one: it needs no policy, and is left as it is.
    let unnamed = system_pod(&rig, "d", "dns");
    rig.add(&named).address();
    rig.add(&unnamed).address();

    rig.end(Signal::SIGTERM);
    let before = fs::read(rig.path("state/pool.journal")).unwrap();
    fs::remove_file(rig.path("state/pool.journal")).unwrap();
    for start in ["without its journal", "with the next one"] {
        runs_as_before(&mut rig, &named, &unnamed, start);
    }
    // A version that is newer had the node in between.
    fs::write(rig.path("state/pool.journal"), before).unwrap();
    rig.edit_journal(|record| {
        if let Record::Noted { note, .. } = record {
            *note = "of another version".to_owned();
        }
    });
    for start in ["with notes of another version", "after that"] {
        runs_as_before(&mut rig, &named, &unnamed, start);
    }
    rig.start();
    for pod in [&named, &unnamed] {
        assert!(rig.del(pod).ok);
    }
    assert!(rig.leases().is_empty());
    assert_eq!(residue(&empty, &rig.kernel()), "");
}

/// One life of the agent.
fn runs_as_before(rig: &mut Rig, named: &Pod, unnamed: &Pod, start: &str) {
    rig.start();
    wait_for("a look at EC2", || {
        let metrics = rig.get(61678, "/metrics");
        let mut lines = metrics.lines();
        let looks = lines.find_map(|line| line.strip_prefix("awscni_reconcile_count "));
        looks.is_some_and(|looks| looks != "0")
    });
    let leases = rig.leases();
    let ids: Vec<_> = leases.keys().map(String::as_str).collect();
    assert_eq!(ids, ["c", "d"], "{start}");
    let mut feed = rig.feed();
    let told = loop {
        if let Event::Added(told) = feed.next() {
            break told;
        }
    };
    let told = (&*told.name, &*told.container_id, told.selected);
    assert_eq!(told, ("cart", "c", true), "{start}");
    let control = "10.0.0.10".parse().unwrap();
    let heard = talk(&unnamed.netns, &rig.control, control);
    assert_eq!(heard.unwrap(), leases["d"], "{start}");
    let heard = talk(&rig.control, &unnamed.netns, leases["d"]);
    assert_eq!(heard.unwrap(), control, "{start}");
    let left = talk(&named.netns, &rig.control, control);
    assert!(left.is_err(), "{start}: the pod was freed");
    assert!(rig.end(Signal::SIGTERM).success(), "{start}");
}
