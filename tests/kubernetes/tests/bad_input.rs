//! What people do wrong: each time a message where they look, which says what to do.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use turnpike_cluster::{Cluster, Said, chart, images::TAGS, workloads};

use crate::stage::{SOON, passes, passes_soon, soon};

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
    // Opting out is a right; who looks sees it on the pod.
    kubectl.apply(&pod("out", |pod| {
        pod["metadata"]["labels"]["turnpike.dev/inject"] = "disabled".into()
    }))?;
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
    kubectl.rolled_out("early", "deploy/web", std::time::Duration::from_secs(150))
}

pub(crate) fn a_wrong_image(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let mut values = chart::values();
    values["images"] = json!({"proxy": {"tag": "none"}});
    ensure!(cluster.helm_install("upgrade", &values)?.ok, "helm upgrade");
    kubectl.rolled_out(chart::NAMESPACE, "deploy/turnpike-controller", SOON)?;
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
    kubectl.rolled_out(chart::NAMESPACE, "deploy/turnpike-controller", SOON)?;
    told
}

pub(crate) fn rights_taken_away(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    passes_soon(kubectl, NAMESPACE, "client", "http://web/")?;
    let binding = kubectl.ok(&[
        "get",
        "clusterrolebinding",
        "turnpike-controller",
        "-o",
        "json",
    ])?;
    kubectl.ok(&["delete", "clusterrolebinding", "turnpike-controller"])?;
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
    let mut binding: Value = serde_json::from_str(&binding)?;
    if let Some(metadata) = binding["metadata"].as_object_mut() {
        metadata.retain(|name, _| ["name", "labels", "annotations"].contains(&name.as_str()));
    }
    kubectl.apply(&binding.to_string())?;
    told?;
    ensure!(serves?, "what was running stopped");
    kubectl.rolled_out(chart::NAMESPACE, "deploy/turnpike-controller", SOON)
}

pub(crate) fn a_token_that_is_no_longer_good(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    kubectl.apply(&workloads::list(&workloads::client(
        NAMESPACE, "orphan", "orphan", "node-b",
    )))?;
    kubectl.wait(NAMESPACE, "pod/orphan", "condition=Ready", SOON)?;
    passes_soon(kubectl, NAMESPACE, "orphan", "http://web/")?;
    // Its account is gone, and with it the token's worth; then the sidecar has to begin anew.
    kubectl.ok(&["-n", NAMESPACE, "delete", "serviceaccount", "orphan"])?;
    // The controller remembers a verdict for half a minute, the API server for ten seconds.
    std::thread::sleep(std::time::Duration::from_secs(45));
    cluster
        .node("node-b")?
        .kill_container(NAMESPACE, "orphan", "turnpike-proxy")?;
    let mut log = String::new();
    let told = soon(
        SOON,
        "the sidecar's log says that its token was refused",
        || {
            log = kubectl.logs(NAMESPACE, "orphan", "turnpike-proxy")?;
            let line = log.lines().find(|line| line.contains("token"));
            Ok(line.is_some())
        },
    );
    told.context(log)?;
    ensure!(
        !passes(kubectl, NAMESPACE, "orphan", &["http://web/"])?,
        "a sidecar without an identity lets calls out"
    );
    kubectl.ok(&["-n", NAMESPACE, "delete", "pod", "orphan"])?;
    Ok(())
}
