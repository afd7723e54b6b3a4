//! Pods on their way in, by the real API server's own calls of the webhook.

use std::{process::Command, time::Duration};

use serde_json::{Value, json};

use super::{
    apiserver::{ApiServer, Said},
    controller::{self, Controller},
};
use crate::common::eventually;

const LABEL: &str = "turnpike.dev/inject";

/// The chart's configuration; where there is no kube-proxy and no pod network, the API server
/// finds the injector by its name instead of its Service.
fn install_webhook(api: &ApiServer, controller: &Controller) {
    api.apply(&api.chart(&["webhook.yaml"]));
    let url = format!(
        "https://turnpike-controller.turnpike-system.svc:{}/inject",
        controller.webhook.port()
    );
    let patch = json!([
        {"op": "remove", "path": "/webhooks/0/clientConfig/service"},
        {"op": "add", "path": "/webhooks/0/clientConfig/url", "value": url},
    ]);
    patch_webhook(api, &patch);
}

fn patch_webhook(api: &ApiServer, patch: &Value) {
    let patch = format!("--patch={patch}");
    let webhook = "mutatingwebhookconfiguration/turnpike-injector";
    api.kubectl(&["patch", webhook, "--type=json", &patch]);
}

/// As Pod Security's `restricted` wants it.
fn pod(name: &str, namespace: &str, more: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{{name}, namespace: {namespace}, labels: {{app: web{more}}}}}
spec:
  securityContext: {{runAsNonRoot: true, runAsUser: 1000, seccompProfile: {{type: RuntimeDefault}}}}
  containers:
  - name: app
    image: app
    securityContext: {{allowPrivilegeEscalation: false, capabilities: {{drop: [ALL]}}}}
"
    )
}

fn created(said: &Said) -> String {
    assert!(said.ok, "{}", said.err);
    let name = said.out.split_whitespace().next().unwrap();
    name.to_owned()
}

fn init_containers(pod: &Value) -> Vec<&str> {
    let inits = pod["spec"]["initContainers"].as_array();
    inits
        .into_iter()
        .flatten()
        .map(|c| c["name"].as_str().unwrap())
        .collect()
}

fn bundle(api: &ApiServer) -> Option<String> {
    let found = api.get("", "mutatingwebhookconfiguration/turnpike-injector")?;
    let bundle = &found["webhooks"][0]["clientConfig"]["caBundle"];
    bundle
        .as_str()
        .filter(|text| !text.is_empty())
        .map(str::to_owned)
}

#[test]
#[ignore = "needs a real kube-apiserver: cargo verify kubernetes"]
fn the_api_server_has_pods_injected() {
    let api = ApiServer::start();
    controller::install(&api);
    api.install_crds();
    let controller = Controller::start(&api);
    let missing = eventually("what is missing is said", || {
        controller.rejections("MutatingWebhookConfiguration").pop()
    });
    assert!(
        missing.contains("it does not exist, so pods get no sidecar"),
        "{missing}"
    );
    install_webhook(&api, &controller);
    let first = eventually("the caBundle", || bundle(&api));
    let said = || controller.rejections("MutatingWebhookConfiguration");
    eventually("nothing more to say of it", || {
        said().is_empty().then_some(())
    });

    // Labelled and used in one breath: the API server knows of the label, the controller not yet.
    let restricted = "pod-security.kubernetes.io/enforce: restricted";
    for n in 0..10 {
        let namespace = format!("new-{n}");
        api.namespace(&namespace, &format!("{LABEL}: enabled, {restricted}"));
        let name = created(&api.try_create(&pod("generateName: web-", &namespace, "")));
        let made = api.get(&namespace, &name).unwrap();
        assert_eq!(init_containers(&made), ["turnpike-proxy"], "{namespace}");
        assert_eq!(made["spec"]["initContainers"][0]["restartPolicy"], "Always");
        assert_eq!(
            made["metadata"]["annotations"]["turnpike.dev/injected"],
            "true"
        );
    }
    who_goes_without_is_told(&api);
    who_was_there_before_the_label_is_told(&api);
    settings_are_followed(&api, &controller);
    the_bundle_is_kept(&api, &first);
    what_the_source_does_not_know_is_asked(&api, &controller);
    what_would_go_without_a_word_is_refused(&api);
    while_it_is_away_no_pod_starts_outside(&api, controller);
}

fn who_goes_without_is_told(api: &ApiServer) {
    api.namespace("shop", &format!("{LABEL}: enabled"));
    api.namespace("plain", "");
    let said = api.try_create(&pod("name: plain", "plain", ""));
    let made = api.get("plain", &created(&said)).unwrap();
    assert!(
        init_containers(&made).is_empty() && said.err.is_empty(),
        "{said:?}"
    );

    let said = api.try_create(&pod("name: out", "shop", &format!(", {LABEL}: disabled")));
    assert!(init_containers(&api.get("shop", &created(&said)).unwrap()).is_empty());
    let warning = "Warning: turnpike: pod out gets no sidecar: the pod's label";
    assert!(said.err.contains(warning), "{}", said.err);
    let host = pod("name: host", "shop", "").replace("spec:\n", "spec:\n  hostNetwork: true\n");
    let said = api.try_create(&host);
    assert!(
        said.ok
            && said
                .err
                .contains("Warning: turnpike: pod host gets no sidecar"),
        "{said:?}"
    );

    for (change, expected) in [
        ("runAsUser: 1337", "container `app` runs as user 1337"),
        ("runAsUser: 1000", ""),
    ] {
        let said =
            api.try_create(&pod("name: user", "shop", "").replace("runAsUser: 1000", change));
        assert_eq!(said.ok, expected.is_empty(), "{said:?}");
        assert!(said.err.contains(expected), "{said:?}");
    }
    let port = pod("name: port", "shop", "").replace(
        "image: app",
        "image: app\n    ports: [{containerPort: 15006}]",
    );
    let said = api.try_create(&port);
    let expected = "turnpike: container `app` uses port 15006, which the sidecar needs";
    assert!(!said.ok && said.err.contains(expected), "{said:?}");
}

fn who_was_there_before_the_label_is_told(api: &ApiServer) {
    api.namespace("old", "");
    let owned = |n: u32| {
        let owner = "ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-5d4, uid: \
                     aaaa-1, controller: true}]";
        let name = format!("name: web-5d4-{n}, {owner}");
        pod(&name, "old", ", pod-template-hash: 5d4")
    };
    for n in 0..5 {
        created(&api.try_create(&owned(n)));
    }
    created(&api.try_create(&pod("name: out", "old", &format!(", {LABEL}: disabled"))));
    let label = format!("{LABEL}=enabled");
    api.kubectl(&["label", "namespace", "old", &label]);
    let told = || {
        let events = api.get("old", "events").unwrap();
        let events = events["items"].as_array().unwrap().iter();
        let ours = events.filter(|event| event["reason"] == "OutsideMesh");
        ours.map(|event| {
            let text = |pointer: &str| event.pointer(pointer).unwrap().as_str().unwrap().to_owned();
            (
                text("/involvedObject/name"),
                text("/type"),
                text("/message"),
            )
        })
        .collect::<Vec<_>>()
    };
    let all = eventually("pods of the Deployment are told", || {
        Some(told()).filter(|t| t.len() >= 3)
    });
    let (name, kind, message) = &all[0];
    assert_eq!((&**name, &**kind), ("web-5d4-0", "Warning"));
    let restart = "restart it: kubectl --namespace old rollout restart deployment/web";
    assert!(message.ends_with(restart), "{message}");
    let described = api.kubectl(&["describe", "pod", "--namespace=old", "web-5d4-0"]);
    assert!(described.contains(restart), "{described}");
    std::thread::sleep(Duration::from_secs(8));
    assert_eq!(
        told().len(),
        3,
        "some of a workload, once, and not who opted out"
    );
}

fn settings_are_followed(api: &ApiServer, controller: &Controller) {
    let image = |name: &str| {
        let said = api.try_create(&pod(&format!("generateName: {name}-"), "shop", ""));
        let made = api.get("shop", &created(&said)).unwrap();
        made["spec"]["initContainers"][0]["image"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(image("before"), "turnpike/proxy:1");
    let write = |text: &str| std::fs::write(controller.path("inject.yaml"), text).unwrap();
    write("image: turnpike/proxy:2\n");
    eventually("the new image", || {
        (image("after") == "turnpike/proxy:2").then_some(())
    });
    write("image: turnpike/proxy:3\nmemoryLimit: much\n");
    let said = eventually("what is wrong", || {
        controller.rejections("injector settings").pop()
    });
    assert!(
        said.contains("`memoryLimit` is refused") && said.ends_with("stay in force"),
        "{said}"
    );
    assert_eq!(image("still"), "turnpike/proxy:2");
    write("image: turnpike/proxy:3\n");
    eventually("the next image", || {
        (image("next") == "turnpike/proxy:3").then_some(())
    });
    assert!(controller.rejections("injector settings").is_empty());
}

fn the_bundle_is_kept(api: &ApiServer, first: &str) {
    let patch = json!([{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}]);
    patch_webhook(api, &patch);
    eventually("the caBundle again", || {
        (bundle(api)? == first).then_some(())
    });
}

/// The API server knows of a label that the controller's watch has not brought.
fn what_the_source_does_not_know_is_asked(api: &ApiServer, controller: &Controller) {
    let rights = api.chart(&["rbac.yaml"]);
    let watched =
        "resources: [namespaces, serviceaccounts, services, pods]\n  verbs: [get, list, watch]";
    let with = |verbs: &str| {
        let others = watched.replace("namespaces, ", "");
        let only =
            format!("{others}\n- apiGroups: [\"\"]\n  resources: [namespaces]\n  verbs: [{verbs}]");
        assert!(rights.contains(watched), "{rights}");
        rights.replace(watched, &only)
    };
    api.apply(&with("get"));
    eventually("the watch of namespaces has ended", || {
        controller.rejections("namespaces  it cannot be read").pop()
    });
    api.namespace("unseen", &format!("{LABEL}: enabled"));
    let said = api.try_create(&pod("name: asked", "unseen", ""));
    let made = api.get("unseen", &created(&said)).unwrap();
    assert_eq!(init_containers(&made), ["turnpike-proxy"]);

    // Not even that may be asked: the pod does not start outside of the mesh.
    api.apply(&with("create"));
    let said = eventually("a denial", || {
        let said = api.try_create(&pod("generateName: unasked-", "unseen", ""));
        (!said.ok).then_some(said)
    });
    let expected = "turnpike: whether pods of the namespace unseen get a sidecar cannot be read";
    assert!(
        said.err.contains(expected) && said.err.contains("try again"),
        "{said:?}"
    );
    api.apply(&rights);
    eventually("pods again", || {
        api.try_create(&pod("generateName: again-", "unseen", ""))
            .ok
            .then_some(())
    });
}

/// By the API server itself, where no webhook is asked.
fn what_would_go_without_a_word_is_refused(api: &ApiServer) {
    let pods_label = format!(", {LABEL}: enabled");
    let wish = |name: &str| api.try_create(&pod(name, "plain", &pods_label));
    created(&wish("name: unheard"));
    api.apply(&api.chart(&["labels.yaml"]));
    let said = eventually("a wish that nobody hears is refused", || {
        Some(wish("generateName: wish-")).filter(|said| !said.ok)
    });
    let expected = "kubectl label namespace plain turnpike.dev/inject=enabled";
    assert!(said.err.contains(expected), "{said:?}");
    let said = api.try_create(&pod("name: wish", "shop", &pods_label));
    assert!(said.ok, "{said:?}");

    let debug = |namespace: &str, name: &str, user: u32| {
        let container = json!({
            "name": format!("debug-{user}"), "image": "app", "securityContext": {"runAsUser": user},
        });
        let patch = json!({"spec": {"ephemeralContainers": [container]}}).to_string();
        // Judged and not kept: what a policy that is not in force yet lets in would stay.
        let dry = "--dry-run=server";
        let mut line = vec![
            "patch",
            "pod",
            name,
            "--subresource=ephemeralcontainers",
            dry,
        ];
        let namespace = format!("--namespace={namespace}");
        line.extend([namespace.as_str(), "--patch", &patch]);
        api.try_kubectl(&line)
    };
    let said = eventually("the sidecar's user is refused", || {
        Some(debug("shop", "wish", 1337)).filter(|said| !said.ok)
    });
    assert!(said.err.contains("runs as user 1337"), "{said:?}");
    let said = debug("shop", "wish", 1000);
    assert!(said.ok, "{said:?}");
    let said = debug("plain", "unheard", 1337);
    assert!(said.ok, "it has no sidecar: {said:?}");
}

fn while_it_is_away_no_pod_starts_outside(api: &ApiServer, mut controller: Controller) {
    // As when another takes over: the API server may call this one for a little longer.
    // Not asked by kubectl, which on a busy machine takes longer than that.
    controller.terminate();
    eventually("it is told", || {
        controller.log().contains("stopping").then_some(())
    });
    let url = format!("https://{}/", controller.webhook);
    let line = ["-sk", "-o", "/dev/null", "-w", "%{http_code}", &url];
    let asked = Command::new("curl").args(line).output().unwrap();
    let status = String::from_utf8_lossy(&asked.stdout);
    assert_eq!(status, "404", "the injector has no such page, and says so");
    assert_eq!(controller.ended(), Some(0), "{}", controller.log());
    drop(controller);
    let said = api.try_create(&pod("name: alone", "shop", ""));
    assert!(
        !said.ok && said.err.contains("injector.turnpike.dev"),
        "{said:?}"
    );
    let said = api.try_create(&pod("name: other", "plain", ""));
    assert!(said.ok, "others are not concerned: {said:?}");
}
