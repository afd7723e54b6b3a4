//! Kubelet's probes: of all three kinds, in every mode, passing and failing as the application does.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::{core::v1::Pod, discovery::v1::EndpointSlice};
use turnpike_cluster::{Cluster, kubectl::name_of};

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
