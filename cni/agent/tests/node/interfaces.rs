//! Interfaces that come and go.

use std::{collections::BTreeSet, thread};

use nix::sys::signal::Signal;
use turnpike_ipam::{Moment, Record};

use super::{
    CALM,
    ec2::Refusing,
    rig::{Rig, wait_for},
    system_pod,
    talk::talk,
};

/// Failures often enough that also an attachment is answered with an error that says nothing.
const ROUGH: &str = r"
faults:
  seed: 11
  latency: {minMs: 0, maxMs: 30}
  transition: {minMs: 50, maxMs: 600}
  describeLag: {minMs: 0, maxMs: 400}
  failures: 0.3
";

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

/// The routes go before EC2 is asked to take the interface, and come back if it does not.
#[test]
fn an_interface_that_ec2_does_not_take_back_serves_pods_as_before() {
    let mut rig = Rig::up("ag12", CALM, &[("WARM_IP_TARGET", "3")]);
    let pods: Vec<_> = (0..9)
        .map(|n| system_pod(&rig, &format!("p{n}"), &format!("pod-{n}")))
        .collect();
    for pod in &pods {
        rig.add(pod).address();
    }
    // The first holds nine.
    wait_for("a second interface", || {
        let enis = rig.enis();
        enis["counts"]["enis"] == 2 && enis["counts"]["allocatable"] == 3
    });
    rig.end(Signal::SIGTERM);
    rig.edit_journal(|record| {
        if let Record::Eni { at, .. } = record {
            *at = Moment(0); // old enough to go
        }
    });
    let ec2 = Refusing::start(&rig.node, "DetachNetworkInterface");
    rig.set("AWS_ENDPOINT_URL_EC2", &ec2.url);
    rig.set("WARM_IP_TARGET", "0");
    rig.set("MINIMUM_IP_TARGET", "1");
    rig.start();
    wait_for("EC2 keeps the interface", || ec2.refused() > 0);
    let pod = system_pod(&rig, "q", "on-the-second");
    let address = rig.add(&pod).address();
    let control = "10.0.0.10".parse().unwrap();
    assert_eq!(talk(&pod.netns, &rig.control, control).unwrap(), address);
    assert_eq!(talk(&rig.control, &pod.netns, address).unwrap(), control);
}
