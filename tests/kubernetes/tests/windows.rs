//! No open window: a pod that an egress policy selects tries to leave from its first moment, while
//! the part that brings or holds its policy is there, or stands still. Each time a pod beside it
//! that nothing selects does the same and gets out, so that what is not seen would have been.

use std::{fs, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use turnpike_cluster::{Cluster, kubectl::Kubectl, node::Paused, workloads};

use crate::{
    egress::{ATTACKER, PAYMENTS, SELECTED, policy},
    kills::ours,
    stage::{SOON, passes_soon, refused, soon},
};

const NAMESPACE: &str = "windows";
/// Without its policy a pod must not start for as long as this at least.
const HELD_BACK: Duration = Duration::from_secs(8);
/// Several times what its first attempts take.
const WATCHED: Duration = Duration::from_secs(5);

/// Its first act is to try to get out, under its own name, and so it goes on for fifty rounds.
const EAGER: &str = "for i in $(seq 50); do \
    curl -s -o /dev/null --max-time 0.3 http://203.0.113.66/$0-tcp; \
    curl -s -o /dev/null --max-time 0.3 tftp://203.0.113.66:4443/$0-udp; \
    sleep 0.1; done; sleep infinity";

/// A pod on node-a that runs [`EAGER`], and its service account.
pub(crate) fn eager(namespace: &str, name: &str, app: &str) -> Vec<Value> {
    let mut objects = workloads::client(namespace, name, app, "node-a");
    if let Some(pod) = objects.last_mut() {
        let mark = format!("{namespace}-{name}");
        pod["spec"]["containers"] = json!([workloads::caller(&["sh", "-c", EAGER, &mark])]);
    }
    objects
}

/// How often a pod of [`eager`] reached the attacker, over TCP and over UDP.
pub(crate) fn reached(cluster: &Cluster, namespace: &str, pod: &str) -> Result<[usize; 2]> {
    let log = fs::read_to_string(&cluster.ready.internet_log)?;
    Ok(["tcp", "udp"].map(|way| {
        // The record has the first bytes in hexadecimal.
        let mark = hex::encode(format!("{namespace}-{pod}-{way}"));
        let lines = log.lines().filter(|line| line.contains(ATTACKER));
        lines.filter(|line| line.contains(&mark)).count()
    }))
}

/// Nothing of `held` has left by the time that `free` has, and a while later.
fn watch(cluster: &Cluster, namespace: &str, held: &str, free: &str) -> Result<()> {
    soon(SOON, &format!("{namespace}/{free} gets out"), || {
        Ok(!reached(cluster, namespace, free)?.contains(&0))
    })?;
    thread::sleep(WATCHED);
    nothing_left(cluster, namespace, held)
}

fn nothing_left(cluster: &Cluster, namespace: &str, held: &str) -> Result<()> {
    let [tcp, udp] = reached(cluster, namespace, held)?;
    ensure!(
        tcp + udp == 0,
        "{namespace}/{held} reached the attacker: {tcp} times over TCP, {udp} over UDP"
    );
    Ok(())
}

/// With all parts there, in the mesh and beside it.
pub(crate) fn with_everything_there(cluster: &mut Cluster) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut objects = Vec::new();
    for (namespace, meshed) in SELECTED {
        objects.push(workloads::namespace(namespace, meshed));
        objects.push(policy(namespace));
        objects.extend(eager(namespace, "late", "payer"));
        objects.extend(eager(namespace, "late-free", "free"));
    }
    kubectl.apply(&workloads::list(&objects))?;
    for (namespace, _) in SELECTED {
        for pod in ["pod/late", "pod/late-free"] {
            kubectl.wait(namespace, pod, "condition=Ready", SOON)?;
        }
        watch(cluster, namespace, "late", "late-free")?;
    }
    Ok(())
}

/// The agent knows nothing of a pod that is new to it, and no policy can come.
pub(crate) fn without_the_controller(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let (pod, node) = ours(cluster, "controller", None)?;
    let paused = pause(cluster, &node, &pod, "controller")?;
    make(&cluster.kubectl, "controller")?;
    soon(SOON, "an event says what is waited for", || {
        Ok(
            events(&cluster.kubectl, "held-controller")?
                .contains("its network policy has not come"),
        )
    })?;
    starts_only_after(cluster, paused, "controller")
}

/// Whoever gives the pod its network does not answer.
pub(crate) fn without_the_agent(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let (pod, node) = ours(cluster, "node", Some("node-a"))?;
    let paused = pause(cluster, &node, &pod, "node")?;
    make(&cluster.kubectl, "agent")?;
    starts_only_after(cluster, paused, "agent")
}

/// The pod starts, for its rules are the node's; what they lead to the gate stays there.
pub(crate) fn without_the_gate(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let (pod, node) = ours(cluster, "gate", Some("node-a"))?;
    let paused = pause(cluster, &node, &pod, "gate")?;
    make(kubectl, "gate")?;
    kubectl.wait(NAMESPACE, "pod/held-gate", "condition=Ready", SOON)?;
    watch(cluster, NAMESPACE, "held-gate", "free-gate")?;
    drop(paused);
    is_held(cluster, "held-gate")
}

fn cast(cluster: &Cluster) -> Result<()> {
    let objects = [workloads::namespace(NAMESPACE, false), policy(NAMESPACE)];
    cluster.kubectl.apply(&workloads::list(&objects))
}

fn make(kubectl: &Kubectl, without: &str) -> Result<()> {
    let mut objects = eager(NAMESPACE, &format!("held-{without}"), "payer");
    objects.extend(eager(NAMESPACE, &format!("free-{without}"), "free"));
    kubectl.apply(&workloads::list(&objects))
}

fn pause<'a>(cluster: &'a Cluster, node: &str, pod: &str, part: &str) -> Result<Paused<'a>> {
    let node = cluster.node(node)?;
    node.pause_container(turnpike_cluster::chart::NAMESPACE, pod, part)
}

fn events(kubectl: &Kubectl, pod: &str) -> Result<String> {
    let about = format!("involvedObject.name={pod}");
    kubectl.ok(&["-n", NAMESPACE, "get", "events", "--field-selector", &about])
}

/// The pod has not started while the part stood still, starts when it goes on, and is held then.
fn starts_only_after(cluster: &Cluster, paused: Paused<'_>, without: &str) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let (held, free) = (format!("held-{without}"), format!("free-{without}"));
    thread::sleep(HELD_BACK);
    let pod: Pod = kubectl.get(NAMESPACE, &held)?;
    let status = pod.status.unwrap_or_default();
    let containers = status.container_statuses.unwrap_or_default();
    ensure!(
        status.phase.as_deref() == Some("Pending")
            && containers.iter().all(|status| status.started != Some(true)),
        "{held} started without its policy: {containers:?}"
    );
    nothing_left(cluster, NAMESPACE, &held)?;
    drop(paused);
    kubectl.wait(NAMESPACE, &format!("pod/{held}"), "condition=Ready", SOON)?;
    watch(cluster, NAMESPACE, &held, &free)?;
    is_held(cluster, &held)
}

fn is_held(cluster: &Cluster, held: &str) -> Result<()> {
    let kubectl = &cluster.kubectl;
    passes_soon(kubectl, NAMESPACE, held, PAYMENTS).context("what its policy allows")?;
    refused(kubectl, NAMESPACE, held, &["https://203.0.113.66/"])?;
    nothing_left(cluster, NAMESPACE, held)
}
