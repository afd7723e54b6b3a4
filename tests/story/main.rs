//! The demo's steps, each in a world of its own: what the demo shows is what is tested.

use turnpike_rig::{Options, World, story::STEPS};

fn tell(index: usize) {
    let title = STEPS[index].title;
    let mut world = World::up(Options::test("story"), &|_| ()).expect(title);
    (STEPS[index].tell)(&mut world).expect(title).assert();
}

#[test]
fn step_1_a_vpc_in_a_box() {
    tell(0);
}

#[test]
fn step_2_nodes_with_warm_pools() {
    tell(1);
}

#[test]
fn step_3_pods_with_vpc_addresses() {
    tell(2);
}

#[test]
fn step_4_mutual_tls() {
    tell(3);
}

#[test]
fn step_5_retries_and_circuit_breaking() {
    tell(4);
}

#[test]
fn step_6_nothing_leaves_unless_allowed() {
    tell(5);
}

#[test]
fn step_7_traces_and_metrics() {
    tell(6);
}
