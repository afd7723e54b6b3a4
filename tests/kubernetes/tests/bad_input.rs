//! What people do wrong: each time a message where they look, which says what to do.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use turnpike_cluster::{Cluster, Kubectl, Said, chart, images::TAGS, workloads};

use crate::{
    kills::{controller_replaced, ours},
    roads::web_pods,
    sidecars::{is_told, with_token},
    stage::{EFFECT, SOON, passes, passes_soon, soon},
};

const NAMESPACE: &str = "mistakes";

fn cast(cluster: &Cluster) -> Result<()> {
    let mut objects = vec![workloads::namespace(NAMESPACE, true)];
    objects.extend(workloads::web(NAMESPACE, "web", 1));
    objects.extend(workloads::client(NAMESPACE, "client", "client", "node-b"));
    cluster.kubectl.apply(&workloads::list(&objects))?;
    cluster.kubectl.rolled_out(NAMESPACE, "deploy/web", SOON)?;
    cluster
        .kubectl
        .wait(NAMESPACE, "pod/client", "condition=Ready", SOON)
}

/// A refusal that says all of this.
fn refused(said: &Said, words: &[&str]) -> Result<()> {
    ensure!(!said.ok, "it was accepted: {}", said.all());
    for word in words {
        ensure!(
            said.err.contains(word),
            "it does not say {word:?}: {}",
            said.all()
        );
    }
    Ok(())
}

fn pod(name: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut pod = workloads::client(NAMESPACE, name, "client", "node-b")
        .pop()
        .unwrap_or_default();
    change(&mut pod);
    pod.to_string()
}

pub(crate) fn labels(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let said = kubectl.run(&[
        "label",
        "--overwrite",
        "namespace",
        NAMESPACE,
        "turnpike.dev/inject=true",
    ])?;
    refused(&said, &["turnpike.dev/inject", "enabled", "disabled"])?;
    let said = kubectl.try_apply(&pod("misspelt", |pod| {
        pod["metadata"]["labels"]["turnpike.dev/inject"] = "no".into()
    }))?;
    refused(&said, &["turnpike.dev/inject", "enabled", "disabled"])?;
    // Opting out is a right; who does it is told what it means.
    let said = kubectl.try_apply(&pod("out", |pod| {
        pod["metadata"]["labels"]["turnpike.dev/inject"] = "disabled".into()
    }))?;
    ensure!(
        said.ok && said.err.contains("pod out gets no sidecar"),
        "{}",
        said.all()
    );
    let out: Pod = kubectl.get(NAMESPACE, "out")?;
    ensure!(
        out.spec
            .and_then(|spec| spec.init_containers)
            .unwrap_or_default()
            .is_empty(),
        "it was injected"
    );
    Ok(())
}

/// What ran before its namespace's label stays outside, and its user is told how to bring it in.
pub(crate) fn a_late_label(cluster: &mut Cluster) -> Result<()> {
    const LATE: &str = "late-label";
    let kubectl = &cluster.kubectl;
    let mut objects = vec![workloads::namespace(LATE, false)];
    objects.extend(workloads::web(LATE, "web", 1));
    kubectl.apply(&workloads::list(&objects))?;
    kubectl.rolled_out(LATE, "deploy/web", SOON)?;
    kubectl.ok(&["label", "namespace", LATE, "turnpike.dev/inject=enabled"])?;
    soon(EFFECT, "an event on its pod says what to do", || {
        let line = ["-n", LATE, "get", "events", "--field-selector"];
        let events = kubectl.ok(&[&line[..], &["reason=OutsideMesh"]].concat())?;
        Ok(events.contains("pod/web-") && events.contains("rollout restart deployment/web"))
    })?;
    kubectl.ok(&["-n", LATE, "rollout", "restart", "deployment/web"])?;
    kubectl.rolled_out(LATE, "deploy/web", SOON)?;
    soon(SOON, "that brings it in", || {
        let pods = web_pods(cluster, LATE)?;
        let inside = |pod: &Pod| {
            let spec = pod.spec.as_ref();
            spec.is_some_and(|spec| spec.init_containers.is_some())
        };
        Ok(!pods.is_empty() && pods.iter().all(inside))
    })
}

pub(crate) fn the_proxys_user(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let said = cluster.kubectl.try_apply(&pod("impostor", |pod| {
        pod["spec"]["securityContext"]["runAsUser"] = 1337.into()
    }))?;
    refused(&said, &["1337", "runAsUser"])
}

pub(crate) fn no_controller_yet(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let scale = |replicas: &str| {
        kubectl.ok(&[
            "-n",
            chart::NAMESPACE,
            "scale",
            "deploy/turnpike-controller",
            replicas,
        ])
    };
    scale("--replicas=0")?;
    soon(SOON, "the controller is gone", || {
        Ok(kubectl
            .list::<Pod>(chart::NAMESPACE, "app.kubernetes.io/component=controller")?
            .is_empty())
    })?;
    kubectl.apply(&workloads::list(
        &[
            vec![workloads::namespace("early", true)],
            workloads::web("early", "web", 1),
        ]
        .concat(),
    ))?;
    // The Deployment's user looks at its events.
    let told = soon(SOON, "events name the webhook that does not answer", || {
        let events = kubectl.ok(&["-n", "early", "get", "events"])?;
        Ok(events.contains("injector.turnpike.dev") && events.contains("turnpike-controller"))
    });
    scale("--replicas=1")?;
    told?;
    kubectl.rolled_out(chart::NAMESPACE, "deploy/turnpike-controller", SOON)?;
    // Nothing is to be done afterwards.
    kubectl.rolled_out("early", "deploy/web", Duration::from_secs(150))
}

pub(crate) fn a_wrong_image(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let mut values = chart::values();
    values["images"] = json!({"proxy": {"tag": "none"}});
    ensure!(cluster.helm_install("upgrade", &values)?.ok, "helm upgrade");
    controller_replaced(kubectl)?;
    let told = kubectl.apply(&pod("unlucky", |_| ())).and_then(|()| {
        soon(SOON, "events name the image", || {
            let events = kubectl.ok(&[
                "-n",
                NAMESPACE,
                "get",
                "events",
                "--field-selector",
                "involvedObject.name=unlucky",
            ])?;
            Ok(events.contains("turnpike/proxy:none"))
        })
    });
    let unlucky: Pod = kubectl.get(NAMESPACE, "unlucky")?;
    let application = unlucky
        .status
        .and_then(|status| status.container_statuses)
        .unwrap_or_default();
    ensure!(
        application
            .iter()
            .all(|status| status.started != Some(true)),
        "it runs without its sidecar"
    );
    kubectl.ok(&["-n", NAMESPACE, "delete", "pod", "unlucky"])?;
    values["images"] = json!({"proxy": {"tag": TAGS[0]}});
    ensure!(
        cluster.helm_install("upgrade", &values)?.ok,
        "helm upgrade back"
    );
    controller_replaced(kubectl)?;
    told
}

pub(crate) fn rights_taken_away(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    passes_soon(kubectl, NAMESPACE, "client", "http://web/")?;
    let binding = taken_away(kubectl)?;
    kubectl.ok(&[
        "-n",
        chart::NAMESPACE,
        "delete",
        "pod",
        "-l",
        "app.kubernetes.io/component=controller",
    ])?;
    let told = soon(SOON, "its log says what to grant", || {
        let log = kubectl.ok(&[
            "-n",
            chart::NAMESPACE,
            "logs",
            "-l",
            "app.kubernetes.io/component=controller",
            "--tail=200",
        ])?;
        Ok(log.contains("forbidden") && log.contains("grant"))
    });
    let serves = passes(kubectl, NAMESPACE, "client", &["http://web/"]);
    kubectl.apply(&binding)?;
    told?;
    ensure!(serves?, "what was running stopped");
    kubectl.rolled_out(chart::NAMESPACE, "deploy/turnpike-controller", SOON)
}

/// A controller that has read everything goes on when rights of it end; what it cannot do then, it
/// says. Here a team makes a namespace, which needs the mesh's root. It must learn of that, so the
/// rest of its rights stay: a watch is judged anew twice a minute.
pub(crate) fn rights_lost_while_it_runs(cluster: &mut Cluster) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let (pod, _) = ours(cluster, "controller", None)?;
    let said = ["newcomer", "forbidden", "grant"];
    let rights = without_config_maps(kubectl)?;
    let made = kubectl.apply(&workloads::namespace("newcomer", true).to_string());
    let told = made.and_then(|()| {
        soon(
            Duration::from_secs(30),
            "its log says what to grant",
            || {
                let log = kubectl.logs(chart::NAMESPACE, &pod, "controller")?;
                let mut lines = log.lines();
                Ok(lines.any(|line| said.iter().all(|word| line.contains(word))))
            },
        )
    });
    kubectl.apply(&rights)?;
    told?;
    soon(SOON, "the root is there when its rights are back", || {
        let line = ["-n", "newcomer", "get", "configmap", "turnpike-root"];
        Ok(kubectl.run(&line)?.ok)
    })?;
    let (now, _) = ours(cluster, "controller", None)?;
    ensure!(now == pod, "another controller runs: {now}");
    Ok(())
}

/// The controller's rights in the whole cluster are withdrawn; what gives them back.
fn taken_away(kubectl: &Kubectl) -> Result<String> {
    let binding = as_applied(kubectl, "clusterrolebinding")?;
    kubectl.ok(&["delete", "clusterrolebinding", "turnpike-controller"])?;
    Ok(binding.to_string())
}

/// Those to ConfigMaps alone; what gives them back.
fn without_config_maps(kubectl: &Kubectl) -> Result<String> {
    let role = as_applied(kubectl, "clusterrole")?;
    let mut less = role.clone();
    let rules = less["rules"].as_array_mut().context("its rules")?;
    let all = rules.len();
    rules.retain(|rule| rule["resources"] != json!(["configmaps"]));
    ensure!(rules.len() + 1 == all, "rights of another shape: {role}");
    kubectl.apply(&less.to_string())?;
    Ok(role.to_string())
}

/// One of the controller's objects, as it can be applied again.
fn as_applied(kubectl: &Kubectl, kind: &str) -> Result<Value> {
    let object = kubectl.ok(&["get", "-o", "json", kind, "turnpike-controller"])?;
    let mut object: Value = serde_json::from_str(&object)?;
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.retain(|name, _| ["name", "labels", "annotations"].contains(&name.as_str()));
    }
    Ok(object)
}

/// Signed as the cluster signs, and good but for its end.
pub(crate) fn an_expired_token(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let token = |expires: i64| token(cluster, expires);
    let good = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
        "spec": {"token": token(600)?, "audiences": ["istio-ca"]},
    });
    let said = kubectl.create(&good.to_string())?;
    let verdict: Value = serde_json::from_str(&said.out).with_context(|| said.all())?;
    ensure!(
        verdict["status"]["authenticated"] == true,
        "one that has not expired is not good: {verdict}"
    );
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"namespace": NAMESPACE, "name": "expired"},
        "stringData": {"token": token(-300)?},
    });
    kubectl.apply(&secret.to_string())?;
    let volume = json!({"secret": {"secretName": "expired"}});
    with_token(cluster, NAMESPACE, "late-riser", &volume)?;
    is_told(kubectl, NAMESPACE, "late-riser", "the token has expired")
}

/// A token of `client` that ends so many seconds from now.
fn token(cluster: &Cluster, expires: i64) -> Result<String> {
    let account = cluster
        .kubectl
        .json(NAMESPACE, &["serviceaccount", "client"])?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let now = i64::try_from(now.as_secs())?;
    cluster.token(&json!({
        "iss": "https://kubernetes.default.svc", "aud": ["istio-ca"],
        "sub": format!("system:serviceaccount:{NAMESPACE}:client"),
        "iat": now - 900, "nbf": now - 900, "exp": now + expires,
        "kubernetes.io": {
            "namespace": NAMESPACE,
            "serviceaccount": {"name": "client", "uid": account["metadata"]["uid"]},
        },
    }))
}
