//! Gateway API's HTTPRoute for the mesh: splits, retries, and a status that is true.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use turnpike_cluster::{Cluster, kubectl::name_of, workloads};

use crate::{
    roads::web_pods,
    stage::{EFFECT, SOON, curl, soon},
};

const NAMESPACE: &str = "routes";

fn cast(cluster: &Cluster) -> Result<()> {
    let mut objects = vec![workloads::namespace(NAMESPACE, true)];
    objects.extend(workloads::web(NAMESPACE, "web", 2));
    objects.extend(workloads::web(NAMESPACE, "old", 1));
    objects.extend(workloads::web(NAMESPACE, "new", 1));
    objects.extend(workloads::client(NAMESPACE, "client", "client", "node-b"));
    cluster.kubectl.apply(&workloads::list(&objects))?;
    for name in ["web", "old", "new"] {
        cluster
            .kubectl
            .rolled_out(NAMESPACE, &format!("deploy/{name}"), SOON)?;
    }
    cluster
        .kubectl
        .wait(NAMESPACE, "pod/client", "condition=Ready", SOON)
}

fn route(name: &str, rule: &Value) -> String {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"namespace": NAMESPACE, "name": name},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": name, "port": 80}],
            "rules": [rule],
        },
    })
    .to_string()
}

pub(crate) fn split_and_retry(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    split(cluster).context("90/10")?;
    retry(cluster).context("retries")
}

fn split(cluster: &Cluster) -> Result<()> {
    ensure!(
        share(cluster)? == 0,
        "before the route, `old` is `old` alone"
    );
    cluster.kubectl.apply(&route("old", &split_rule()))?;
    says(cluster, "old", "Accepted", "True")?;
    says(cluster, "old", "Programmed", "True")?;
    ten_percent(cluster)
}

/// The sidecar that calls stands still while a route is made: it is not programmed, however well
/// all others have it, and says so until that one has it.
pub(crate) fn programmed_truly(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let _ = kubectl.run(&["-n", NAMESPACE, "delete", "httproute", "old"])?;
    soon(EFFECT, "without a route `old` is `old` alone", || {
        Ok(share(cluster)? == 0)
    })?;
    let node = cluster.node("node-b")?;
    let paused = node.pause_container(NAMESPACE, "client", "turnpike-proxy")?;
    kubectl.apply(&route("old", &split_rule()))?;
    let (_, reason) = found(cluster, "old", "Programmed", "False")?;
    ensure!(reason == "Pending", "not programmed by reason {reason:?}");
    // Others acknowledge it meanwhile. Much longer, and its connection would be given up.
    std::thread::sleep(Duration::from_secs(2));
    let (_, reason) = found_within(cluster, "old", "Programmed", "False", Duration::ZERO)?;
    ensure!(reason == "Pending", "not programmed by reason {reason:?}");
    drop(paused);
    says(cluster, "old", "Programmed", "True")?;
    ten_percent(cluster)
}

fn split_rule() -> Value {
    json!({"backendRefs": [
        {"name": "old", "port": 80, "weight": 90}, {"name": "new", "port": 80, "weight": 10},
    ]})
}

fn ten_percent(cluster: &Cluster) -> Result<()> {
    // Programmed means that it holds now. Of 200, 20 are expected; 5 and 40 are each beyond three
    // and a half times the deviation.
    let share = share(cluster)?;
    ensure!(
        (5..=40).contains(&share),
        "{share} of 200 requests reached the 10% side"
    );
    Ok(())
}

/// How many of 200 requests to `old` the pods of `new` answer.
fn share(cluster: &Cluster) -> Result<usize> {
    let said = cluster.kubectl.exec(
        NAMESPACE,
        "client/curl",
        &["curl", "-s", "--max-time", "60", "http://old/?[1-200]"],
    )?;
    let answers = said
        .out
        .lines()
        .filter(|line| line.contains("the way is free"))
        .count();
    ensure!(
        answers == 200,
        "{answers} of 200 were answered: {}",
        said.all()
    );
    Ok(said
        .out
        .lines()
        .filter(|line| line.starts_with("new-"))
        .count())
}

fn retry(cluster: &Cluster) -> Result<()> {
    let pod = name_of(web_pods(cluster, NAMESPACE)?.first().context("a pod")?);
    cluster.kubectl.exec(
        NAMESPACE,
        &format!("{pod}/nginx"),
        &["touch", "/tmp/broken"],
    )?;
    ensure!(
        failures(cluster)? > 0,
        "one of two endpoints answers 503, and nothing is retried yet"
    );
    let rule = json!({"retry": {"codes": [503], "attempts": 3, "backoff": "10ms"}, "backendRefs": [{"name": "web", "port": 80}]});
    cluster.kubectl.apply(&route("web", &rule))?;
    says(cluster, "web", "Programmed", "True")?;
    let failed = failures(cluster)?;
    ensure!(
        failed == 0,
        "{failed} of 60 requests failed although they are retried"
    );
    cluster
        .kubectl
        .exec(NAMESPACE, &format!("{pod}/nginx"), &["rm", "/tmp/broken"])?;
    Ok(())
}

fn failures(cluster: &Cluster) -> Result<usize> {
    let line = [
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}\n",
        "--max-time",
        "60",
        "http://web/flaky?[1-60]",
    ];
    let said = cluster.kubectl.exec(NAMESPACE, "client/curl", &line)?;
    ensure!(said.out.lines().count() == 60, "{}", said.all());
    Ok(said.out.lines().filter(|status| *status != "200").count())
}

/// Waits for a condition of a route; its message.
fn says(cluster: &Cluster, name: &str, condition: &str, status: &str) -> Result<String> {
    Ok(found(cluster, name, condition, status)?.0)
}

/// As [`says`]: its message and its reason.
fn found(cluster: &Cluster, name: &str, kind: &str, status: &str) -> Result<(String, String)> {
    found_within(cluster, name, kind, status, EFFECT)
}

fn found_within(
    cluster: &Cluster,
    name: &str,
    condition: &str,
    status: &str,
    limit: Duration,
) -> Result<(String, String)> {
    let (mut message, mut reason) = (String::new(), String::new());
    let what = format!("{name} says {condition} {status}");
    let said = soon(limit, &what, || {
        let object = cluster.kubectl.json(NAMESPACE, &["httproute", name])?;
        let generation = &object["metadata"]["generation"];
        let parents = object["status"]["parents"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let mut conditions = parents
            .iter()
            .flat_map(|parent| parent["conditions"].as_array().cloned().unwrap_or_default());
        let found = conditions.rfind(|c| {
            c["type"] == condition
                && c["status"] == status
                && c["observedGeneration"] == *generation
        });
        let text = |field: &str| {
            let text = found.as_ref().and_then(|c| c[field].as_str());
            text.unwrap_or_default().to_owned()
        };
        (message, reason) = (text("message"), text("reason"));
        Ok(found.is_some())
    });
    said.with_context(|| {
        cluster
            .kubectl
            .run(&["-n", NAMESPACE, "get", "httproute", name, "-o", "yaml"])
            .map_or_else(|e| e.to_string(), |said| said.all())
    })?;
    Ok((message, reason))
}

pub(crate) fn broken(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    // One that Kubernetes takes and the mesh cannot follow: its backend does not exist.
    let rule = json!({"backendRefs": [{"name": "nowhere", "port": 80}]});
    cluster.kubectl.apply(&route("new", &rule))?;
    let message = says(cluster, "new", "ResolvedRefs", "False")?;
    ensure!(
        message.contains("nowhere"),
        "the message does not name what is missing: {message:?}"
    );
    soon(EFFECT, "calls under it fail", || {
        let said = curl(&cluster.kubectl, NAMESPACE, "client", &["http://new/"])?;
        Ok(said.out == "500")
    })?;
    cluster
        .kubectl
        .ok(&["-n", NAMESPACE, "delete", "httproute", "new"])?;

    // One whose meaning we refuse: what was in force stays in force.
    let before = json!({"backendRefs": [{"name": "new", "port": 80}]});
    cluster.kubectl.apply(&route("web", &before))?;
    says(cluster, "web", "Programmed", "True")?;
    all_from_new(cluster).context("before the broken version")?;
    let unsupported = json!({
        "filters": [{"type": "ExtensionRef", "extensionRef": {"group": "example.org", "kind": "Filter", "name": "x"}}],
        "backendRefs": [{"name": "web", "port": 80}],
    });
    cluster.kubectl.apply(&route("web", &unsupported))?;
    let message = says(cluster, "web", "Accepted", "False")?;
    ensure!(
        message.contains("ExtensionRef") || message.contains("extensionRef"),
        "it does not say why: {message:?}"
    );
    all_from_new(cluster).context("the broken version changed what was in force")?;
    cluster.kubectl.apply(&route("web", &before))?;
    says(cluster, "web", "Accepted", "True")?;

    // What the schema refuses is said by kubectl at once.
    let refused = cluster.kubectl.try_apply(&route(
        "web",
        &json!({"backendRefs": [{"name": "web", "port": 80, "weight": -1}]}),
    ))?;
    ensure!(
        !refused.ok && refused.err.contains("weight"),
        "{}",
        refused.all()
    );
    Ok(())
}

/// The route in force sends calls to `web` to the pods of `new`: 20 of 20.
fn all_from_new(cluster: &Cluster) -> Result<()> {
    let line = ["curl", "-s", "--max-time", "20", "http://web/?[1-20]"];
    let said = cluster.kubectl.exec(NAMESPACE, "client/curl", &line)?;
    let new = said.out.lines().filter(|line| line.starts_with("new-"));
    let count = new.count();
    ensure!(count == 20, "{count} of 20 came from `new`: {}", said.all());
    Ok(())
}
