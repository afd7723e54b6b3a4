//! `helm upgrade` to another proxy, and `helm uninstall`: pods keep their network.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use turnpike_cluster::{Cluster, chart, images::TAGS, workloads};

use crate::{
    load::Load,
    roads::address,
    stage::{SOON, passes, passes_soon, soon},
};

const NAMESPACE: &str = "upgrade";

fn sidecar_image(pod: &Pod) -> Option<String> {
    let containers = pod.spec.as_ref()?.init_containers.as_ref()?;
    containers
        .iter()
        .find(|container| container.name == "turnpike-proxy")?
        .image
        .clone()
}

fn cast(cluster: &Cluster) -> Result<()> {
    let mut objects = vec![workloads::namespace(NAMESPACE, true)];
    objects.extend(workloads::web(NAMESPACE, "web", 2));
    objects.extend(workloads::client(NAMESPACE, "client", "client", "node-b"));
    cluster.kubectl.apply(&workloads::list(&objects))?;
    cluster.kubectl.rolled_out(NAMESPACE, "deploy/web", SOON)?;
    cluster
        .kubectl
        .wait(NAMESPACE, "pod/client", "condition=Ready", SOON)?;
    passes_soon(&cluster.kubectl, NAMESPACE, "client", "http://web/")
}

pub(crate) fn another_proxy(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let load = Load::start(kubectl, NAMESPACE, "client", "http://web/")?;
    let mut values = chart::values();
    values["images"] = serde_json::json!({"proxy": {"tag": TAGS[1]}});
    let said = cluster.helm_install("upgrade", &values)?;
    ensure!(said.ok, "helm upgrade: {}", said.all());
    kubectl.rolled_out(chart::NAMESPACE, "deploy/turnpike-controller", SOON)?;
    let old: Pod = kubectl.get(NAMESPACE, "client")?;
    ensure!(
        sidecar_image(&old).is_some_and(|image| image.ends_with(&format!(":{}", TAGS[0]))),
        "a running pod was changed"
    );
    // The old client calls new servers while they take the place of the old ones.
    kubectl.ok(&["-n", NAMESPACE, "rollout", "restart", "deploy/web"])?;
    kubectl.rolled_out(NAMESPACE, "deploy/web", SOON)?;
    soon(SOON, "every web pod has the new sidecar", || {
        let pods = kubectl.list::<Pod>(NAMESPACE, "app=web")?;
        Ok(pods.iter().all(|pod| {
            sidecar_image(pod).is_some_and(|image| image.ends_with(&format!(":{}", TAGS[1])))
        }))
    })?;
    load.stop_unharmed()?;
    Ok(())
}

pub(crate) fn uninstall(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let before: Pod = kubectl.get(NAMESPACE, "client")?;
    let said = cluster.helm_uninstall()?;
    ensure!(said.ok, "helm uninstall: {}", said.all());
    soon(SOON, "nothing of ours runs", || {
        Ok(kubectl
            .list::<Pod>(chart::NAMESPACE, "app.kubernetes.io/name=turnpike")?
            .is_empty())
    })?;
    let after: Pod = kubectl.get(NAMESPACE, "client")?;
    ensure!(address(&before)? == address(&after)?, "its address changed");
    // In the mesh, and beside it.
    ensure!(
        passes(kubectl, NAMESPACE, "client", &["http://web/"])?,
        "meshed pods lost their network"
    );
    if kubectl.run(&["-n", "plain", "get", "pod", "client"])?.ok {
        ensure!(
            passes(kubectl, "plain", "client", &["http://web.plain/"])?,
            "pods lost their network"
        );
    }
    std::thread::sleep(Duration::from_secs(1));
    kubectl
        .apply(&workloads::list(&workloads::client(
            NAMESPACE, "fresh", "client", "node-b",
        )))
        .context("a pod is made without the injector")?;
    let fresh: Pod = kubectl.get(NAMESPACE, "fresh")?;
    ensure!(sidecar_image(&fresh).is_none(), "a fresh pod was injected");
    Ok(())
}
