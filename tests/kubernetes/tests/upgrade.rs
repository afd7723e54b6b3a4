//! `helm upgrade` to another proxy, and `helm uninstall`: pods keep their network.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use turnpike_cluster::{
    Cluster, chart,
    images::TAGS,
    kubectl::{Kubectl, name_of},
    workloads,
};

use crate::{
    kills::controller_replaced,
    load::Load,
    roads::address,
    stage::{SOON, passes_soon, soon},
};

const NODES: [&str; 2] = ["node-a", "node-b"];
/// In the mesh, and beside it.
const NAMESPACES: [(&str, bool); 2] = [("upgrade", true), ("upgrade-plain", false)];
const MESHED: &str = NAMESPACES[0].0;
const SERVICE: &str = "http://web/";

fn sidecar_image(pod: &Pod) -> Option<String> {
    let containers = pod.spec.as_ref()?.init_containers.as_ref()?;
    containers
        .iter()
        .find(|container| container.name == "turnpike-proxy")?
        .image
        .clone()
}

/// A server on each node, and a client that calls both.
fn cast(cluster: &Cluster) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut objects = Vec::new();
    for (namespace, meshed) in NAMESPACES {
        objects.push(workloads::namespace(namespace, meshed));
        objects.extend(workloads::web_on_each(&NODES, namespace, "web"));
        objects.extend(workloads::client(namespace, "client", "client", "node-b"));
    }
    kubectl.apply(&workloads::list(&objects))?;
    for (namespace, _) in NAMESPACES {
        for node in NODES {
            kubectl.rolled_out(namespace, &format!("deploy/web-{node}"), SOON)?;
        }
        kubectl.wait(namespace, "pod/client", "condition=Ready", SOON)?;
        passes_soon(kubectl, namespace, "client", SERVICE)?;
    }
    Ok(())
}

pub(crate) fn another_proxy(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let load = Load::start(kubectl, MESHED, "client", SERVICE)?;
    let creations = Creations::start(kubectl);
    let before = of_the_nodes(kubectl)?;
    let mut values = chart::values();
    values["images"] = json!({"proxy": {"tag": TAGS[1]}});
    // Their values are in the templates of the nodes' pods: both DaemonSets are rolled over, too.
    values["node"]["env"]["RUST_LOG"] = "info".into();
    values["gate"]["env"]["RUST_LOG"] = "info".into();
    let said = cluster.helm_install("upgrade", &values)?;
    ensure!(said.ok, "helm upgrade: {}", said.all());
    cluster.rolled_out()?;
    creations.none_refused()?;
    ensure!(
        of_the_nodes(kubectl)?.is_disjoint(&before),
        "an agent or a gate is as it was before"
    );
    let old: Pod = kubectl.get(MESHED, "client")?;
    ensure!(
        sidecar_image(&old).is_some_and(|image| image.ends_with(&format!(":{}", TAGS[0]))),
        "a running pod was changed"
    );
    controller_replaced(kubectl)?;
    // The old client calls new servers while they take the place of the old ones.
    kubectl.ok(&["-n", MESHED, "rollout", "restart", "deploy"])?;
    for node in NODES {
        kubectl.rolled_out(MESHED, &format!("deploy/web-{node}"), SOON)?;
    }
    soon(SOON, "every web pod has the new sidecar", || {
        let pods = kubectl.list::<Pod>(MESHED, "app=web")?;
        Ok(pods.iter().all(|pod| {
            sidecar_image(pod).is_some_and(|image| image.ends_with(&format!(":{}", TAGS[1])))
        }))
    })?;
    load.stop_unharmed()?;
    Ok(())
}

/// The names of agents and gates.
fn of_the_nodes(kubectl: &Kubectl) -> Result<BTreeSet<String>> {
    let selector = "app.kubernetes.io/component in (node, gate)";
    let pods = kubectl.list::<Pod>(chart::NAMESPACE, selector)?;
    Ok(pods.iter().map(name_of).collect())
}

/// Pods that somebody creates in a labelled namespace all the while. The API server asks the webhook
/// about each and keeps none.
struct Creations {
    stop: Arc<AtomicBool>,
    made: Option<JoinHandle<Result<Vec<String>>>>,
}

impl Creations {
    fn start(kubectl: &Kubectl) -> Self {
        let (kubectl, stop) = (kubectl.clone(), Arc::new(AtomicBool::new(false)));
        let ends = Arc::clone(&stop);
        let made = thread::spawn(move || {
            let pod = workloads::client(MESHED, "created", "client", "node-b").pop();
            let pod = pod.context("a pod")?.to_string();
            let mut made = Vec::new();
            while !ends.load(Ordering::Relaxed) {
                let said = kubectl.dry_run(&pod)?;
                made.push(match said.ok {
                    true if said.out.contains("turnpike-proxy") => String::new(),
                    true => "created without a sidecar".to_owned(),
                    false => said.all().trim().to_owned(),
                });
                thread::sleep(Duration::from_millis(100));
            }
            Ok(made)
        });
        Self {
            stop,
            made: Some(made),
        }
    }

    fn none_refused(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let made = self.made.take().and_then(|made| made.join().ok());
        let made = made.context("creating pods")??;
        let refused: Vec<&String> = made.iter().filter(|text| !text.is_empty()).collect();
        ensure!(
            refused.is_empty(),
            "{} of {} pods were refused: {:?}",
            refused.len(),
            made.len(),
            refused.iter().take(5).collect::<Vec<_>>()
        );
        ensure!(made.len() > 20, "only {} pods were created", made.len());
        Ok(())
    }
}

impl Drop for Creations {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

pub(crate) fn uninstall(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let before = everyone(kubectl)?;
    let loads = NAMESPACES
        .map(|(namespace, _)| Load::start(kubectl, namespace, "client", SERVICE))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let said = cluster.helm_uninstall()?;
    ensure!(said.ok, "helm uninstall: {}", said.all());
    soon(SOON, "nothing of ours runs", || {
        Ok(kubectl
            .list::<Pod>(chart::NAMESPACE, "app.kubernetes.io/name=turnpike")?
            .is_empty())
    })?;
    // Three of the slowest probes' failures would show.
    thread::sleep(Duration::from_secs(30));
    for load in loads {
        load.stop_unharmed()?;
    }
    let after = everyone(kubectl)?;
    ensure!(
        before == after,
        "not the same, ready pods:\n{before:#?}\n{after:#?}"
    );
    for (namespace, _) in NAMESPACES {
        across(kubectl, namespace).with_context(|| namespace.to_owned())?;
    }
    kubectl
        .apply(&workloads::list(&workloads::client(
            MESHED, "fresh", "client", "node-b",
        )))
        .context("a pod is made without the injector")?;
    // It stays in ContainerCreating: the CNI that the nodes are left with has no agent to ask, and
    // only another CNI gives pods a network again.
    let fresh: Pod = kubectl.get(MESHED, "fresh")?;
    ensure!(sidecar_image(&fresh).is_none(), "a fresh pod was injected");
    Ok(())
}

/// Each pod's name, address, restarts and readiness.
fn everyone(kubectl: &Kubectl) -> Result<Vec<(String, String, i32, bool)>> {
    let mut all = Vec::new();
    for (namespace, _) in NAMESPACES {
        for pod in kubectl.list::<Pod>(namespace, "app in (web, client)")? {
            let address = address(&pod)?.to_string();
            let name = format!("{namespace}/{}", name_of(&pod));
            let status = pod.status.unwrap_or_default();
            let containers = status.container_statuses.iter().flatten();
            let sidecars = status.init_container_statuses.iter().flatten();
            let restarts = containers.chain(sidecars).map(|c| c.restart_count).sum();
            let conditions = status.conditions.unwrap_or_default();
            let ready = conditions
                .iter()
                .any(|c| c.type_ == "Ready" && c.status == "True");
            ensure!(ready, "{name} is not ready");
            all.push((name, address, restarts, ready));
        }
    }
    all.sort();
    Ok(all)
}

/// From the client to the servers on both nodes, by their Service: a sidecar without its controller
/// knows what it has asked about before.
fn across(kubectl: &Kubectl, namespace: &str) -> Result<()> {
    // A connection for each, which kube-proxy sends to either.
    let line = ["curl", "-s", "-H", "Connection: close", "--max-time", "20"];
    let line = [&line[..], &["http://web/?[1-40]"]].concat();
    let said = kubectl.exec(namespace, "client/curl", &line)?;
    for node in NODES {
        let server = format!("web-{node}-");
        ensure!(
            said.out.lines().any(|line| line.starts_with(&server)),
            "pods lost their network: none of 40 answers came from {node}: {}",
            said.all()
        );
    }
    Ok(())
}
