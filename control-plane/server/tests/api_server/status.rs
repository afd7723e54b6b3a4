//! What is said on policies and routes: the truth, in time, and once.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{sync::mpsc, task::JoinHandle};
use turnpike_rules::{
    pod::{PodEgress, PodNetwork},
    workload::SelfConfig,
};
use turnpike_wire::{
    ads::{self, ClientConfig, Subscription, Update},
    names::WILDCARD,
    resource::Resource,
};

use super::{
    apiserver::ApiServer,
    controller::{self, Controller},
};
use crate::common::eventually;

const WORLD: &str = "apiVersion: v1
kind: Node
metadata: {name: node-a}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: turnpike-node, namespace: turnpike-system}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: turnpike-gate, namespace: turnpike-system}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec:
  nodeName: node-a
  serviceAccountName: web
  initContainers: [{name: turnpike-proxy, image: proxy, restartPolicy: Always}]
  containers: [{name: app, image: app}]
---
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: turnpike-system}
spec:
  nodeName: node-a
  hostNetwork: true
  serviceAccountName: turnpike-node
  containers: [{name: agent, image: node}]
---
apiVersion: v1
kind: Pod
metadata: {name: gate, namespace: turnpike-system}
spec:
  nodeName: node-a
  hostNetwork: true
  serviceAccountName: turnpike-gate
  containers: [{name: gate, image: gate}]
";

/// A data plane's client, which refuses what it is told to refuse.
struct Proxy {
    task: JoinHandle<()>,
    refuses: Refuses,
    /// Open as long as the stream is wanted.
    _subscriptions: mpsc::Sender<Subscription>,
}

type Refuses = Arc<Mutex<Option<&'static str>>>;

struct Judge(Refuses);

impl ads::Handler for Judge {
    fn apply(&mut self, _: Update) -> Result<(), String> {
        match *self.0.lock().unwrap() {
            Some(reason) => Err(reason.to_owned()),
            None => Ok(()),
        }
    }
}

impl Proxy {
    async fn connect<R: Resource>(
        controller: &Controller,
        name: &str,
        token: &str,
        resource: &str,
    ) -> Self {
        let client = controller.client(name, token);
        let (subscriptions, wanted) = mpsc::channel(16);
        let refuses = Refuses::default();
        let config = ClientConfig::new(name, "cluster");
        let judge = Judge(refuses.clone());
        let task = tokio::spawn(ads::run(config, client, wanted, judge));
        let subscription = Subscription::subscribe(R::TYPE_URL, [resource]);
        subscriptions.send(subscription).await.unwrap();
        Self {
            task,
            refuses,
            _subscriptions: subscriptions,
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// `Accepted=True Accepted` and so on, with the object's generation all.
fn conditions(object: &Value, of: &Value) -> Vec<String> {
    let generation = &object["metadata"]["generation"];
    let conditions = of["conditions"].as_array().into_iter().flatten();
    conditions
        .filter(|condition| condition["observedGeneration"] == *generation)
        .map(|condition| {
            let text = |field: &str| condition[field].as_str().unwrap();
            format!("{}={} {}", text("type"), text("status"), text("reason"))
        })
        .collect()
}

fn message(object: &Value, kind: &str) -> String {
    let conditions = object["status"]["conditions"].as_array().unwrap();
    let found = conditions
        .iter()
        .find(|condition| condition["type"] == kind);
    found.unwrap()["message"].as_str().unwrap().to_owned()
}

/// Waits for a policy to say this of its generation; the object then.
fn says(api: &ApiServer, what: &str, expected: &[&str], proxies: &str) -> Value {
    eventually(&format!("{what} {expected:?} {proxies}"), || {
        let object = api.get("shop", what)?;
        let said = conditions(&object, &object["status"]);
        (said == expected && object["status"]["proxies"] == proxies).then_some(object)
    })
}

const TRUE: [&str; 2] = ["Accepted=True Accepted", "Programmed=True Programmed"];
const PENDING: [&str; 2] = ["Accepted=True Accepted", "Programmed=False Pending"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a real kube-apiserver: cargo verify kubernetes"]
async fn policies_say_what_became_of_them() {
    let api = ApiServer::start();
    controller::install(&api);
    api.install_crds();
    api.install_routes();
    api.namespace("shop", "");
    api.apply(WORLD);
    let mut controller = Controller::start(&api);

    let agent = egress_is_programmed_by_agent_and_gate(&api, &controller).await;
    a_refusal_is_told_with_its_words(&api, &controller).await;
    what_has_no_effect_says_why(&api);
    routes_say_it_of_each_parent(&api);
    what_does_not_change_is_not_written(&api, &mut controller);
    drop(agent);
}

async fn egress_is_programmed_by_agent_and_gate(
    api: &ApiServer,
    controller: &Controller,
) -> (Proxy, Proxy) {
    api.apply(
        "apiVersion: turnpike.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: e, namespace: \
         shop}\nspec: {selector: {matchLabels: {app: web}}, allow: []}\n",
    );
    let object = says(api, "egresspolicy/e", &PENDING, "0/2");
    let why = message(&object, "Programmed");
    assert!(
        why.starts_with("waiting for the agent of node-a, the gate of node-a"),
        "{why}"
    );
    let token = api.token("turnpike-system/agent", "turnpike-node", "istio-ca");
    let agent = Proxy::connect::<PodNetwork>(controller, "agent", &token, WILDCARD).await;
    let object = says(api, "egresspolicy/e", &PENDING, "1/2");
    assert!(message(&object, "Programmed").starts_with("waiting for the gate of node-a"));
    let token = api.token("turnpike-system/gate", "turnpike-gate", "istio-ca");
    let gate = Proxy::connect::<PodEgress>(controller, "gate", &token, WILDCARD).await;
    says(api, "egresspolicy/e", &TRUE, "2/2");

    let table = api.kubectl(&["get", "egresspolicies", "--namespace=shop"]);
    let words: Vec<&str> = table.split_whitespace().collect();
    assert_eq!(
        words[..9],
        [
            "NAME",
            "ACCEPTED",
            "PROGRAMMED",
            "PROXIES",
            "AGE",
            "e",
            "True",
            "True",
            "2/2"
        ]
    );
    let all = api.kubectl(&["get", "turnpike", "--all-namespaces", "--output=name"]);
    assert_eq!(all.trim(), "egresspolicy.turnpike.dev/e");
    (agent, gate)
}

async fn a_refusal_is_told_with_its_words(api: &ApiServer, controller: &Controller) {
    let policy = |ports: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: a, \
             namespace: shop}}\nspec: {{rules: [{{to: [{{operation: {{ports: [{ports}]}}}}]}}]}}\n"
        )
    };
    api.apply(&policy("8080"));
    let object = says(api, "authorizationpolicy/a", &TRUE, "0/0");
    assert!(message(&object, "Programmed").starts_with("no proxy that is connected needs it"));
    let token = api.token("shop/web-1", "web", "istio-ca");
    let uid = api.get("shop", "pod/web-1").unwrap()["metadata"]["uid"].clone();
    let uid = uid.as_str().unwrap();
    let sidecar = Proxy::connect::<SelfConfig>(controller, "web-1", &token, uid).await;
    says(api, "authorizationpolicy/a", &TRUE, "1/1");

    *sidecar.refuses.lock().unwrap() = Some("a port that I do not like");
    api.apply(&policy("8081"));
    let refused = ["Accepted=True Accepted", "Programmed=False Refused"];
    let object = says(api, "authorizationpolicy/a", &refused, "0/1");
    let why = message(&object, "Programmed");
    assert!(
        why.contains("web-1") && why.contains("a port that I do not like"),
        "{why}"
    );
    let accepted = |object: &Value| object["status"]["conditions"][0]["lastTransitionTime"].clone();
    *sidecar.refuses.lock().unwrap() = None;
    api.apply(&policy("8082"));
    let mended = says(api, "authorizationpolicy/a", &TRUE, "1/1");
    assert_eq!(
        accepted(&object),
        accepted(&mended),
        "it was accepted all the time"
    );
    drop(sidecar);
    says(api, "authorizationpolicy/a", &TRUE, "0/0");
}

fn what_has_no_effect_says_why(api: &ApiServer) {
    let traffic = "apiVersion: turnpike.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: t, \
                   namespace: shop}\nspec: {targetRefs: [{kind: Service, name: later}], retry: \
                   {attempts: 2}}\n";
    api.apply(traffic);
    let waiting = [
        "Accepted=False TargetNotFound",
        "Programmed=False NotAccepted",
    ];
    let object = says(api, "trafficpolicy/t", &waiting, "0/0");
    assert_eq!(
        message(&object, "Accepted"),
        "there is no Service `shop/later`; the policy waits for it"
    );
    api.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: later, namespace: shop}\nspec: {ports: \
         [{port: 80}]}\n",
    );
    says(api, "trafficpolicy/t", &TRUE, "0/0");

    // What CEL let pass and we refuse: said on the object itself, the last good version in force.
    let egress = "apiVersion: turnpike.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: e, \
                  namespace: shop}\nspec: {selector: {matchLabels: {app: web}}, allow: [{hosts: \
                  ['a..b'], ports: [{port: 443, protocol: TLS}]}]}\n";
    api.apply(egress);
    let invalid = ["Accepted=False Invalid", "Programmed=False NotAccepted"];
    let object = says(api, "egresspolicy/e", &invalid, "0/0");
    let why = message(&object, "Accepted");
    assert!(
        why.contains("spec.allow[0].hosts[0]")
            && why.contains("its last good version stays in force"),
        "{why}"
    );
    api.apply(&egress.replace("a..b", "a.example"));
    says(api, "egresspolicy/e", &TRUE, "2/2");
    // Not enforced yet, and so not accepted; it has no namespace.
    api.apply(
        "apiVersion: turnpike.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: {name: c}\nspec: \
         {default: []}\n",
    );
    says(api, "clusteregresspolicy/c", &invalid, "0/0");
    api.apply(
        "apiVersion: turnpike.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: \
         {meshPrefixes: [10.0.0.0/16]}\n",
    );
    eventually("the mesh's status", || {
        let object = api.get("", "meshconfig/default")?;
        (conditions(&object, &object["status"]) == TRUE).then_some(())
    });
}

fn routes_say_it_of_each_parent(api: &ApiServer) {
    let route = |path: &str, backend: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: r, namespace: shop}}
spec:
  parentRefs:
  - {{group: gateway.networking.k8s.io, kind: Gateway, name: edge}}
  - {{group: '', kind: Service, name: web, port: 80}}
  rules:
  - matches: [{{path: {{{path}}}}}]
    backendRefs: [{{name: {backend}, port: 80}}]
"
        )
    };
    let prefix = "type: PathPrefix, value: /";
    api.apply(&route(prefix, "web"));
    let expect = |expected: &[&str]| {
        eventually(&format!("{expected:?}"), || {
            let object = api.get("shop", "httproute/r")?;
            let parents = object["status"]["parents"].as_array()?;
            let mut ours = parents
                .iter()
                .filter(|p| p["controllerName"] == "turnpike.dev/controller");
            let (one, none) = (ours.next()?, ours.next());
            assert!(
                none.is_none() && one["parentRef"]["name"] == "web",
                "{parents:?}"
            );
            (conditions(&object, one) == expected).then(|| object.clone())
        })
    };
    let good = [
        "Accepted=True Accepted",
        "ResolvedRefs=True ResolvedRefs",
        "Programmed=True Programmed",
    ];
    let object = expect(&good);
    // A gateway's controller says its own beside ours.
    let theirs = json!({
        "parentRef": {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "edge"},
        "controllerName": "example.com/gateways",
        "conditions": [{"type": "Accepted", "status": "True", "reason": "Accepted", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z"}],
    });
    let mut parents = object["status"]["parents"].as_array().unwrap().clone();
    parents.insert(0, theirs.clone());
    let patch = json!({"status": {"parents": parents}}).to_string();
    let args = [
        "patch",
        "httproute",
        "r",
        "--namespace=shop",
        "--subresource=status",
        "--type=merge",
        "--patch",
        &patch,
    ];
    api.kubectl(&args);

    api.apply(&route("type: RegularExpression, value: /a.*", "web"));
    let refused = [
        "Accepted=False UnsupportedValue",
        "ResolvedRefs=True ResolvedRefs",
        "Programmed=False NotAccepted",
    ];
    let object = expect(&refused);
    assert_eq!(
        object["status"]["parents"][0], theirs,
        "theirs is not ours to touch"
    );
    api.apply(&route(prefix, "nobody"));
    expect(&[
        "Accepted=True Accepted",
        "ResolvedRefs=False BackendNotFound",
        "Programmed=True Programmed",
    ]);
    api.apply(&route(prefix, "web"));
    let object = expect(&good);
    assert_eq!(object["status"]["parents"][0], theirs);
}

/// Not while nothing happens, and not by a restart, which all come back from.
fn what_does_not_change_is_not_written(api: &ApiServer, controller: &mut Controller) {
    let versions = || {
        let all = [
            "egresspolicy/e",
            "authorizationpolicy/a",
            "trafficpolicy/t",
            "httproute/r",
        ];
        all.map(|what| api.get("shop", what).unwrap()["metadata"]["resourceVersion"].clone())
    };
    let before = versions();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(versions(), before);
    controller.kill();
    controller.spawn();
    controller.ready();
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(versions()[1..], before[1..], "nobody was told anything new");
}
