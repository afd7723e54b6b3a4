//! Workloads of other kinds: a Job ends, a StatefulSet is reached by its pods' names, a pod without
//! a sidecar lives beside those with one. Under STRICT, where it is about who has an identity.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use turnpike_cluster::{Cluster, Kubectl, workloads};

use crate::{
    roads::{address, web_pods},
    stage::{EFFECT, SOON, passes_soon, refused, soon},
};

const NAMESPACE: &str = "kinds";

pub(crate) fn jobs_end(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    strict(&cluster.kubectl, "http://web/")?;
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
    permissive(&cluster.kubectl)
}

fn cast(cluster: &Cluster) -> Result<()> {
    let mut objects = vec![workloads::namespace(NAMESPACE, true)];
    objects.extend(workloads::web(NAMESPACE, "web", 1));
    objects.extend(workloads::client(NAMESPACE, "client", "client", "node-b"));
    objects.extend(outsider());
    cluster.kubectl.apply(&workloads::list(&objects))?;
    cluster.kubectl.rolled_out(NAMESPACE, "deploy/web", SOON)?;
    for pod in ["pod/client", "pod/out"] {
        cluster
            .kubectl
            .wait(NAMESPACE, pod, "condition=Ready", SOON)?;
    }
    Ok(())
}

/// A client and a server in one pod, `out`, which has no sidecar.
fn outsider() -> Vec<Value> {
    let mut objects = workloads::client(NAMESPACE, "out", "out", "node-a");
    if let Some(pod) = objects.last_mut() {
        pod["metadata"]["labels"]["turnpike.dev/inject"] = "disabled".into();
        let server = workloads::web_pod("out")["containers"][0].take();
        if let Some(containers) = pod["spec"]["containers"].as_array_mut() {
            containers.push(server);
        }
    }
    objects
}

/// From now on nobody without an identity is served, as whoever asks `url` without one finds.
fn strict(kubectl: &Kubectl, url: &str) -> Result<()> {
    let strict = json!({
        "apiVersion": "turnpike.dev/v1alpha1", "kind": "PeerAuthentication",
        "metadata": {"name": "all", "namespace": NAMESPACE}, "spec": {"mtls": {"mode": "STRICT"}},
    });
    kubectl.apply(&strict.to_string())?;
    soon(EFFECT, "STRICT refuses a pod without a sidecar", || {
        refused(kubectl, NAMESPACE, "out", &[url]).map(|()| true)
    })
}

fn permissive(kubectl: &Kubectl) -> Result<()> {
    kubectl.ok(&["-n", NAMESPACE, "delete", "peerauthentication", "all"])?;
    passes_soon(kubectl, NAMESPACE, "out", "http://web/")
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
    let of = |pod: &str| format!("http://{pod}.db.{NAMESPACE}.svc.cluster.local:8080/");
    strict(&cluster.kubectl, &of("db-0"))?;
    for pod in ["db-0", "db-1"] {
        let url = of(pod);
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
        refused(&cluster.kubectl, NAMESPACE, "out", &[&url])?;
    }
    permissive(&cluster.kubectl)
}

pub(crate) fn beside_the_mesh(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
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

    strict(kubectl, from_it)?;
    let direct = format!(
        "http://{}:8080/",
        address(web_pods(cluster, NAMESPACE)?.first().context("a pod")?)?
    );
    refused(kubectl, NAMESPACE, "out", &[&direct])?;
    // STRICT is about who calls: what calls out is as before.
    passes_soon(kubectl, NAMESPACE, "client", &to_it)?;
    passes_soon(kubectl, NAMESPACE, "client", from_it)?;
    permissive(kubectl)
}
