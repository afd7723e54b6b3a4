//! The index alone, with a clock of the test's own.

use super::*;

fn index() -> Index {
    let identity = Identity::new("cluster.local", "shop", "web").unwrap();
    let names = Names {
        cluster: "cluster".into(),
        network: "default".into(),
        pod_uid: "uid".into(),
        identity: identity.clone(),
    };
    let mut index = Index::new(names);
    index.apply(vec![Change::Own(Some(Box::new(SelfConfig {
        uid: "uid".into(),
        namespace: "shop".into(),
        name: "web-1".into(),
        identity,
        names: Arc::new(WorkloadNames::unlabelled("web", "shop")),
        zone: "a".into(),
        ports: vec![],
        probe_ports: vec![],
        mtls: Default::default(),
        port_mtls: vec![],
        authorization: Default::default(),
        backs: vec![],
        telemetry: Default::default(),
        mesh_prefixes: vec!["10.0.0.0/8".parse().unwrap()],
    })))]);
    index
}

fn ip(n: usize) -> IpAddr {
    let [.., b, c] = u32::try_from(n).unwrap().to_be_bytes();
    [10, 0, b, c].into()
}

fn key(n: usize) -> ServiceKey {
    ServiceKey::new("cluster", "shop", &format!("s{n}"))
}

/// What a scan of the mesh's addresses costs: a bounded number of questions and answers.
#[test]
fn negative_answers_are_bounded() {
    let mut index = index();
    let start = Instant::now();
    for n in 0..3 * UNANSWERED {
        let now = start + Duration::from_millis(n.try_into().unwrap());
        assert!(
            matches!(index.address(ip(n), now), Asked::Waiting(_)),
            "{n}"
        );
        assert!(
            matches!(index.service(&key(n), now), Asked::Waiting(_)),
            "{n}"
        );
        index.apply(vec![
            Change::Address(ip(n), None),
            Change::Service(key(n), None),
        ]);
    }
    assert_eq!(index.addresses.len(), UNANSWERED);
    assert_eq!(index.services.len(), UNANSWERED);
    let now = Instant::now();
    assert!(matches!(
        index.address(ip(3 * UNANSWERED - 1), now),
        Asked::Known(Lookup::Unknown)
    ));
    assert!(matches!(
        index.service(&key(3 * UNANSWERED - 1), now),
        Asked::Known(None)
    ));
    assert!(
        !index.addresses.contains_key(&ip(0)),
        "the oldest went first"
    );
    // And the controller is not left with subscriptions to them either.
    let subscribed: usize = index
        .take_subscriptions()
        .iter()
        .map(|s| s.subscribe.len())
        .sum();
    assert_eq!(subscribed, 2 * UNANSWERED + 1);
}

#[test]
fn questions_that_are_waited_for_are_not_pushed_out() {
    let mut index = index();
    let now = Instant::now();
    let waiting: Vec<_> = (0..UNANSWERED).map(|n| index.address(ip(n), now)).collect();
    assert!(matches!(index.address(ip(UNANSWERED), now), Asked::Full));
    drop(waiting);
    assert!(matches!(
        index.address(ip(UNANSWERED), now),
        Asked::Waiting(_)
    ));
}

#[test]
fn what_is_known_does_not_count_as_a_question() {
    let mut index = index();
    let now = Instant::now();
    for n in 0..2 * UNANSWERED {
        assert!(matches!(index.address(ip(n), now), Asked::Waiting(_)));
        index.apply(vec![Change::Address(ip(n), Some(Lookup::Service(key(n))))]);
    }
    assert_eq!(index.addresses.len(), 2 * UNANSWERED);
}

#[test]
fn nothing_is_evicted_while_the_controller_is_away_or_before_its_time() {
    let mut index = index();
    let now = Instant::now();
    let _ = index.address(ip(1), now);
    index.apply(vec![Change::Address(ip(1), Some(Lookup::Service(key(1))))]);
    index.evict(now + 10 * IDLE);
    assert_eq!(index.addresses.len(), 1, "away");
    index.connected = true;
    index.evict(now + IDLE / 2);
    assert_eq!(index.addresses.len(), 1, "not idle yet");
    index.evict(now + IDLE);
    assert!(index.addresses.is_empty());
}

#[test]
fn without_its_own_configuration_nothing_is_taken_for_foreign() {
    let names = index().names;
    let mut index = Index::new(names);
    let answer = index.address([203, 0, 113, 1].into(), Instant::now());
    assert!(matches!(answer, Asked::Full), "{answer:?}");
}

/// A late answer to what was evicted meanwhile does not bring it back.
#[test]
fn late_answers_are_dropped() {
    let mut index = index();
    index.apply(vec![
        Change::Address(ip(1), Some(Lookup::Unknown)),
        Change::Service(key(1), None),
        Change::Shard(key(1), "cluster/shop/s1/0".into(), None),
    ]);
    assert!(index.addresses.is_empty() && index.services.is_empty());
}
