//! A labelled namespace: native sidecars under Pod Security's `restricted`, and whom they speak for.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use turnpike_cluster::{
    Cluster, chart,
    kubectl::{Kubectl, name_of},
    workloads,
};

use crate::{
    roads::{cast, web_pods},
    stage::{EFFECT, SOON, curl, soon},
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
    root_everywhere(cluster)
}

/// The authority's certificate is in every namespace, also in one that is made now.
fn root_everywhere(cluster: &Cluster) -> Result<()> {
    let authority = cluster
        .kubectl
        .json(chart::NAMESPACE, &["configmap", "turnpike-root"])?;
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
    // A pod that is made together with its namespace does not wait long.
    cluster
        .kubectl
        .apply(&workloads::namespace("later", true).to_string())?;
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

/// A sidecar that speaks with a token for somebody else is told so, and gets no identity.
pub(crate) fn another_audience(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let token = json!({"projected": {"sources": [
        {"serviceAccountToken": {"audience": "other", "path": "token"}},
    ]}});
    with_token(cluster, "mesh", "other-audience", &token)?;
    is_told(
        &cluster.kubectl,
        "mesh",
        "other-audience",
        "the token is not meant for `istio-ca`",
    )
}

/// A pod that opts out of injection and has a sidecar all the same: as one is injected, but with
/// this volume for its token.
pub(crate) fn with_token(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    token: &Value,
) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut pod = workloads::client(namespace, name, "client", "node-b")
        .pop()
        .context("a pod")?;
    let said = kubectl.dry_run(&pod.to_string())?;
    ensure!(said.ok, "{}", said.all());
    let mut injected: Value = serde_json::from_str(&said.out)?;
    let ours = |volume: &Value| {
        let name = volume["name"].as_str();
        name.is_some_and(|name| name.starts_with("turnpike-"))
    };
    let mut sidecar = injected["spec"]["initContainers"][0].take();
    ensure!(sidecar["name"] == SIDECAR, "{sidecar}");
    for list in [
        &mut sidecar["volumeMounts"],
        &mut injected["spec"]["volumes"],
    ] {
        list.as_array_mut().context("a list")?.retain(ours);
    }
    for volume in injected["spec"]["volumes"]
        .as_array_mut()
        .into_iter()
        .flatten()
    {
        if volume["name"] == "turnpike-token" {
            *volume = token.clone();
            volume["name"] = "turnpike-token".into();
        }
    }
    pod["metadata"]["labels"]["turnpike.dev/inject"] = "disabled".into();
    pod["spec"]["initContainers"] = json!([sidecar]);
    pod["spec"]["volumes"] = injected["spec"]["volumes"].take();
    kubectl.apply(&pod.to_string())
}

/// The sidecar's log says why, and the pod's application does not start.
pub(crate) fn is_told(kubectl: &Kubectl, namespace: &str, pod: &str, why: &str) -> Result<()> {
    let mut log = String::new();
    let told = soon(SOON, &format!("{pod} is told: {why}"), || {
        log = kubectl.logs(namespace, pod, SIDECAR)?;
        Ok(log.contains(why))
    });
    told.context(log)?;
    let pod: Pod = kubectl.get(namespace, pod)?;
    let status = pod.status.unwrap_or_default();
    let mut containers = status.container_statuses.iter().flatten();
    ensure!(
        containers.all(|status| status.started != Some(true)),
        "the application runs beside a sidecar without an identity"
    );
    Ok(())
}
