//! Warm targets as users of the AWS CNI know them, on an m5.large: 3 interfaces of 10 addresses.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::Ipv4Addr, time::Duration};

use turnpike_ipam::{
    Action, Attachment, Config, Eni, EniId, Holder, Limits, Moment, PodRef, Pool, Targets,
};

const START: Moment = Moment(1_000_000);

fn pool(targets: Targets) -> Pool {
    let limits = Limits {
        enis: 3,
        addresses_per_eni: 10,
    };
    Pool::new(Config {
        limits,
        targets,
        cooldown: Duration::from_secs(30),
    })
}

fn by_address(warm: u32, minimum: u32) -> Targets {
    let given = |n: u32| (n > 0).then_some(n);
    Targets {
        warm_addresses: given(warm),
        minimum_addresses: given(minimum),
        ..Targets::default()
    }
}

fn eni(index: u32) -> Eni {
    Eni {
        id: EniId::new(format!("eni-{index}")),
        mac: format!("02:00:00:00:00:0{index}"),
        device_index: index,
        primary: Ipv4Addr::new(10, 0, index as u8, 4),
        subnet: "10.0.0.0/18".parse().unwrap(),
    }
}

/// Attaches interface `index` with `addresses`.
fn attach(pool: &mut Pool, index: u32, addresses: u32, now: Moment) {
    let mut log = Vec::new();
    let action = Action::Create { addresses };
    let intent = pool
        .begin(action, format!("t{index}"), now, &mut log)
        .unwrap();
    let gained = (0..addresses)
        .map(|n| Ipv4Addr::new(10, 0, index as u8, 10 + n as u8))
        .collect();
    pool.finish(intent.id, Some(eni(index)), gained, now, &mut log);
    pool.ready(&EniId::new(format!("eni-{index}")));
}

fn lease(pool: &mut Pool, n: u32, now: Moment) -> Ipv4Addr {
    let attachment = Attachment {
        container_id: format!("c{n}"),
        ifname: "eth0".into(),
    };
    let holder = Holder {
        attachment,
        network: "turnpike".into(),
        pod: PodRef::default(),
        netns: "/run/netns/x".into(),
    };
    pool.lease(holder, now, &mut Vec::new()).unwrap().address
}

fn release(pool: &mut Pool, n: u32, now: Moment) {
    let attachment = Attachment {
        container_id: format!("c{n}"),
        ifname: "eth0".into(),
    };
    pool.release(&attachment, now, &mut Vec::new()).unwrap();
}

fn assign(index: u32, count: u32) -> Action {
    Action::Assign {
        eni: EniId::new(format!("eni-{index}")),
        count,
    }
}

fn later(seconds: u64) -> Moment {
    START + Duration::from_secs(seconds)
}

#[test]
fn max_pods_is_what_kubelet_is_told() {
    assert_eq!(
        Limits {
            enis: 3,
            addresses_per_eni: 10
        }
        .max_pods(),
        29
    );
    assert_eq!(
        Limits {
            enis: 3,
            addresses_per_eni: 6
        }
        .max_pods(),
        17
    );
}

#[test]
fn one_warm_interface_fills_the_first_and_attaches_the_next_with_the_first_pod() {
    let mut pool = pool(Targets::default());
    attach(&mut pool, 0, 0, START);
    assert_eq!(pool.plan(START), [assign(0, 9)]);
    let mut full = self::pool(Targets::default());
    attach(&mut full, 0, 9, START);
    assert_eq!(
        full.plan(START),
        [],
        "nine spare addresses are one interface's worth"
    );
    lease(&mut full, 1, START);
    assert_eq!(full.plan(START), [Action::Create { addresses: 9 }]);
}

#[test]
fn a_warm_address_target_overrides_the_warm_interface() {
    let mut pool = pool(by_address(2, 0));
    attach(&mut pool, 0, 0, START);
    assert_eq!(pool.plan(START), [assign(0, 2)]);
}

#[test]
fn a_minimum_is_held_whether_or_not_pods_are_there() {
    let mut pool = pool(by_address(0, 6));
    attach(&mut pool, 0, 2, START);
    assert_eq!(pool.plan(START), [assign(0, 4)]);
}

#[test]
fn what_one_interface_cannot_hold_goes_to_new_ones_in_the_same_turn() {
    let mut pool = pool(by_address(20, 0));
    attach(&mut pool, 0, 4, START);
    let wanted = [
        assign(0, 5),
        Action::Create { addresses: 9 },
        Action::Create { addresses: 2 },
    ];
    assert_eq!(pool.plan(START), wanted);
}

#[test]
fn an_interface_on_its_way_is_filled_before_another_is_made() {
    let mut pool = pool(by_address(1, 0));
    attach(&mut pool, 0, 9, START);
    for n in 0..9 {
        lease(&mut pool, n, START);
    }
    let action = pool.plan(START).pop().unwrap();
    assert_eq!(action, Action::Create { addresses: 1 });
    pool.begin(action, "t".into(), START, &mut Vec::new())
        .unwrap();
    pool.expect(4);
    assert_eq!(pool.plan(START), []);
    pool.expect(12);
    assert_eq!(pool.plan(START), [Action::Create { addresses: 4 }]);
}

#[test]
fn max_eni_caps_and_bound_pods_are_provided_for() {
    let mut capped = pool(Targets {
        max_enis: Some(1),
        ..Targets::default()
    });
    attach(&mut capped, 0, 9, START);
    lease(&mut capped, 1, START);
    assert_eq!(capped.plan(START), []);
    let mut bound = pool(by_address(1, 0));
    attach(&mut bound, 0, 1, START);
    bound.expect(5);
    assert_eq!(bound.plan(START), [assign(0, 5)]);
}

#[test]
fn cooling_addresses_are_not_spare_and_not_given_out() {
    let mut pool = pool(by_address(1, 0));
    attach(&mut pool, 0, 2, START);
    let first = lease(&mut pool, 1, START);
    release(&mut pool, 1, START);
    assert_eq!(pool.counts(START).allocatable, 1);
    assert_ne!(lease(&mut pool, 2, START), first);
    assert_eq!(
        pool.plan(START),
        [assign(0, 1)],
        "the cooling one does not count"
    );
    assert_eq!(pool.counts(later(30)).allocatable, 1);
    assert_eq!(lease(&mut pool, 3, later(30)), first);
}

#[test]
fn pods_are_packed_so_that_an_interface_can_go_back_when_it_is_old_enough() {
    let mut pool = pool(by_address(1, 0));
    attach(&mut pool, 0, 3, START);
    attach(&mut pool, 1, 3, START);
    for n in 0..3 {
        assert_eq!(
            lease(&mut pool, n, START).octets()[2],
            0,
            "the primary interface first"
        );
    }
    lease(&mut pool, 3, START);
    release(&mut pool, 3, START);
    let back = |eni: &str| Action::Delete {
        eni: EniId::new(eni),
    };
    assert!(
        !pool.plan(later(59)).contains(&back("eni-1")),
        "too young, and one still cools"
    );
    release(&mut pool, 0, later(59));
    assert_eq!(pool.plan(later(100)), [back("eni-1")]);
}

#[test]
fn spare_addresses_go_back_one_step_at_a_time() {
    let mut pool = pool(by_address(2, 0));
    attach(&mut pool, 0, 6, START);
    let action = pool.plan(START).pop().unwrap();
    assert!(matches!(&action, Action::Unassign { addresses, .. } if addresses.len() == 4));
    let mut log = Vec::new();
    let intent = pool.begin(action, "t".into(), START, &mut log).unwrap();
    assert_eq!(
        pool.counts(START).allocatable,
        2,
        "those on their way out are nobody's"
    );
    pool.finish(intent.id, None, Vec::new(), START, &mut log);
    assert_eq!(pool.counts(START).total, 2);
    assert_eq!(pool.plan(START), []);
}

#[test]
fn after_a_refusal_ec2_is_left_in_peace() {
    let mut pool = pool(by_address(2, 0));
    attach(&mut pool, 0, 0, START);
    let mut log = Vec::new();
    let intent = pool
        .begin(assign(0, 2), "t".into(), START, &mut log)
        .unwrap();
    pool.fail(intent.id, Duration::from_secs(120), START, &mut log);
    assert_eq!(pool.plan(later(119)), []);
    assert_eq!(pool.plan(later(120)), [assign(0, 2)]);
}

#[test]
fn what_goes_back_is_never_a_pods() {
    let mut pool = pool(by_address(1, 0));
    attach(&mut pool, 0, 6, START);
    let used: Vec<_> = (0..3).map(|n| lease(&mut pool, n, START)).collect();
    let actions = pool.plan(START);
    let [Action::Unassign { addresses, .. }] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert_eq!(addresses.len(), 2);
    assert!(addresses.iter().all(|address| !used.contains(address)));
    let stolen = Action::Unassign {
        eni: EniId::new("eni-0"),
        addresses: used,
    };
    assert!(
        pool.begin(stolen, "t".into(), START, &mut Vec::new())
            .is_none()
    );
}
