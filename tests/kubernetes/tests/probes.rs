//! Kubelet's probes: of all three kinds, in every mode, passing and failing as the application does.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::{core::v1::Pod, discovery::v1::EndpointSlice};
use serde_json::json;
use turnpike_cluster::{Cluster, kubectl::name_of, workloads};

use crate::{
    roads::{NAMESPACES, cast, web_pods},
    stage::{SOON, soon},
};

pub(crate) fn all_kinds(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    // That a pod is ready says that its TCP and HTTP probes pass; now they are made to fail.
    for (namespace, _) in NAMESPACES {
        let pod = name_of(web_pods(cluster, namespace)?.first().context("a pod")?);
        readiness(cluster, namespace, &pod)
            .with_context(|| format!("readiness by HTTP in {namespace}"))?;
        liveness(cluster, namespace, &pod)
            .with_context(|| format!("liveness by exec in {namespace}"))?;
    }
    tcp(cluster).context("readiness by TCP in strict")
}

/// Where every connection of others is the sidecar's to take, a port that nobody listens on is
/// still closed to kubelet.
fn tcp(cluster: &Cluster) -> Result<()> {
    const NAMESPACE: &str = "strict";
    let kubectl = &cluster.kubectl;
    let mut spec = workloads::web_pod("web");
    let container = &mut spec["containers"][0];
    // Beside the container's first process, so that it can stop alone.
    container["command"] = json!(["sh", "-c", "nginx -e /dev/stderr; sleep infinity"]);
    container["readinessProbe"] =
        json!({"tcpSocket": {"port": "http"}, "periodSeconds": 1, "failureThreshold": 2});
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": NAMESPACE, "name": "deaf", "labels": {"app": "deaf"}},
        "spec": spec,
    });
    kubectl.apply(&pod.to_string())?;
    kubectl.wait(NAMESPACE, "pod/deaf", "condition=Ready", SOON)?;
    for (line, condition) in [
        ("nginx -s stop", "condition=Ready=False"),
        // What it keeps open would keep the exec.
        (
            "nginx -e /dev/stderr > /dev/null 2>&1 < /dev/null",
            "condition=Ready",
        ),
    ] {
        let said = kubectl.exec(NAMESPACE, "deaf/nginx", &["sh", "-c", line])?;
        ensure!(said.ok, "{line}: {}", said.all());
        kubectl.wait(NAMESPACE, "pod/deaf", condition, Duration::from_secs(30))?;
    }
    ensure!(
        restarts(cluster, NAMESPACE, "deaf")? == 0,
        "it was started again"
    );
    kubectl.ok(&["-n", NAMESPACE, "delete", "pod", "deaf"])?;
    Ok(())
}

fn readiness(cluster: &Cluster, namespace: &str, pod: &str) -> Result<()> {
    let touch = |line: &[&str]| {
        cluster
            .kubectl
            .exec(namespace, &format!("{pod}/nginx"), line)
    };
    touch(&["touch", "/tmp/unready"])?;
    let limit = Duration::from_secs(20);
    soon(limit, "the pod leaves its Service", || {
        Ok(!serving(cluster, namespace, pod)?)
    })?;
    touch(&["rm", "/tmp/unready"])?;
    soon(limit, "the pod is back in its Service", || {
        serving(cluster, namespace, pod)
    })
}

/// Whether the Service's slices have the pod, as ready.
fn serving(cluster: &Cluster, namespace: &str, pod: &str) -> Result<bool> {
    let slices = cluster
        .kubectl
        .list::<EndpointSlice>(namespace, "kubernetes.io/service-name=web")?;
    let endpoints = slices.iter().flat_map(|slice| slice.endpoints.iter());
    let named = |endpoint: &k8s_openapi::api::discovery::v1::Endpoint| {
        endpoint
            .target_ref
            .as_ref()
            .and_then(|target| target.name.as_deref())
            == Some(pod)
    };
    Ok(endpoints
        .filter(|endpoint| named(endpoint))
        .any(|endpoint| endpoint.conditions.as_ref().and_then(|c| c.ready) == Some(true)))
}

fn liveness(cluster: &Cluster, namespace: &str, pod: &str) -> Result<()> {
    let before = restarts(cluster, namespace, pod)?;
    let said = cluster
        .kubectl
        .exec(namespace, &format!("{pod}/nginx"), &["touch", "/tmp/dead"])?;
    ensure!(said.ok, "{}", said.all());
    soon(SOON, "kubelet starts it again", || {
        Ok(restarts(cluster, namespace, pod)? > before)
    })?;
    cluster
        .kubectl
        .wait(namespace, &format!("pod/{pod}"), "condition=Ready", SOON)
}

fn restarts(cluster: &Cluster, namespace: &str, pod: &str) -> Result<i32> {
    let pod: Pod = cluster.kubectl.get(namespace, pod)?;
    let statuses = pod
        .status
        .and_then(|status| status.container_statuses)
        .unwrap_or_default();
    let nginx = statuses.iter().find(|status| status.name == "nginx");
    Ok(nginx.context("a container nginx")?.restart_count)
}
