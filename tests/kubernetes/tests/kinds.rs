//! Workloads of other kinds: a Job ends, a StatefulSet is reached by its pods' names, a pod without
//! a sidecar lives beside those with one.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use turnpike_cluster::{Cluster, workloads};

use crate::{
    roads::{address, web_pods},
    stage::{EFFECT, SOON, passes_soon, refused, soon},
};

const NAMESPACE: &str = "kinds";

pub(crate) fn jobs_end(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    // It calls the mesh, and ends; the sidecar must not keep it.
    let mut container = workloads::caller(&["curl", "-sf", "--max-time", "20", "http://web/"]);
    container["name"] = "work".into();
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {"namespace": NAMESPACE, "name": "once"},
        "spec": {"backoffLimit": 0, "template": {
            "metadata": {"labels": {"app": "once"}},
            "spec": {
                "restartPolicy": "Never", "serviceAccountName": "client",
                "securityContext": workloads::restricted_pod(1000), "containers": [container],
            },
        }},
    });
    cluster.kubectl.apply(&job.to_string())?;
    cluster
        .kubectl
        .wait(NAMESPACE, "job/once", "condition=Complete", SOON)?;
    let pods = cluster.kubectl.list::<Pod>(NAMESPACE, "app=once")?;
    let pod = pods.first().context("its pod")?;
    let injected = pod.spec.as_ref().is_some_and(|spec| {
        spec.init_containers
            .iter()
            .flatten()
            .any(|c| c.name == "turnpike-proxy")
    });
    ensure!(injected, "the job had no sidecar");
    let phase = pod.status.as_ref().and_then(|status| status.phase.clone());
    ensure!(
        phase.as_deref() == Some("Succeeded"),
        "its pod is {phase:?}"
    );
    Ok(())
}

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

pub(crate) fn stateful_sets(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let headless = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": NAMESPACE, "name": "db"},
        "spec": {"clusterIP": "None", "selector": {"app": "db"}, "ports": [{"name": "http", "port": 8080}]},
    });
    let mut spec = workloads::web_pod("db");
    spec["serviceAccountName"] = "client".into();
    let set = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet",
        "metadata": {"namespace": NAMESPACE, "name": "db"},
        "spec": {
            "serviceName": "db", "replicas": 2, "selector": {"matchLabels": {"app": "db"}},
            "template": {"metadata": {"labels": {"app": "db"}}, "spec": spec},
        },
    });
    cluster.kubectl.apply(&workloads::list(&[headless, set]))?;
    cluster.kubectl.rolled_out(NAMESPACE, "sts/db", SOON)?;
    for pod in ["db-0", "db-1"] {
        let url = format!("http://{pod}.db.{NAMESPACE}.svc.cluster.local:8080/");
        passes_soon(&cluster.kubectl, NAMESPACE, "client", &url)?;
        for _ in 0..5 {
            let said = cluster.kubectl.exec(
                NAMESPACE,
                "client/curl",
                &["curl", "-s", "--max-time", "5", &url],
            )?;
            ensure!(
                said.out.starts_with(&format!("{pod} says")),
                "{url} was answered by {}",
                said.all()
            );
        }
    }
    Ok(())
}

pub(crate) fn beside_the_mesh(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    // A client and a server in one pod.
    let mut objects = workloads::client(NAMESPACE, "out", "out", "node-a");
    if let Some(pod) = objects.last_mut() {
        pod["metadata"]["labels"]["turnpike.dev/inject"] = "disabled".into();
        let server = workloads::web_pod("out")["containers"][0].take();
        if let Some(containers) = pod["spec"]["containers"].as_array_mut() {
            containers.push(server);
        }
    }
    kubectl.apply(&workloads::list(&objects))?;
    kubectl.wait(NAMESPACE, "pod/out", "condition=Ready", SOON)?;
    let out: Pod = kubectl.get(NAMESPACE, "out")?;
    let sidecars = out
        .spec
        .as_ref()
        .and_then(|spec| spec.init_containers.clone())
        .unwrap_or_default();
    ensure!(sidecars.is_empty(), "a pod that opted out was injected");
    let (to_it, from_it) = (format!("http://{}:8080/", address(&out)?), "http://web/");
    passes_soon(kubectl, NAMESPACE, "client", &to_it)?;
    passes_soon(kubectl, NAMESPACE, "out", from_it)?;

    let strict = json!({
        "apiVersion": "turnpike.dev/v1alpha1", "kind": "PeerAuthentication",
        "metadata": {"name": "all", "namespace": NAMESPACE}, "spec": {"mtls": {"mode": "STRICT"}},
    });
    kubectl.apply(&strict.to_string())?;
    soon(EFFECT, "STRICT refuses a pod without a sidecar", || {
        refused(kubectl, NAMESPACE, "out", &[from_it]).map(|()| true)
    })?;
    let direct = format!(
        "http://{}:8080/",
        address(web_pods(cluster, NAMESPACE)?.first().context("a pod")?)?
    );
    refused(kubectl, NAMESPACE, "out", &[&direct])?;
    // STRICT is about who calls: what calls out is as before.
    passes_soon(kubectl, NAMESPACE, "client", &to_it)?;
    passes_soon(kubectl, NAMESPACE, "client", from_it)?;
    kubectl.ok(&["-n", NAMESPACE, "delete", "peerauthentication", "all"])?;
    passes_soon(kubectl, NAMESPACE, "out", from_it)
}
