//! What the pool does when EC2, the kernel and the journal disagree, case by case.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::Ipv4Addr, time::Duration};

use turnpike_ipam::{
    Action, Attachment, Config, Eni, EniId, EniView, Finding, Holder, Limits, Live, Moment,
    Outcome, PodRef, Pool, Targets, View,
};

const START: Moment = Moment(1_000_000);

fn at(minute: u64) -> Moment {
    START + Duration::from_secs(60 * minute)
}

fn address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, n)
}

fn eni(index: u32) -> Eni {
    Eni {
        id: EniId::new(format!("eni-{index}")),
        mac: "02:00:00:00:00:01".into(),
        device_index: index,
        primary: Ipv4Addr::new(10, 0, 9, index as u8),
        subnet: "10.0.0.0/18".parse().unwrap(),
    }
}

fn holder(id: &str) -> Holder {
    Holder {
        attachment: Attachment {
            container_id: id.into(),
            ifname: "eth0".into(),
        },
        network: "turnpike".into(),
        pod: PodRef::default(),
        netns: "/run/netns/x".into(),
    }
}

fn listed(index: u32, addresses: &[u8]) -> EniView {
    EniView {
        attached: Some(eni(index)),
        id: eni(index).id,
        addresses: addresses.iter().copied().map(address).collect(),
        token: None,
        managed: true,
    }
}

struct Case {
    pool: Pool,
    live: Vec<Live>,
}

impl Case {
    /// A pool that has seen the primary interface with these addresses.
    fn new(addresses: &[u8]) -> Self {
        let config = Config {
            limits: Limits {
                enis: 3,
                addresses_per_eni: 10,
            },
            targets: Targets {
                warm_addresses: Some(1),
                ..Targets::default()
            },
            cooldown: Duration::from_secs(30),
        };
        let mut case = Self {
            pool: Pool::new(config),
            live: Vec::new(),
        };
        case.look(vec![listed(0, addresses)], START);
        case.pool.ready(&eni(0).id);
        case
    }

    fn look(&mut self, enis: Vec<EniView>, now: Moment) -> Outcome {
        let view = View {
            asked_at: now,
            enis,
        };
        self.pool.reconcile(&view, &self.live, now, &mut Vec::new())
    }

    fn add(&mut self, id: &str, now: Moment) -> Ipv4Addr {
        let lease = self.pool.lease(holder(id), now, &mut Vec::new()).unwrap();
        self.pool.confirm(&lease.holder.attachment);
        self.live.push(Live {
            address: lease.address,
            holder: lease.holder,
        });
        lease.address
    }

    fn allocatable(&self, now: Moment) -> u32 {
        self.pool.counts(now).allocatable
    }
}

#[test]
fn the_first_look_is_believed_at_once() {
    assert_eq!(Case::new(&[1, 2, 3]).allocatable(START), 3);
}

#[test]
fn an_address_that_a_pod_uses_is_kept_whatever_ec2_says_and_asked_for_again() {
    let mut case = Case::new(&[1]);
    let used = case.add("a", START);
    for minute in 1..6 {
        let outcome = case.look(vec![listed(0, &[])], at(minute));
        let lost = Finding::LiveNotAssigned { address: used };
        assert_eq!(
            outcome.findings.contains(&lost),
            minute >= 2,
            "minute {minute}"
        );
        assert!(case.pool.lease_of(&holder("a").attachment).is_some());
    }
    let again = Action::Reclaim {
        eni: eni(0).id,
        addresses: vec![used],
    };
    assert!(case.pool.plan(at(6)).contains(&again));
}

#[test]
fn one_look_without_an_address_only_holds_it_back() {
    let mut case = Case::new(&[1, 2]);
    case.look(vec![listed(0, &[1])], at(1));
    assert_eq!(case.allocatable(at(1)), 1);
    case.look(vec![listed(0, &[1, 2])], at(2));
    assert_eq!(case.allocatable(at(2)), 2, "it was the lag");
    case.look(vec![listed(0, &[1])], at(3));
    case.look(vec![listed(0, &[1])], at(4));
    assert_eq!(case.pool.counts(at(4)).total, 1, "twice: it is gone");
}

#[test]
fn an_address_that_nobody_asked_for_is_quarantined_until_seen_again() {
    let mut case = Case::new(&[1]);
    let outcome = case.look(vec![listed(0, &[1, 9])], at(1));
    assert_eq!(
        outcome.findings,
        [Finding::Unknown {
            eni: eni(0).id,
            address: address(9)
        }]
    );
    assert_eq!(case.allocatable(at(1)), 1);
    case.look(vec![listed(0, &[1, 9])], at(2));
    case.look(vec![listed(0, &[1, 9])], at(3));
    assert_eq!(case.allocatable(at(3)), 2);
}

#[test]
fn a_pod_without_a_lease_gets_the_one_it_uses() {
    let mut case = Case::new(&[1, 2]);
    case.live.push(Live {
        address: address(2),
        holder: holder("lost"),
    });
    case.look(vec![listed(0, &[1, 2])], at(1));
    assert_eq!(
        case.pool
            .lease_of(&holder("lost").attachment)
            .unwrap()
            .address,
        address(2)
    );
    assert_eq!(case.allocatable(at(1)), 1);
}

#[test]
fn a_lease_without_a_link_cools_after_the_second_look_but_not_while_its_add_runs() {
    let mut case = Case::new(&[1, 2]);
    case.add("a", START);
    case.live.clear();
    case.pool
        .lease(holder("pending"), START, &mut Vec::new())
        .unwrap();
    case.look(vec![listed(0, &[1, 2])], at(1));
    assert_eq!(case.pool.leases().count(), 2);
    case.look(vec![listed(0, &[1, 2])], at(2));
    let left: Vec<_> = case
        .pool
        .leases()
        .map(|it| it.holder.attachment.container_id.clone())
        .collect();
    assert_eq!(left, ["pending"]);
    assert_eq!(
        (case.allocatable(at(2)), case.pool.counts(at(2)).cooling),
        (0, 1)
    );
}

#[test]
fn an_interface_with_pods_is_kept_and_one_without_is_given_up() {
    let mut case = Case::new(&[]);
    case.look(
        vec![listed(0, &[]), listed(1, &[1]), listed(2, &[2])],
        at(1),
    );
    // Their addresses came unasked: two more looks clear them.
    for minute in 2..4 {
        case.look(
            vec![listed(0, &[]), listed(1, &[1]), listed(2, &[2])],
            at(minute),
        );
    }
    case.pool.ready(&eni(1).id);
    assert_eq!(case.add("a", at(4)), address(1));
    for minute in 5..7 {
        case.look(vec![listed(0, &[])], at(minute));
    }
    let enis: Vec<_> = case.pool.enis().map(|eni| eni.device_index).collect();
    assert_eq!(enis, [0, 1]);
}

/// The routes of an interface go before EC2 is asked to take it.
#[test]
fn an_interface_that_ec2_did_not_take_gives_no_address_before_it_is_ready_again() {
    for answered in [true, false] {
        let mut case = Case::new(&[]);
        let both = || vec![listed(0, &[]), listed(1, &[1])];
        let outcome = case.look(both(), at(1));
        assert_eq!(outcome.unready, [eni(1)], "new");
        case.pool.ready(&eni(1).id);
        // Its address came unasked: two more looks clear it.
        for minute in 2..4 {
            assert_eq!(case.look(both(), at(minute)).unready, []);
        }
        assert_eq!(case.allocatable(at(4)), 1);
        let mut log = Vec::new();
        let delete = Action::Delete { eni: eni(1).id };
        let intent = case.pool.begin(delete, "t".into(), at(4), &mut log);
        let id = intent.expect("no pod has an address of it").id;
        assert_eq!(case.look(both(), at(4)).unready, [], "on its way");
        if answered {
            case.pool.fail(id, Duration::ZERO, at(5), &mut log);
        } else {
            case.pool.unknown(id);
            let outcome = case.look(both(), at(5));
            assert_eq!(outcome.unready, [], "EC2's answer may be an old one");
        }
        assert_eq!(case.allocatable(at(6)), 0, "it has no routes");
        assert_eq!(case.look(both(), at(6)).unready, [eni(1)]);
        assert_eq!(case.allocatable(at(6)), 0, "nor has it now");
        case.pool.ready(&eni(1).id);
        assert_eq!(case.add("a", at(6)), address(1));
    }
}

#[test]
fn an_interface_that_hangs_on_nothing_is_deleted_when_it_is_no_attach_under_way() {
    let mut case = Case::new(&[1]);
    let loose = || EniView {
        attached: None,
        ..listed(7, &[])
    };
    case.look(vec![listed(0, &[1]), loose()], at(1));
    let delete = Action::Delete { eni: eni(7).id };
    assert!(!case.pool.plan(at(2)).contains(&delete));
    case.look(vec![listed(0, &[1]), loose()], at(7));
    assert!(case.pool.plan(at(7)).contains(&delete));
}

#[test]
fn hands_stay_off_what_is_tagged_so_and_it_counts_against_the_limit() {
    let mut case = Case::new(&[1]);
    let theirs = |index| EniView {
        managed: false,
        ..listed(index, &[5])
    };
    case.look(vec![listed(0, &[1]), theirs(1), theirs(2)], at(1));
    assert_eq!(case.pool.enis().count(), 1);
    case.pool.expect(20);
    let creates = case
        .pool
        .plan(at(1))
        .into_iter()
        .filter(|it| matches!(it, Action::Create { .. }));
    assert_eq!(
        creates.count(),
        0,
        "the instance holds three, two are theirs"
    );
}
