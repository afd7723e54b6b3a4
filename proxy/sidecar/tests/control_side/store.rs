//! Questions of the data plane and their answers.

use std::time::{Duration, Instant};

use futures_util::{FutureExt, future::join_all};
use tokio::time::timeout;
use turnpike_rules::{
    service::{EndpointShard, Service},
    workload::{Destination, SelfConfig},
};
use turnpike_sidecar::{
    control::{Control, snapshot, store::DEADLINE},
    mesh::{Directory, Lookup, ServiceWatch},
};
use turnpike_wire::resource::{Resource, pack};

use crate::{
    controller::{PATIENCE, TestController},
    rig::*,
};

fn asked(pod: &Pod, type_url: &str, name: &str) -> usize {
    let seen = pod.server.seen();
    let of_type = seen.iter().filter(|request| request.type_url == type_url);
    of_type
        .flat_map(|r| &r.resource_names_subscribe)
        .filter(|asked| *asked == name)
        .count()
}

async fn changed(watch: &mut ServiceWatch) -> Result<(), tokio::sync::watch::error::RecvError> {
    timeout(PATIENCE, watch.changed())
        .await
        .expect("must change")
}

fn uids(watch: &ServiceWatch) -> Vec<String> {
    watch
        .borrow()
        .endpoints
        .iter()
        .map(|view| view.endpoint.uid.to_string())
        .collect()
}

#[tokio::test]
async fn readiness_waits_for_certificate_and_own_configuration() {
    let server = TestController::start().await;
    server.ca_refuses(Some(tonic::Status::unavailable("not yet")));
    let control = Control::start(config(&server, None));
    let pod = Pod { server, control };
    pod.server
        .see("asks for itself", |r| r.resource_names_subscribe == [UID])
        .await;
    let short = Duration::from_millis(300);
    assert!(
        timeout(short, pod.control.ready()).await.is_err(),
        "neither is there"
    );
    pod.server.put(UID, "1", &own());
    assert!(
        timeout(short, pod.control.ready()).await.is_err(),
        "no certificate"
    );
    pod.server.ca_refuses(None);
    let mut current = pod.ready().await;
    assert_eq!(**current.borrow_and_update(), own());

    // It is pushed when it changes.
    let mut strict = own();
    strict.mtls = turnpike_rules::workload::MtlsMode::Strict;
    pod.server.put(UID, "2", &strict);
    timeout(PATIENCE, current.changed())
        .await
        .expect("pushed")
        .unwrap();
    assert_eq!(**current.borrow(), strict);
}

#[tokio::test]
async fn another_pods_configuration_is_refused() {
    let pod = Pod::start(None).await;
    let mut other = own();
    other.identity = turnpike_rules::Identity::new("cluster.local", "shop", "admin").unwrap();
    pod.server.put(UID, "2", &other);
    let nack = pod.server.see("NACK", |r| r.error_detail.is_some()).await;
    let message = nack.error_detail.unwrap().message;
    assert!(
        message.contains("sa/admin, but this proxy is spiffe://"),
        "{message}"
    );
    assert_eq!(*pod.control.store().own_now().unwrap(), own());
    assert_eq!(pod.control.store().refused(), 1);
}

#[tokio::test]
async fn many_waiters_are_one_question() {
    let pod = Pod::start(None).await;
    let name = "default/10.0.0.7";
    pod.server.hold(name);
    pod.server.put(name, "1", &workload(7));
    let store = pod.control.store();
    let answers = tokio::spawn(join_all((0..50).map(|_| store.destination(ip(7)))));
    pod.server
        .see("the question", |r| r.resource_names_subscribe == [name])
        .await;
    // Those who come while it is under way wait with the others. The question for another
    // address, sent after theirs would have been, shows that there was none.
    let late = tokio::spawn(join_all((0..10).map(|_| store.destination(ip(7)))));
    store.destination(ip(6)).await;
    assert_eq!(asked(&pod, Destination::TYPE_URL, name), 1);
    pod.server.let_go(name);
    timeout(PATIENCE, late).await.unwrap().unwrap();
    let answers = timeout(PATIENCE, answers).await.unwrap().unwrap();
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Lookup::Workload(w) if &*w.uid == "uid-7"))
    );
    assert_eq!(asked(&pod, Destination::TYPE_URL, name), 1);
    // And it is known from now on.
    assert!(matches!(
        store.destination(ip(7)).await,
        Lookup::Workload(_)
    ));
    assert_eq!(asked(&pod, Destination::TYPE_URL, name), 1);
}

#[tokio::test]
async fn outside_the_mesh_nobody_is_asked() {
    let pod = Pod::start(None).await;
    let answer = pod
        .control
        .store()
        .destination([203, 0, 113, 9].into())
        .await;
    assert!(matches!(answer, Lookup::Unknown), "{answer:?}");
    // A question that is asked, so that the other would have been seen before it.
    pod.server.put("default/10.0.0.7", "1", &workload(7));
    pod.control.store().destination(ip(7)).await;
    assert_eq!(asked(&pod, Destination::TYPE_URL, "default/203.0.113.9"), 0);
    // An IPv4 address in IPv6 clothes is the IPv4 address.
    let mapped = "::ffff:10.0.0.7".parse().unwrap();
    assert!(matches!(
        pod.control.store().destination(mapped).await,
        Lookup::Workload(_)
    ));
}

#[tokio::test]
async fn no_answer_within_the_deadline_is_not_a_no() {
    let pod = Pod::start(None).await;
    pod.server.hold("default/10.0.0.7");
    pod.server.put("default/10.0.0.7", "1", &workload(7));
    pod.server.hold(&view("web"));
    let store = pod.control.store();
    let began = Instant::now();
    // Both at once, and a second question for what is asked already: each has the whole deadline.
    let later = async {
        tokio::time::sleep(DEADLINE / 2).await;
        store.destination(ip(7)).await
    };
    let (answer, none, again) = tokio::join!(
        store
            .destination(ip(7))
            .map(|answer| (answer, began.elapsed())),
        store
            .service(&key("web"))
            .map(|none| (none, began.elapsed())),
        later.map(|answer| (answer, began.elapsed())),
    );
    assert!(matches!(answer.0, Lookup::Unanswered), "{:?}", answer.0);
    assert!(none.0.is_err());
    assert!(matches!(again.0, Lookup::Unanswered), "{:?}", again.0);
    let within = |took: Duration, deadline: Duration| {
        let slack = Duration::from_secs(1);
        assert!(
            deadline <= took && took < deadline + slack,
            "{took:?}, not {deadline:?}"
        );
    };
    within(answer.1, Duration::from_secs(2));
    within(none.1, Duration::from_secs(2));
    within(again.1, Duration::from_secs(3));
    // The answer is taken when it comes.
    pod.server.let_go("default/10.0.0.7");
    let answer = timeout(PATIENCE, pod.control.store().destination(ip(7)))
        .await
        .unwrap();
    assert!(matches!(answer, Lookup::Workload(_)), "{answer:?}");
}

#[tokio::test]
async fn a_no_is_kept_until_the_controller_says_otherwise() {
    let pod = Pod::start(None).await;
    let store = pod.control.store();
    for _ in 0..3 {
        assert!(matches!(store.destination(ip(8)).await, Lookup::Unknown));
        assert!(store.service(&key("none")).await.is_err());
    }
    assert_eq!(asked(&pod, Destination::TYPE_URL, "default/10.0.0.8"), 1);
    assert_eq!(asked(&pod, Service::TYPE_URL, &view("none")), 1);

    pod.server.put("default/10.0.0.8", "1", &workload(8));
    pod.put_service("1", "none", &[("0", &[8])]);
    let wait = async {
        while !matches!(store.destination(ip(8)).await, Lookup::Workload(_)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        while store.service(&key("none")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .expect("what came to be is pushed");
    assert_eq!(asked(&pod, Destination::TYPE_URL, "default/10.0.0.8"), 1);
}

#[tokio::test]
async fn a_service_takes_effect_with_its_last_shard() {
    let pod = Pod::start(None).await;
    let second = format!("{}/1", key("web"));
    pod.server.hold(&second);
    pod.put_service("1", "web", &[("0", &[1, 2]), ("1", &[3])]);
    let answer = tokio::spawn(pod.control.store().service(&key("web")));
    pod.server
        .see("asks for the shards", |r| {
            r.resource_names_subscribe.contains(&second)
        })
        .await;
    assert!(!answer.is_finished(), "half a Service is none");
    pod.server.let_go(&second);
    let mut web = timeout(PATIENCE, answer).await.unwrap().unwrap().unwrap();
    assert_eq!(uids(&web), ["uid-1", "uid-2", "uid-3"]);
    assert_eq!(web.borrow().endpoints[0].target(80), Some(8080));

    // A new layout replaces the old one whole.
    let third = format!("{}/2", key("web"));
    pod.server.hold(&third);
    pod.put_service("2", "web", &[("0", &[1]), ("2", &[4])]);
    pod.server
        .see("asks for the new shard", |r| {
            r.resource_names_subscribe == [third.clone()]
        })
        .await;
    let early = uids(&web);
    assert!(
        early.contains(&"uid-3".to_owned()),
        "the old layout holds until then: {early:?}"
    );
    pod.server.let_go(&third);
    while uids(&web) != ["uid-1", "uid-4"] {
        changed(&mut web).await.unwrap();
    }
    pod.server
        .see("drops the old shard", |r| {
            r.resource_names_unsubscribe == [second.clone()]
        })
        .await;
}

#[tokio::test]
async fn endpoints_change_alone_and_a_service_ends() {
    let pod = Pod::start(None).await;
    pod.put_service("1", "web", &[("0", &[1, 2])]);
    let mut web = pod.control.store().service(&key("web")).await.unwrap();
    let changed_shard = shard("web", "0", &[2]);
    pod.server
        .put(&changed_shard.name.clone(), "2", &changed_shard);
    changed(&mut web).await.unwrap();
    assert_eq!(uids(&web), ["uid-2"]);

    // A shard that is gone has no endpoints left, even before the Service says so.
    pod.server.remove::<EndpointShard>(&changed_shard.name);
    changed(&mut web).await.unwrap();
    assert!(uids(&web).is_empty());

    pod.server.remove::<Service>(&view("web"));
    assert!(
        changed(&mut web).await.is_err(),
        "its users are told by the end of the watch"
    );
    assert!(pod.control.store().service(&key("web")).await.is_err());
}

#[tokio::test]
async fn a_bad_update_changes_nothing() {
    let pod = Pod::start(None).await;
    pod.put_service("1", "web", &[("0", &[1])]);
    let web = pod.control.store().service(&key("web")).await.unwrap();
    let name = format!("{}/0", key("web"));
    let mut bad = pack(&name, "2", &shard("web", "0", &[1, 2]));
    // An address of three bytes.
    bad.resource.as_mut().unwrap().value = vec![0x12, 0x08, 0x0a, 0x01, b'u', 0x12, 0x03, 10, 0, 0];
    pod.server.put_packed(EndpointShard::TYPE_URL, bad);
    let nack = pod.server.see("NACK", |r| r.error_detail.is_some()).await;
    let message = nack.error_detail.unwrap().message;
    assert!(
        message.contains("endpoints[0].address") && message.contains(&name),
        "{message}"
    );
    assert_eq!(uids(&web), ["uid-1"]);

    // What is right is taken after it.
    let good = shard("web", "0", &[5]);
    pod.server.put(&name, "3", &good);
    until("the good one is taken", || uids(&web) == ["uid-5"]).await;
}

#[tokio::test]
async fn the_last_good_state_serves_while_the_controller_is_away() {
    let mut pod = Pod::start(None).await;
    pod.server.put("default/10.0.0.1", "1", &workload(1));
    pod.put_service("1", "web", &[("0", &[1])]);
    let store = pod.control.store().clone();
    store.destination(ip(1)).await;
    let web = store.service(&key("web")).await.unwrap();
    pod.server.kill().await;
    until("the loss is noticed", || !store.connected()).await;
    store.evict(tokio::time::Instant::now() + Duration::from_secs(86_400));
    assert!(matches!(
        store.destination(ip(1)).await,
        Lookup::Workload(_)
    ));
    assert_eq!(uids(&store.service(&key("web")).await.unwrap()), ["uid-1"]);
    drop(web);
}

#[tokio::test]
async fn what_nobody_uses_is_forgotten() {
    let pod = Pod::start(None).await;
    pod.server.put("default/10.0.0.1", "1", &workload(1));
    pod.put_service("1", "web", &[("0", &[1])]);
    pod.put_service("1", "pay", &[("0", &[2])]);
    let store = pod.control.store();
    store.destination(ip(1)).await;
    let used = store.service(&key("web")).await.unwrap();
    store.service(&key("pay")).await.unwrap();
    store.evict(tokio::time::Instant::now() + Duration::from_secs(3600));
    let dropped = |type_url: &'static str, name: String| {
        move |r: &turnpike_wire::discovery::DeltaDiscoveryRequest| {
            r.type_url == type_url && r.resource_names_unsubscribe == [name.clone()]
        }
    };
    pod.server
        .see(
            "address",
            dropped(Destination::TYPE_URL, "default/10.0.0.1".into()),
        )
        .await;
    pod.server
        .see("service", dropped(Service::TYPE_URL, view("pay")))
        .await;
    pod.server
        .see(
            "shards",
            dropped(EndpointShard::TYPE_URL, format!("{}/0", key("pay"))),
        )
        .await;
    assert_eq!(uids(&used), ["uid-1"], "what is in use stays");
    let unsubscribed = pod.server.seen();
    let unsubscribed = unsubscribed
        .iter()
        .flat_map(|r| &r.resource_names_unsubscribe);
    assert!(!unsubscribed.into_iter().any(|name| name == &view("web")));
}

#[tokio::test]
async fn a_restart_without_the_controller_finds_the_last_state() {
    let dir = tempfile::tempdir().unwrap();
    let mut pod = Pod::start(Some(dir.path())).await;
    pod.server.put("default/10.0.0.1", "1", &workload(1));
    pod.put_service("1", "web", &[("0", &[1, 2]), ("1", &[3])]);
    pod.control.store().destination(ip(1)).await;
    pod.control.store().destination(ip(9)).await;
    let before = pod
        .control
        .store()
        .service(&key("web"))
        .await
        .unwrap()
        .borrow()
        .clone();
    let file = dir.path().join(snapshot::FILE);
    let saved = || {
        let updates = snapshot::read(&file).ok().flatten().unwrap_or_default();
        updates
            .iter()
            .any(|u| u.type_url == EndpointShard::TYPE_URL && u.added.len() == 2)
    };
    until("saved", saved).await;
    pod.server.kill().await;
    drop(pod.control);

    let bytes = std::fs::read(&file).unwrap();
    assert!(
        !bytes.windows(7).any(|window| window == b"PRIVATE"),
        "no keys on disk"
    );
    let control = Control::start(config(&pod.server, Some(dir.path())));
    let own_config = timeout(PATIENCE, control.store().own())
        .await
        .expect("from disk");
    assert_eq!(**own_config.borrow(), own());
    assert!(matches!(
        control.store().destination(ip(1)).await,
        Lookup::Workload(_)
    ));
    let after = control.store().service(&key("web")).await.unwrap();
    assert_eq!(*after.borrow(), before);
    // A no is not kept over a restart, and nobody is there to ask.
    assert!(matches!(
        control.store().destination(ip(9)).await,
        Lookup::Unanswered
    ));
}

#[tokio::test]
async fn a_damaged_last_state_is_left_aside() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(snapshot::FILE);
    for damage in [
        &b""[..],
        b"something else\n",
        b"turnpike mesh snapshot 1\n\xff\xff\xff\xff\x0f",
    ] {
        std::fs::write(&file, damage).unwrap();
        let pod = Pod::start(Some(dir.path())).await;
        assert_eq!(*pod.control.store().own_now().unwrap(), own());
    }
    // Of another pod: its own configuration is not ours.
    let mut other = own();
    other.identity = turnpike_rules::Identity::new("cluster.local", "shop", "admin").unwrap();
    let update = turnpike_wire::ads::Update {
        type_url: SelfConfig::TYPE_URL.to_owned(),
        added: vec![turnpike_wire::ads::Added {
            name: UID.to_owned(),
            version: String::new(),
            bytes: other.encode(),
        }],
        removed: vec![],
    };
    snapshot::write(&file, &[update]).unwrap();
    let mut server = TestController::start().await;
    server.kill().await;
    let control = Control::start(config(&server, Some(dir.path())));
    assert!(control.store().own_now().is_none());
}
