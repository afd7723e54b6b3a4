//! A policy changes: from a file to the subscribers of the real executable.
#![allow(clippy::unwrap_used, reason = "what fails here ends the test")]

mod common;
mod rig;

use std::collections::BTreeMap;

use common::{PATIENCE, eventually};
use rig::{Rig, claims, pod, service};
use tokio::{sync::mpsc, time::timeout};
use turnpike_rules::{
    pod::PodNetwork,
    service::Service,
    workload::{MtlsMode, SelfConfig},
};
use turnpike_wire::{
    ads::{self, ClientConfig, Subscription, Update},
    resource::Resource,
};

/// A client of the kind that sidecars, agents and gates have.
struct Subscriber {
    subscriptions: mpsc::Sender<Subscription>,
    updates: mpsc::UnboundedReceiver<Update>,
    task: tokio::task::JoinHandle<()>,
}

struct Collect(mpsc::UnboundedSender<Update>);

impl ads::Handler for Collect {
    fn apply(&mut self, update: Update) -> Result<(), String> {
        self.0.send(update).map_err(|error| error.to_string())
    }
}

impl Subscriber {
    async fn new(rig: &Rig, account: &str, pod: &str) -> Self {
        let (namespace, name) = account.split_once('/').unwrap();
        let token = rig.issuer.sign(&claims(namespace, name, pod, "node-a"));
        let controller = rig.client(pod, &token);
        let (subscriptions, wanted) = mpsc::channel(16);
        let (collected, updates) = mpsc::unbounded_channel();
        let config = ClientConfig::new(pod, "cluster");
        let task = tokio::spawn(ads::run(config, controller, wanted, Collect(collected)));
        Self {
            subscriptions,
            updates,
            task,
        }
    }

    async fn subscribe<R: Resource>(&self, names: &[&str]) {
        let names = names.iter().map(|name| (*name).to_owned());
        let subscription = Subscription::subscribe(R::TYPE_URL, names);
        self.subscriptions.send(subscription).await.unwrap();
    }

    async fn update(&mut self) -> Update {
        timeout(PATIENCE, self.updates.recv())
            .await
            .expect("no update")
            .unwrap()
    }

    /// One resource, alone in its update.
    async fn one<R: Resource>(&mut self) -> R {
        let update = self.update().await;
        assert_eq!(
            (update.added.len(), update.removed.len()),
            (1, 0),
            "{update:?}"
        );
        let added = &update.added[0];
        R::decode(&added.name, &added.bytes).unwrap()
    }

    /// Proves that nothing else came before the answer to what is asked now.
    async fn nothing_more(&mut self) {
        self.subscribe::<Service>(&["cluster/none/none"]).await;
        let update = self.update().await;
        assert_eq!(update.removed, ["cluster/none/none"], "{update:?}");
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn world() -> String {
    let parts = [
        service("web"),
        service("api").replace("10.96.0.1", "10.96.0.2"),
        pod("web-1", "web", "node-a", "10.0.0.1"),
        pod("api-1", "api", "node-b", "10.0.0.2"),
    ];
    parts.join("---\n")
}

fn traffic(service: &str, attempts: &str) -> String {
    format!(
        "apiVersion: turnpike.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {service}, namespace: shop}}
spec:
  targetRefs: [{{kind: Service, name: {service}}}]
  retry: {{attempts: {attempts}}}
"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_reaches_exactly_those_it_touches() {
    let rig = Rig::start(&world());
    let mut web = Subscriber::new(&rig, "shop/web", "web-1").await;
    web.subscribe::<SelfConfig>(&["uid-web-1"]).await;
    let own: SelfConfig = web.one().await;
    assert_eq!(own.backs.len(), 1);
    web.subscribe::<Service>(&["cluster/shop/web@shop", "cluster/shop/api@shop"])
        .await;
    assert_eq!(web.update().await.added.len(), 2);

    rig.write("policy.yaml", &traffic("api", "5"));
    let api: Service = web.one().await;
    assert_eq!((&*api.key.name, api.traffic.retry.attempts), ("api", 5));
    rig.write("policy.yaml", &traffic("api", "6"));
    assert_eq!(web.one::<Service>().await.traffic.retry.attempts, 6);
    web.nothing_more().await;

    rig.write(
        "strict.yaml",
        "apiVersion: turnpike.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}
",
    );
    assert_eq!(web.one::<SelfConfig>().await.mtls, MtlsMode::Strict);
    std::fs::remove_file(rig.path("source/strict.yaml")).unwrap();
    assert_eq!(web.one::<SelfConfig>().await.mtls, MtlsMode::Permissive);
    web.nothing_more().await;

    let status = rig.json("/debug/status");
    let policy = status["policies"].as_array().unwrap();
    assert_eq!(policy[0]["object"], "TrafficPolicy shop/api");
    assert_eq!(policy[0]["proxies"]["accepted"], 1, "{policy:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_file_is_quarantined_alone_and_changes_nothing() {
    let rig = Rig::start(&world());
    rig.write("policy.yaml", &traffic("web", "3"));
    let mut web = Subscriber::new(&rig, "shop/web", "web-1").await;
    web.subscribe::<Service>(&["cluster/shop/web@shop"]).await;
    // The policy may come right behind the first answer.
    while web.one::<Service>().await.traffic.retry.attempts != 3 {}

    rig.write("policy.yaml", &traffic("web", "many"));
    let rejections = eventually("the rejection", || {
        let all = rig.json("/debug/rejections").as_array().unwrap().clone();
        (!all.is_empty()).then_some(all)
    });
    assert_eq!(rejections.len(), 1);
    let rejection = &rejections[0];
    assert!(
        rejection["file"].as_str().unwrap().ends_with("policy.yaml"),
        "{rejection}"
    );
    assert_eq!(rejection["line"], 6, "{rejection}");
    assert_eq!(rejection["field"], "spec.retry.attempts", "{rejection}");
    assert_eq!(rig.metric("turnpike_rejected_objects"), Some(1.0));
    assert!(rig.log().contains("policy.yaml:6"), "{}", rig.log());
    web.nothing_more().await;

    // What else changes still takes effect, and so does the file when it is mended.
    rig.write("more.yaml", &pod("web-2", "web", "node-a", "10.0.0.3"));
    rig.write("policy.yaml", &traffic("web", "4"));
    assert_eq!(web.one::<Service>().await.traffic.retry.attempts, 4);
    eventually("the end of the quarantine", || {
        rig.json("/debug/rejections")
            .as_array()
            .unwrap()
            .is_empty()
            .then_some(())
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_the_state_is_rebuilt_and_nothing_is_sent_twice() {
    let mut rig = Rig::start(&world());
    let mut agent = Subscriber::new(&rig, "turnpike-system/turnpike-node", "agent").await;
    agent.subscribe::<PodNetwork>(&["*"]).await;
    assert_eq!(&*agent.one::<PodNetwork>().await.name, "web-1");
    let address = rig.client("agent", "").address;
    rig.kill();
    rig.write("more.yaml", &pod("web-2", "web", "node-a", "10.0.0.3"));
    // The token file was emptied above; the client reads it at each connection.
    let token = rig.issuer.sign(&claims(
        "turnpike-system",
        "turnpike-node",
        "agent",
        "node-a",
    ));
    std::fs::write(rig.path("token-agent"), token).unwrap();
    rig.relaunch_at(&address);
    assert_eq!(
        &*agent.one::<PodNetwork>().await.name,
        "web-2",
        "web-1 is held already"
    );
    rig.terminate();
    assert_eq!(rig.ended(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_without_the_right_to_it_is_refused_with_the_rule() {
    let rig = Rig::start(&world());
    let web = Subscriber::new(&rig, "shop/web", "web-1").await;
    web.subscribe::<SelfConfig>(&["uid-api-1"]).await;
    eventually("the refusal", || {
        let log = rig.log();
        log.contains("Self `uid-api-1` is refused to spiffe://cluster.local/ns/shop/sa/web")
            .then_some(())
    });
    assert!(rig.metric("turnpike_discovery_denied_total").unwrap() >= 1.0);
    drop(web);
}

#[test]
fn a_policy_without_effect_is_logged_until_it_has_one() {
    let rig = Rig::start(&world());
    let said = |text: &str| {
        eventually(text, || rig.log().contains(text).then_some(()));
    };
    said("no meshPrefixes are set");
    rig.write("policy.yaml", &traffic("cart", "2"));
    said("TrafficPolicy shop/cart: not Accepted: there is no Service `shop/cart`");
    rig.write("cart.yaml", &service("cart"));
    said("TrafficPolicy shop/cart: Accepted now");
}

/// Also with nobody connected, who would keep it from ending in another order. Which of two things that
/// are due comes first is chance: hence again and again.
#[test]
fn told_to_stop_it_ends_in_order() {
    let mut rig = Rig::prepare(&world());
    for times in 1..=8 {
        rig.launch();
        rig.terminate();
        assert_eq!(rig.ended(), Some(0));
        assert_eq!(rig.log().matches("\"stopping\"").count(), times);
    }
}

#[test]
fn pages_say_what_they_are_for() {
    let rig = Rig::start(&world());
    assert_eq!(rig.get("/healthz/live").0, 200);
    assert_eq!(rig.get("/nowhere").0, 404);
    let metrics = rig.get("/metrics").1;
    for name in [
        "turnpike_ca_issued_total",
        "turnpike_discovery_subscribers",
        "turnpike_discovery_pushes_total",
        "turnpike_discovery_nacks_total",
        "turnpike_rejected_objects",
        "turnpike_synced 1",
    ] {
        assert!(metrics.contains(name), "{name} is missing:\n{metrics}");
    }
    let _: BTreeMap<String, serde_json::Value> =
        serde_json::from_value(rig.json("/debug/status")).unwrap();
}
