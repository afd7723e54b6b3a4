//! What is sent to whom, and when.

use serde_json::json;
use tonic::Code;
use turnpike_api::{Kind, ObjectKey};
use turnpike_model::{Changes, Model};

use crate::rig::{AGENT, Rig, WEB, pod, service, subscription};

const GATE: &str = "turnpike-system/turnpike-gate/uid-gate/node-a";

fn none() -> Vec<String> {
    Vec::new()
}

fn delete(kind: Kind, name: &str) -> impl FnOnce(&mut Model) -> Changes + use<'_> {
    move |model| model.delete(&ObjectKey::new(kind, "shop", name))
}

#[tokio::test]
async fn a_subscriber_is_told_what_it_asked_for_and_then_what_changes() {
    let rig = Rig::start().await;
    rig.apply(Kind::Service, service("web", "web"));
    rig.apply(Kind::Pod, pod("web-1", "node-a", "10.0.0.1", true));
    let mut client = rig.client(WEB).await;
    client
        .subscribe("Service", &["cluster/shop/web@shop", "cluster/shop/absent"])
        .await;
    let (added, removed) = client.names().await;
    assert_eq!(
        added,
        ["cluster/shop/web@shop"],
        "under the name that was asked for"
    );
    assert_eq!(
        removed,
        ["cluster/shop/absent"],
        "a name that is not there is answered"
    );

    client
        .subscribe("Endpoints", &["cluster/shop/web/80-8080"])
        .await;
    assert_eq!(client.names().await.0, ["cluster/shop/web/80-8080"]);
    rig.apply(Kind::Pod, pod("web-2", "node-a", "10.0.0.2", true));
    assert_eq!(
        client.names().await,
        (vec!["cluster/shop/web/80-8080".into()], none())
    );
    client.nothing_more().await;

    // What is not there yet comes when it does.
    rig.apply(Kind::Service, service("absent", "nobody"));
    assert_eq!(client.names().await.0, ["cluster/shop/absent"]);
    rig.discovery.update(delete(Kind::Service, "absent"));
    assert_eq!(
        client.names().await,
        (vec![], vec!["cluster/shop/absent".into()])
    );

    // Asked for again, it is sent again; unsubscribed, never more.
    client
        .subscribe("Service", &["cluster/shop/web@shop"])
        .await;
    assert_eq!(client.names().await.0, ["cluster/shop/web@shop"]);
    client
        .unsubscribe("Endpoints", &["cluster/shop/web/80-8080"])
        .await;
    client.nothing_more().await;
    rig.apply(Kind::Pod, pod("web-2", "node-a", "10.0.0.2", false));
    client.nothing_more().await;
}

#[tokio::test]
async fn a_consumer_gets_its_own_view_while_it_has_routes() {
    let rig = Rig::start().await;
    rig.apply(Kind::Service, service("web", "web"));
    let mut shop = rig.client(WEB).await;
    let mut bank = rig.client("bank/teller/uid-teller/node-a").await;
    shop.subscribe("Service", &["cluster/shop/web@shop"]).await;
    bank.subscribe("Service", &["cluster/shop/web@bank"]).await;
    let (plain, _) = shop.told().await;
    let (view, _) = bank.told().await;
    assert_eq!(
        plain[0].1, view[0].1,
        "the same content until a route is attached"
    );
    let route = json!({
        "metadata": {"name": "slow", "namespace": "bank"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "web", "namespace": "shop"}],
            "rules": [{"backendRefs": [{"name": "web", "namespace": "shop", "port": 80}]}],
        },
    });
    rig.apply(Kind::HttpRoute, route);
    let (own, _) = bank.told().await;
    assert_eq!(own[0].0, "cluster/shop/web@bank");
    assert_ne!(own[0].1, view[0].1);
    shop.nothing_more().await;
    rig.discovery
        .update(|model| model.delete(&ObjectKey::new(Kind::HttpRoute, "bank", "slow")));
    assert_eq!(bank.told().await.0, view);
    // A change of the Service reaches both.
    rig.apply(Kind::Pod, pod("web-1", "node-a", "10.0.0.1", true));
    assert_eq!(shop.names().await.0, ["cluster/shop/web@shop"]);
    assert_eq!(bank.names().await.0, ["cluster/shop/web@bank"]);
}

#[tokio::test]
async fn a_wildcard_covers_the_pods_of_the_callers_node_alone() {
    let rig = Rig::start().await;
    rig.apply(Kind::Pod, pod("web-1", "node-a", "10.0.0.1", true));
    rig.apply(Kind::Pod, pod("web-2", "node-b", "10.0.0.2", true));
    let mut agent = rig.client(AGENT).await;
    let mut gate = rig.client(GATE).await;
    agent.subscribe("PodNetwork", &["*"]).await;
    gate.subscribe("PodEgress", &["*"]).await;
    assert_eq!(
        agent.names().await,
        (vec!["cluster/shop/web-1".into()], none())
    );
    assert_eq!(gate.names().await.0, ["cluster/shop/web-1"]);
    agent.subscribe("Members", &["*"]).await;
    let (members, _) = agent.names().await;
    assert_eq!(
        members,
        ["cluster/node-a", "cluster/node-b", "cluster/static"]
    );

    // A pod of another node is nobody's here; one that moves is gone from the old node.
    rig.apply(Kind::Pod, pod("web-3", "node-b", "10.0.0.3", true));
    assert_eq!(
        agent.names().await.0,
        ["cluster/node-b"],
        "its address is the cluster's, though"
    );
    gate.nothing_more().await;
    rig.apply(Kind::Pod, pod("web-1", "node-b", "10.0.0.1", true));
    let mut told = vec![agent.names().await, agent.names().await];
    told.sort();
    let nodes = (
        vec!["cluster/node-b".to_owned()],
        vec!["cluster/node-a".to_owned()],
    );
    assert_eq!(
        told,
        [(vec![], vec!["cluster/shop/web-1".to_owned()]), nodes]
    );
    assert_eq!(
        gate.names().await,
        (vec![], vec!["cluster/shop/web-1".into()])
    );

    // By its name a pod of another node does not exist either.
    gate.subscribe("PodEgress", &["cluster/shop/web-2"]).await;
    assert_eq!(
        gate.names().await,
        (vec![], vec!["cluster/shop/web-2".into()])
    );
}

#[tokio::test]
async fn a_client_that_resumes_is_sent_only_what_differs() {
    let rig = Rig::start().await;
    rig.apply(Kind::Service, service("web", "web"));
    rig.apply(Kind::Service, service("api", "api"));
    rig.apply(Kind::Pod, pod("web-1", "node-a", "10.0.0.1", true));
    rig.apply(Kind::Pod, pod("web-2", "node-a", "10.0.0.2", true));
    let names = [
        "cluster/shop/web",
        "cluster/shop/api",
        "cluster/shop/absent",
    ];
    let mut first = rig.client(WEB).await;
    first.subscribe("Service", &names).await;
    let (held, _) = first.told().await;
    let mut agent = rig.client(AGENT).await;
    agent.subscribe("PodNetwork", &["*"]).await;
    let (pods, _) = agent.told().await;
    assert_eq!((held.len(), pods.len()), (2, 2));
    drop((first, agent));

    rig.discovery.update(delete(Kind::Service, "api"));
    rig.discovery.update(delete(Kind::Pod, "web-2"));
    let mut second = rig.client(WEB).await;
    second.send(subscription("Service", &names, &held)).await;
    let (added, mut removed) = second.names().await;
    removed.sort();
    assert_eq!(removed, ["cluster/shop/absent", "cluster/shop/api"]);
    // Without web-2 its Service has the same shards: only the shard differs.
    assert_eq!(added, none());
    second.nothing_more().await;
    let mut agent = rig.client(AGENT).await;
    agent.send(subscription("PodNetwork", &["*"], &pods)).await;
    assert_eq!(
        agent.names().await,
        (vec![], vec!["cluster/shop/web-2".into()])
    );
    agent.nothing_more().await;
}

#[tokio::test]
async fn what_one_may_not_have_ends_the_stream_with_the_rule() {
    let rig = Rig::start().await;
    for (caller, kind, name, says) in [
        (WEB, "Self", "uid-other", "uid-web-1"),
        (WEB, "PodEgress", "*", "turnpike-gate"),
        (WEB, "Members", "*", "turnpike-node"),
        (AGENT, "PodEgress", "*", "turnpike-gate"),
        (WEB, "Service", "*", "by name"),
        (
            "turnpike-system/turnpike-gate/uid-gate/",
            "PodEgress",
            "*",
            "names no node",
        ),
    ] {
        let mut client = rig.client(caller).await;
        client.subscribe(kind, &[name]).await;
        let status = client.response().await.unwrap_err();
        assert_eq!(
            status.code(),
            Code::PermissionDenied,
            "{caller} {kind} {name}"
        );
        assert!(status.message().contains(says), "{}", status.message());
    }
    assert_eq!(rig.discovery.counters().denied, 6);
    let mut client = rig.client(WEB).await;
    client.subscribe("Unknown", &["x"]).await;
    assert_eq!(
        client.response().await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn one_pod_that_opens_streams_without_end_is_held_back_alone() {
    let rig = Rig::start().await;
    let mut open = Vec::new();
    let refused = loop {
        match rig.open(WEB).await {
            Ok(client) => open.push(client),
            Err(status) => break status,
        }
        assert!(open.len() < 100, "no end is in sight");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("uid-web-1"), "{refused}");
    // Others are served, and so is it again once one of its streams has ended.
    rig.client("shop/web/uid-web-2/node-a").await;
    open.pop();
    while rig.open(WEB).await.is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_stalled_reader_holds_nobody_up_and_gets_the_latest_state() {
    let rig = Rig::start().await;
    rig.apply(Kind::Service, service("web", "web"));
    for n in 0..60 {
        rig.apply(
            Kind::Pod,
            pod(&format!("web-{n}"), "node-a", &format!("10.0.1.{n}"), true),
        );
    }
    let shard = "cluster/shop/web/80-8080";
    let mut stalled = rig.client(WEB).await;
    let mut reader = rig.client("shop/web/uid-web-2/node-a").await;
    stalled.subscribe("Endpoints", &[shard]).await;
    reader.subscribe("Endpoints", &[shard]).await;
    reader.told().await;
    let mut last = String::new();
    for n in 0..3000 {
        let address = format!("10.1.{}.{}", n / 250, n % 250);
        rig.apply(Kind::Pod, pod("web-0", "node-a", &address, true));
        last = reader.told().await.0.remove(0).1;
    }
    let before = rig.discovery.counters();
    assert_eq!(
        before.encoded,
        3000 + 1,
        "each version is encoded once for both"
    );
    let waiting = rig.discovery.status();
    let waiting = waiting
        .iter()
        .find(|s| s.pod.as_deref() == Some("uid-web-1"))
        .unwrap();
    assert!(waiting.unanswered <= 16, "{waiting:?}");
    assert_eq!(
        waiting.types["Endpoints"].waiting, 1,
        "one key, however often it changed"
    );
    let mut received = 0;
    loop {
        received += 1;
        if stalled.told().await.0[0].1 == last {
            break;
        }
    }
    assert!(
        received < 40,
        "{received} responses: the changes in between were not coalesced"
    );
    stalled.nothing_more().await;
}

#[tokio::test]
async fn what_nobody_watches_is_not_encoded_and_leaves_nothing_behind() {
    let rig = Rig::start().await;
    rig.apply(Kind::Service, service("web", "web"));
    for n in 0..50 {
        rig.apply(
            Kind::Pod,
            pod(&format!("web-{n}"), "node-a", &format!("10.0.1.{n}"), true),
        );
    }
    assert_eq!(rig.discovery.counters().encoded, 0);
    let mut client = rig.client(WEB).await;
    client
        .subscribe("Service", &["cluster/shop/web@shop"])
        .await;
    client.told().await;
    assert_eq!(rig.discovery.counters().encoded, 1);
    drop(client);
    while rig.discovery.subscribers() > 0 {
        tokio::task::yield_now().await;
    }
    rig.apply(Kind::Service, service("web", "other"));
    assert_eq!(rig.discovery.counters().encoded, 1);
}

#[tokio::test]
async fn a_stop_tells_clients_to_go_elsewhere() {
    let rig = Rig::start().await;
    let mut client = rig.client(WEB).await;
    client.nothing_more().await;
    rig.discovery.stop();
    assert_eq!(
        client.response().await.unwrap_err().code(),
        Code::Unavailable
    );
}

#[tokio::test]
async fn a_stream_ends_with_its_token() {
    let rig = Rig::start().await;
    let mut client = rig.client("shop/web/uid-web-1/node-a/0").await;
    let status = client.response().await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("fresh"), "{}", status.message());
}
