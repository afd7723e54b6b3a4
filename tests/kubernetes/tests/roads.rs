//! The roads: addresses, DNS, Services, and what everybody does with kubectl all day.

use std::{io::Read as _, net::Ipv4Addr};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use turnpike_cluster::{Cluster, kubectl::name_of, workloads};

use crate::stage::{EFFECT, SOON, curl, is_refusal, passes_soon, refused, soon};

/// Unlabelled; labelled; labelled with `STRICT`.
pub(crate) const NAMESPACES: [(&str, bool); 3] =
    [("plain", false), ("mesh", true), ("strict", true)];

/// nginx on both nodes and a client in each of the three, made once.
pub(crate) fn cast(cluster: &Cluster) -> Result<()> {
    let kubectl = &cluster.kubectl;
    if kubectl.run(&["get", "namespace", "strict"])?.ok {
        return Ok(());
    }
    let mut objects = Vec::new();
    for (namespace, meshed) in NAMESPACES {
        objects.push(workloads::namespace(namespace, meshed));
        objects.extend(workloads::web(namespace, "web", 2));
        objects.extend(workloads::client(namespace, "client", "client", "node-b"));
    }
    objects.push(serde_json::json!({
        "apiVersion": "turnpike.dev/v1alpha1", "kind": "PeerAuthentication",
        "metadata": {"name": "all", "namespace": "strict"}, "spec": {"mtls": {"mode": "STRICT"}},
    }));
    kubectl.apply(&workloads::list(&objects))?;
    for (namespace, _) in NAMESPACES {
        kubectl.rolled_out(namespace, "deploy/web", SOON)?;
        kubectl.wait(namespace, "pod/client", "condition=Ready", SOON)?;
    }
    Ok(())
}

pub(crate) fn web_pods(cluster: &Cluster, namespace: &str) -> Result<Vec<Pod>> {
    let mut pods = cluster.kubectl.list::<Pod>(namespace, "app=web")?;
    pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
    Ok(pods)
}

pub(crate) fn address(pod: &Pod) -> Result<Ipv4Addr> {
    let address = pod
        .status
        .as_ref()
        .and_then(|status| status.pod_ip.as_deref());
    Ok(address.context("the pod has an address")?.parse()?)
}

pub(crate) fn addresses(cluster: &mut Cluster) -> Result<()> {
    for node in ["node-a", "node-b"] {
        let object: Node = cluster.kubectl.get("default", node)?;
        let conditions = object
            .status
            .and_then(|status| status.conditions)
            .unwrap_or_default();
        let ready = conditions
            .iter()
            .any(|c| c.type_ == "Ready" && c.status == "True");
        ensure!(ready, "{node} is not ready: {conditions:?}");
    }
    cast(cluster)?;
    let mut zones = std::collections::BTreeSet::new();
    for (namespace, _) in NAMESPACES {
        for pod in web_pods(cluster, namespace)? {
            let node = pod
                .spec
                .as_ref()
                .and_then(|spec| spec.node_name.clone())
                .unwrap_or_default();
            let address = address(&pod)?;
            // Each node's pods have addresses of the subnet of its zone.
            let third = address.octets()[2];
            let expected = if node == "node-a" { 0..64 } else { 64..128 };
            ensure!(
                address.octets()[..2] == [10, 0] && expected.contains(&third),
                "{address} of {namespace}/{} on {node}",
                name_of(&pod)
            );
            // A pod is addressed from anywhere in the VPC, also from an instance without a node.
            let url = format!("http://{address}:8080/");
            if namespace != "strict" {
                let said = cluster
                    .kubectl
                    .on_control(&["curl", "-s", "--max-time", "5", &url])?;
                ensure!(
                    said.out.contains("the way is free"),
                    "{url} from an instance: {}",
                    said.all()
                );
            }
            zones.insert(node);
        }
    }
    ensure!(
        zones.len() == 2,
        "the pods are spread over both nodes: {zones:?}"
    );
    cluster.prove_isolation()
}

pub(crate) fn daily_work(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    for (namespace, _) in NAMESPACES {
        daily_work_in(cluster, namespace).with_context(|| namespace.to_owned())?;
    }
    Ok(())
}

fn daily_work_in(cluster: &Cluster, namespace: &str) -> Result<()> {
    let kubectl = &cluster.kubectl;
    // DNS and kube-proxy: by short name, by whole name, and both endpoints answer.
    for url in [
        "http://web/".to_owned(),
        format!("http://web.{namespace}.svc.cluster.local/"),
    ] {
        let mut hosts = std::collections::BTreeSet::new();
        let line = ["curl", "-s", "--max-time", "5", &url];
        let mut wrong = None;
        soon(SOON, &format!("both endpoints of {url} answer"), || {
            let said = kubectl.exec(namespace, "client/curl", &line)?;
            if !said.out.contains("the way is free") {
                wrong = Some(said);
                return Ok(true);
            }
            hosts.extend(said.out.split(' ').next().map(str::to_owned));
            Ok(hosts.len() == 2)
        })?;
        ensure!(wrong.is_none(), "{url}: {wrong:?}");
    }
    // The world outside the cluster, by the VPC's resolver.
    let outside = curl(
        kubectl,
        namespace,
        "client",
        &["https://api.payments.example/"],
    )?;
    ensure!(outside.out == "200", "a public name: {}", outside.all());

    let pod = name_of(web_pods(cluster, namespace)?.first().context("a pod")?);
    let said = kubectl.exec(namespace, &format!("{pod}/nginx"), &["hostname"])?;
    ensure!(said.out.trim() == pod, "exec: {}", said.all());
    let said = kubectl.exec(
        namespace,
        &format!("{pod}/nginx"),
        &["sh", "-c", "echo seen > /proc/1/fd/2; exit 3"],
    )?;
    ensure!(
        said.code == Some(3),
        "the status of an exec: {}",
        said.all()
    );
    soon(EFFECT, "the line is in its log", || {
        Ok(kubectl.logs(namespace, &pod, "nginx")?.contains("seen"))
    })?;
    forward(cluster, namespace, &pod).context("port-forward")
}

fn forward(cluster: &Cluster, namespace: &str, pod: &str) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut forward = kubectl.spawn(&[
        "-n",
        namespace,
        "port-forward",
        "--address",
        "127.0.0.1",
        &format!("pod/{pod}"),
        "18080:8080",
    ])?;
    let answered = soon(EFFECT, "an answer at the forwarded port", || {
        let said =
            kubectl.on_control(&["curl", "-s", "--max-time", "5", "http://127.0.0.1:18080/"])?;
        Ok(said.out.starts_with(pod))
    });
    forward.kill()?;
    forward.wait()?;
    answered.with_context(|| {
        let mut said = String::new();
        if let Some(error) = &mut forward.stderr {
            let _ = error.read_to_string(&mut said);
        }
        said
    })
}

/// From (row) to (column): plain, mesh, strict.
const ALLOWED: [[bool; 3]; 3] = [[true, true, false], [true, true, true], [true, true, true]];

pub(crate) fn modes(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    for ((from, _), row) in NAMESPACES.iter().zip(ALLOWED) {
        for ((to, _), allowed) in NAMESPACES.iter().zip(row) {
            let service = format!("http://web.{to}/");
            let pod = web_pods(cluster, to)?;
            let direct = format!("http://{}:8080/", address(pod.first().context("a pod")?)?);
            for url in [service, direct] {
                if allowed {
                    passes_soon(kubectl, from, "client", &url)?;
                } else {
                    refused(kubectl, from, "client", &[&url])?;
                }
            }
        }
    }
    // Nor does anything in the VPC that has no identity.
    let pod = address(web_pods(cluster, "strict")?.first().context("a pod")?)?;
    let url = format!("http://{pod}:8080/");
    let line = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}"];
    let said = kubectl.on_control(&[&line[..], &["--max-time", "5", &url]].concat())?;
    ensure!(
        is_refusal(&said),
        "an instance is not refused by a STRICT pod: {said:?}"
    );
    Ok(())
}
