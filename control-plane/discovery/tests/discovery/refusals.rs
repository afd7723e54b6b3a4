//! What a client refuses, and what that costs the rest: nothing.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use turnpike_api::{Kind, Object, ObjectKey};
use turnpike_model::Changes;

use crate::rig::{AGENT, Client, Rig, WEB, pod, service, subscription};

const POISON: &str = "cluster/shop/web-04";
const REASON: &str = "PodNetwork `cluster/shop/web-04`: must_understand: `next` is not known";

/// A client as it should be: it takes a response whole or not at all.
#[derive(Default)]
struct Agent {
    held: BTreeMap<String, String>,
    /// Names of the responses that it refused.
    refused: Vec<Vec<String>>,
}

impl Agent {
    async fn take(&mut self, client: &mut Client) {
        let response = client.response().await.unwrap();
        let added = response.resources.iter();
        let names: Vec<String> = added.clone().map(|r| r.name.clone()).collect();
        if names.iter().any(|name| name == POISON) {
            client.answer(&response, Some(REASON)).await;
            let removed = response.removed_resources.iter().cloned();
            self.refused
                .push(names.into_iter().chain(removed).collect());
            return;
        }
        client.answer(&response, None).await;
        self.held
            .extend(added.map(|r| (r.name.clone(), r.version.clone())));
        for name in &response.removed_resources {
            self.held.remove(name);
        }
    }

    /// Until it has refused the poison by itself and holds `names`; and then nothing comes.
    async fn settle(&mut self, client: &mut Client, names: &BTreeSet<String>) {
        while !(self.alone() && self.held.keys().eq(names)) {
            self.take(client).await;
        }
        client.nothing_more_for_agents().await;
    }

    fn alone(&self) -> bool {
        self.refused.last().is_some_and(|names| names == &[POISON])
    }
}

fn name(n: u32) -> String {
    format!("cluster/shop/web-{n:02}")
}

fn good() -> BTreeSet<String> {
    (0..16).map(name).filter(|name| name != POISON).collect()
}

/// Pod `n`; another account makes another PodNetwork of it.
fn pod_as(n: u32, account: &str) -> Value {
    let mut value = pod(
        &format!("web-{n:02}"),
        "node-a",
        &format!("10.0.0.{n}"),
        true,
    );
    value["spec"]["serviceAccountName"] = json!(account);
    value
}

/// In one change, so that they come in one response.
fn pods(rig: &Rig, account: &str, numbers: impl IntoIterator<Item = u32>) -> Changes {
    let objects = numbers
        .into_iter()
        .map(|n| Object::deserialize(Kind::Pod, pod_as(n, account)).unwrap());
    rig.discovery.update(|model| {
        let mut changes = Changes::default();
        objects.for_each(|object| changes.merge(model.apply(object)));
        changes
    })
}

#[tokio::test]
async fn one_that_is_refused_keeps_no_other_from_arriving() {
    let rig = Rig::start().await;
    let all = pods(&rig, "a", 0..16);
    let mut client = rig.client(AGENT).await;
    let mut agent = Agent::default();
    client.subscribe("PodNetwork", &["*"]).await;
    agent.settle(&mut client, &good()).await;
    assert_eq!(agent.refused[0].len(), 16, "all came together at first");
    let rounds = agent.refused.len();
    assert!(rounds <= 5, "{rounds} rounds for one of sixteen");

    let adoption = rig.discovery.adoption(&all);
    assert_eq!(
        (adoption.watched, adoption.accepted, adoption.refused),
        (16, 15, 1)
    );
    let refusal = &adoption.refusals[0];
    assert_eq!(
        (refusal.resource.as_str(), refusal.subscriber.as_str()),
        (POISON, "pod turnpike-system/uid-agent")
    );
    assert_eq!(refusal.message.as_deref(), Some(REASON));
    let status = rig.discovery.status().remove(0);
    assert_eq!(status.types["PodNetwork"].accepted, 15);
    let refused: Vec<_> = status.refusals.iter().map(|r| &r.resource).collect();
    assert_eq!(refused, [POISON]);

    // When it changes with others it goes by itself at once.
    agent.refused.clear();
    let before = agent.held.clone();
    pods(&rig, "b", 2..8);
    while agent.refused.is_empty() || (5..8).any(|n| agent.held[&name(n)] == before[&name(n)]) {
        agent.take(&mut client).await;
    }
    client.nothing_more_for_agents().await;
    assert_eq!(agent.refused, [[POISON]]);
    let changed = agent.held.iter();
    let changed = changed.filter(|(name, version)| before[*name] != **version);
    assert_eq!(changed.count(), 5);
}

#[tokio::test]
async fn a_client_that_comes_again_gets_all_but_what_it_refuses() {
    let rig = Rig::start().await;
    let all = pods(&rig, "a", 0..16);
    let mut agent = Agent::default();
    for round in 0..3 {
        let mut client = rig.client(AGENT).await;
        let held: Vec<_> = agent.held.clone().into_iter().collect();
        client.send(subscription("PodNetwork", &["*"], &held)).await;
        agent.settle(&mut client, &good()).await;
        let adoption = rig.discovery.adoption(&all);
        assert_eq!(
            (adoption.accepted, adoption.refused),
            (15, 1),
            "round {round}"
        );
        // What had been accepted is not put at risk again.
        let last = std::mem::take(&mut agent.refused);
        assert!(round == 0 || last == [[POISON]], "{last:?}");
        drop(client);
        while rig.discovery.subscribers() > 0 {
            tokio::task::yield_now().await;
        }
    }
    // Restarted without memory it gets everything too.
    let mut restarted = Agent::default();
    let mut client = rig.client(AGENT).await;
    client.subscribe("PodNetwork", &["*"]).await;
    restarted.settle(&mut client, &good()).await;
}

#[tokio::test]
async fn what_has_gone_is_told_although_it_was_refused_with_others() {
    let rig = Rig::start().await;
    pods(&rig, "a", (0..16).filter(|n| *n != 4));
    let mut client = rig.client(AGENT).await;
    client.subscribe("PodNetwork", &["*"]).await;
    let mut agent = Agent::default();
    agent.take(&mut client).await;
    assert_eq!(agent.held.len(), 15);
    rig.discovery.update(|model| {
        let poison = Object::deserialize(Kind::Pod, pod_as(4, "a")).unwrap();
        let mut changes = model.apply(poison);
        changes.merge(model.delete(&ObjectKey::new(Kind::Pod, "shop", "web-09")));
        changes
    });
    let mut left = good();
    left.remove(&name(9));
    agent.settle(&mut client, &left).await;
    assert_eq!(agent.refused[0], [POISON.to_owned(), name(9)]);
}

#[tokio::test]
async fn what_is_unsubscribed_meanwhile_is_not_sent_again() {
    let rig = Rig::start().await;
    for name in ["a", "b", "c"] {
        rig.apply(Kind::Service, service(name, name));
    }
    let names = ["cluster/shop/a", "cluster/shop/b", "cluster/shop/c"];
    let mut client = rig.client(WEB).await;
    client.subscribe("Service", &names).await;
    let response = client.response().await.unwrap();
    assert_eq!(response.resources.len(), 3);
    client.unsubscribe("Service", &names[..2]).await;
    client.answer(&response, Some("no")).await;
    // Nothing is said of the two; the third is still to be had, and the refusal was of three.
    let again = client.response().await.unwrap();
    let again_names: Vec<_> = again.resources.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(again_names, ["cluster/shop/c"]);
    client.answer(&again, Some("no")).await;
    client.nothing_more().await;
    client.unsubscribe("Service", &names[2..]).await;
    client.nothing_more().await;
    assert!(rig.discovery.status()[0].refusals.is_empty());
}

#[tokio::test]
async fn a_refusal_is_kept_for_the_status_and_is_not_sent_again() {
    let rig = Rig::start().await;
    rig.apply(Kind::Service, service("web", "web"));
    let policy = |attempts: u32| {
        json!({
            "apiVersion": "turnpike.dev/v1alpha1", "kind": "TrafficPolicy",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "targetRefs": [{"kind": "Service", "name": "web"}],
                "retry": {"attempts": attempts},
            },
        })
    };
    rig.apply(Kind::TrafficPolicy, policy(3));
    let mut good = rig.client(WEB).await;
    let mut bad = rig.client("shop/web/uid-web-2/node-a").await;
    good.subscribe("Service", &["cluster/shop/web@shop"]).await;
    bad.subscribe("Service", &["cluster/shop/web@shop"]).await;
    good.told().await;
    let refused = bad.response().await.unwrap();
    bad.answer(&refused, Some("routes[0]: not understood"))
        .await;
    bad.nothing_more().await;
    good.nothing_more().await;

    let key = ObjectKey::new(Kind::TrafficPolicy, "shop", "web");
    let shaped = rig.discovery.read(|model| model.shaped_by(&key));
    let adoption = rig.discovery.adoption(&shaped);
    assert_eq!(
        (adoption.watched, adoption.accepted, adoption.refused),
        (2, 1, 1)
    );
    let status = rig.discovery.status();
    let refusal = status.iter().find_map(|s| s.refusals.first()).unwrap();
    assert_eq!(refusal.message, "routes[0]: not understood");
    assert_eq!(refusal.resource, "cluster/shop/web@shop");
    let who = &adoption.refusals[0];
    assert_eq!(who.subscriber, "pod shop/uid-web-2");
    assert_eq!(who.message.as_deref(), Some("routes[0]: not understood"));

    rig.apply(Kind::TrafficPolicy, policy(4));
    bad.told().await;
    bad.nothing_more().await;
    let adoption = rig.discovery.adoption(&shaped);
    assert_eq!(
        (adoption.watched, adoption.accepted, adoption.refused),
        (2, 1, 0)
    );
    let status = rig.discovery.status();
    assert!(status.iter().all(|s| s.refusals.is_empty()));
}
