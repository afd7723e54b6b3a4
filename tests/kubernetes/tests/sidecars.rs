//! A labelled namespace: native sidecars under Pod Security's `restricted`, and whom they speak for.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use turnpike_cluster::{Cluster, kubectl::name_of};

use crate::{
    roads::{cast, web_pods},
    stage::{EFFECT, curl, soon},
};

const SIDECAR: &str = "turnpike-proxy";

pub(crate) fn injected(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    for pod in web_pods(cluster, "mesh")? {
        native_sidecar(&pod).with_context(|| name_of(&pod))?;
    }
    for pod in web_pods(cluster, "plain")? {
        let containers = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.init_containers.clone())
            .unwrap_or_default();
        ensure!(
            containers.is_empty(),
            "{} of an unlabelled namespace was changed",
            name_of(&pod)
        );
    }
    // The namespace does enforce `restricted`: what is not within it is refused by its rule.
    let refused = cluster.kubectl.run(&[
        "-n",
        "mesh",
        "run",
        "root",
        "--image=registry.local/workloads/busybox:1",
        "--restart=Never",
    ])?;
    ensure!(
        !refused.ok && refused.err.contains("PodSecurity"),
        "{}",
        refused.all()
    );
    Ok(())
}

fn native_sidecar(pod: &Pod) -> Result<()> {
    let spec = pod.spec.clone().unwrap_or_default();
    let first = spec
        .init_containers
        .unwrap_or_default()
        .into_iter()
        .next()
        .context("an init container")?;
    ensure!(
        first.name == SIDECAR,
        "the first init container is {}",
        first.name
    );
    ensure!(
        first.restart_policy.as_deref() == Some("Always"),
        "it is no native sidecar"
    );
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.init_container_statuses.clone())
        .unwrap_or_default();
    let status = statuses
        .iter()
        .find(|status| status.name == SIDECAR)
        .context("a status")?;
    ensure!(status.ready && status.started == Some(true), "{status:?}");
    let audience = spec
        .volumes
        .iter()
        .flatten()
        .flat_map(|volume| {
            volume
                .projected
                .iter()
                .flat_map(|projected| projected.sources.iter().flatten())
        })
        .find_map(|source| {
            source
                .service_account_token
                .as_ref()
                .and_then(|token| token.audience.clone())
        });
    ensure!(
        audience.as_deref() == Some("istio-ca"),
        "the token's audience is {audience:?}"
    );
    Ok(())
}

pub(crate) fn identity(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let (client, server) = (
        "spiffe://cluster.local/ns/mesh/sa/client",
        "spiffe://cluster.local/ns/mesh/sa/web",
    );
    ensure!(
        curl(
            &cluster.kubectl,
            "mesh",
            "client",
            &["http://web.mesh/identity"]
        )?
        .out == "200",
        "a call to be named"
    );
    soon(EFFECT, "each side's access log names the other", || {
        let caller = cluster.kubectl.logs("mesh", "client", SIDECAR)?;
        let mut served = String::new();
        for pod in web_pods(cluster, "mesh")? {
            served.push_str(&cluster.kubectl.logs("mesh", &name_of(&pod), SIDECAR)?);
        }
        let says = |log: &str, who: &str| {
            log.lines()
                .any(|line| line.contains("/identity") && line.contains(who))
        };
        Ok(says(&caller, server) && says(&served, client))
    })?;
    refused_token(cluster)
}

/// A pod whose token is of another audience gets no identity, and its user is told why.
fn refused_token(cluster: &Cluster) -> Result<()> {
    let authority = cluster.kubectl.json(
        turnpike_cluster::chart::NAMESPACE,
        &["configmap", "turnpike-root"],
    )?;
    let root = authority["data"]["root.pem"]
        .as_str()
        .context("the root's certificate")?;
    ensure!(root.contains("BEGIN CERTIFICATE"), "{root}");
    for namespace in ["plain", "mesh", "strict"] {
        let copy = cluster
            .kubectl
            .json(namespace, &["configmap", "turnpike-root"])?;
        ensure!(
            copy["data"] == authority["data"],
            "the root in {namespace} is another"
        );
    }
    // One made now has it at once: a pod that is made with it does not wait.
    cluster
        .kubectl
        .apply(&turnpike_cluster::workloads::namespace("later", true).to_string())?;
    soon(
        Duration::from_secs(10),
        "the root in a namespace made later",
        || {
            Ok(cluster
                .kubectl
                .run(&["-n", "later", "get", "configmap", "turnpike-root"])?
                .ok)
        },
    )
}
