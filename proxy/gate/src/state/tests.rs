use super::*;

fn info(uid: &str, container: &str, address: &str) -> PodInfo {
    PodInfo {
        uid: uid.into(),
        namespace: "shop".into(),
        name: "pay-0".into(),
        container_id: container.into(),
        addresses: vec![address.parse().unwrap()],
        selected: true,
    }
}

fn egress(uid: &str) -> PodEgress {
    PodEgress {
        uid: uid.into(),
        namespace: "shop".into(),
        name: "pay-0".into(),
        identity: "spiffe://cluster.local/ns/shop/sa/pay".parse().unwrap(),
        policies: vec![turnpike_rules::egress::EgressPolicy {
            name: "shop/pay".into(),
            version: "1".into(),
            mode: turnpike_rules::egress::Mode::Enforce,
            rules: vec![],
        }],
    }
}

#[test]
fn what_is_not_known_is_not_selected_but_refused() {
    let (owner, state) = Owner::new(PodLimits::default());
    let address = "10.0.1.5".parse().unwrap();
    assert!(matches!(state.view().standing(address), Standing::Unknown));
    owner.apply(Change::PodAdded(info("u1", "c1", "10.0.1.5")));
    assert!(matches!(
        state.view().standing(address),
        Standing::NoPolicy(_)
    ));
    owner.apply(Change::Policies {
        added: vec![egress("u1")],
        removed: vec![],
    });
    assert!(matches!(
        state.view().standing(address),
        Standing::Selected(..)
    ));
    owner.apply(Change::Policies {
        added: vec![],
        removed: vec!["shop/pay-0".into()],
    });
    assert!(matches!(
        state.view().standing(address),
        Standing::NoPolicy(_)
    ));
}

#[test]
fn the_policy_of_an_earlier_pod_of_the_name_does_not_count() {
    let (owner, state) = Owner::new(PodLimits::default());
    owner.apply(Change::Policies {
        added: vec![egress("old")],
        removed: vec![],
    });
    owner.apply(Change::PodAdded(info("new", "c2", "10.0.1.5")));
    let standing = state.view().standing("10.0.1.5".parse().unwrap());
    assert!(matches!(standing, Standing::NoPolicy(_)));
}

#[test]
fn a_late_removal_leaves_the_new_owner() {
    let (owner, state) = Owner::new(PodLimits::default());
    let address: IpAddr = "10.0.1.5".parse().unwrap();
    owner.apply(Change::PodAdded(info("u1", "c1", "10.0.1.5")));
    owner.apply(Change::PodAdded(info("u2", "c2", "10.0.1.5")));
    owner.apply(Change::PodRemoved {
        container_id: "c1".into(),
        addresses: vec![address],
    });
    assert_eq!(
        state.view().standing(address).pod().map(|p| &*p.uid),
        Some("u2")
    );
}

#[test]
fn a_sender_is_known_by_its_veth_whatever_address_it_takes_and_after_its_end() {
    let (owner, state) = Owner::new(PodLimits::default());
    let (own, other): (IpAddr, IpAddr) = ("10.0.1.5".parse().unwrap(), "10.0.1.6".parse().unwrap());
    owner.apply(Change::PodAdded(info("u1", "c1", "10.0.1.5")));
    owner.apply(Change::PodAdded(info("u2", "c2", "10.0.1.6")));
    let uid = |container: &str, source: IpAddr| {
        let standing = state.view().sender(container, source);
        standing.pod().map(|pod| pod.uid.to_string())
    };
    assert_eq!(
        uid("c1", other).as_deref(),
        Some("u1"),
        "it lies about its source"
    );
    assert_eq!(uid("", own).as_deref(), Some("u1"));
    assert_eq!(uid("c9", own), None, "nobody that is known");
    owner.apply(Change::PodRemoved {
        container_id: "c1".into(),
        addresses: vec![own],
    });
    assert_eq!(uid("c1", own).as_deref(), Some("u1"), "told late");
    assert_eq!(uid("", own).as_deref(), Some("u1"), "told late, link gone");
    assert!(matches!(state.view().standing(own), Standing::Unknown));
    owner.apply(Change::PodAdded(info("u3", "c3", "10.0.1.5")));
    assert_eq!(
        uid("c1", own).as_deref(),
        Some("u1"),
        "not the address's next owner"
    );
    for n in 0..1000 {
        owner.apply(Change::PodAdded(info("x", &format!("x{n}"), "10.0.1.9")));
        owner.apply(Change::PodRemoved {
            container_id: format!("x{n}"),
            addresses: vec!["10.0.1.9".parse().unwrap()],
        });
    }
    assert_eq!(state.view().departed.len(), DEPARTED);
}

#[test]
fn a_feed_that_begins_anew_forgets_what_it_does_not_repeat() {
    let (owner, state) = Owner::new(PodLimits::default());
    owner.apply(Change::PodAdded(info("u1", "c1", "10.0.1.5")));
    owner.apply(Change::PodAdded(info("u2", "c2", "10.0.1.6")));
    let before = state.view().standing("10.0.1.6".parse().unwrap());
    owner.apply(Change::FeedStarted);
    owner.apply(Change::PodAdded(info("u2", "c2", "10.0.1.6")));
    assert!(
        state
            .view()
            .standing("10.0.1.5".parse().unwrap())
            .pod()
            .is_some()
    );
    owner.apply(Change::FeedSynced);
    assert!(
        state
            .view()
            .standing("10.0.1.5".parse().unwrap())
            .pod()
            .is_none()
    );
    let after = state.view().standing("10.0.1.6".parse().unwrap());
    let runtime = |standing: &Standing| standing.pod().unwrap().runtime.clone();
    assert!(
        Arc::ptr_eq(&runtime(&before), &runtime(&after)),
        "its DNS ledger is kept"
    );
}

#[tokio::test(start_paused = true)]
async fn the_start_waits_for_all_that_verdicts_need_and_not_for_ever() {
    let patience = Duration::from_secs(5);
    let (owner, state) = Owner::new(PodLimits::default());
    let started = tokio::time::Instant::now();
    let mut complete = Box::pin(state.clone().completed(patience));
    owner.apply(Change::PodAdded(info("u1", "c1", "10.0.1.5")));
    owner.apply(Change::FeedSynced);
    owner.apply(Change::PoliciesKnown);
    let early = timeout(patience / 2, &mut complete).await;
    early.expect_err("the pod's policy has not come");
    owner.apply(Change::Policies {
        added: vec![egress("u1")],
        removed: vec![],
    });
    complete.await;
    assert!(started.elapsed() < patience);
    // A pod without a policy asks for none.
    owner.apply(Change::PodAdded(PodInfo {
        selected: false,
        ..info("u2", "c2", "10.0.1.6")
    }));
    assert!(state.view().is_complete());

    let (_owner, state) = Owner::new(PodLimits::default());
    let bounded = timeout(2 * patience, state.completed(patience)).await;
    bounded.expect("it waits for ever");
}
