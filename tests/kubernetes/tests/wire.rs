//! What a call across nodes is on the wire, and what the logs, metrics and one trace say of it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use turnpike_cluster::{Cluster, kubectl::name_of};
use turnpike_rig::{otlp::Span, wait_for};

use crate::{
    roads::{address, cast, web_pods},
    stage::{EFFECT, curl, soon},
};

const SECRET: &str = "x-card: 4242-4242-4242-4242";
const OPEN: &str = "x-open: seen-by-everyone";

/// The web pod on the node where the clients are not.
fn across(cluster: &Cluster, namespace: &str) -> Result<k8s_openapi::api::core::v1::Pod> {
    let on = |pod: &k8s_openapi::api::core::v1::Pod| {
        pod.spec.as_ref().and_then(|spec| spec.node_name.clone())
    };
    let mut pods = web_pods(cluster, namespace)?;
    pods.retain(|pod| on(pod).as_deref() == Some("node-a"));
    pods.pop()
        .with_context(|| format!("a web pod of {namespace} on node-a"))
}

pub(crate) fn mtls(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let kubectl = &cluster.kubectl;
    let open = format!("http://{}:8080/", address(&across(cluster, "mesh")?)?);
    let capture = cluster.capture()?;
    // More calls than endpoints, so that some cross.
    for _ in 0..8 {
        let said = curl(
            kubectl,
            "mesh",
            "client",
            &["-H", SECRET, "http://web.mesh/cards"],
        )?;
        ensure!(said.out == "200", "a call in the mesh: {}", said.all());
    }
    let said = curl(kubectl, "plain", "client", &["-H", OPEN, &open])?;
    ensure!(
        said.out == "200",
        "a plaintext call to a PERMISSIVE pod: {}",
        said.all()
    );
    let wire = capture.finish()?;
    ensure!(wire.carried(OPEN), "the capture would have shown plaintext");
    // Not the path too: spans name it, and the box's collector takes them in plaintext.
    ensure!(
        !wire.carried(SECRET),
        "a call in the mesh was readable between the nodes"
    );
    ensure!(
        wire.carried("p80.web.mesh.cluster.svc.turnpike"),
        "no TLS to the Service by name was seen"
    );
    Ok(())
}

pub(crate) fn telemetry(cluster: &mut Cluster) -> Result<()> {
    cast(cluster)?;
    let server = name_of(&across(cluster, "mesh")?);
    for _ in 0..8 {
        let said = curl(
            &cluster.kubectl,
            "mesh",
            "client",
            &["http://web.mesh/traced"],
        )?;
        ensure!(said.out == "200", "a call to be traced: {}", said.all());
    }
    logs(cluster, &server)?;
    metrics(cluster, &server)?;
    let mentions = |span: &Span| {
        span.attributes
            .values()
            .any(|value| value.contains("/traced"))
    };
    let joined = |spans: &[Span]| {
        spans.iter().any(|span| {
            spans
                .iter()
                .any(|other| other.id == span.parent && other.service != span.service)
        })
    };
    let spans = wait_for(Duration::from_secs(20), || {
        let spans = cluster.sink.trace_of(mentions);
        joined(&spans).then_some(spans)
    });
    ensure!(
        spans.is_some(),
        "no trace with a span of each side: {:?}",
        cluster.sink.trace_of(mentions)
    );
    Ok(())
}

fn logs(cluster: &Cluster, server: &str) -> Result<()> {
    soon(EFFECT, "JSON access logs on both sides", || {
        for pod in ["client", server] {
            let log = cluster.kubectl.logs("mesh", pod, "turnpike-proxy")?;
            let line = log.lines().find(|line| line.contains("/traced"));
            let Some(line) = line else { return Ok(false) };
            let entry: serde_json::Value =
                serde_json::from_str(line).with_context(|| line.to_owned())?;
            ensure!(entry.to_string().contains("200"), "{entry}");
        }
        Ok(true)
    })
}

fn metrics(cluster: &Cluster, server: &str) -> Result<()> {
    let secured = "connection_security_policy=\"mutual_tls\"";
    for (pod, container, reporter, says) in [
        ("client", "curl", "source", ""),
        (server, "nginx", "destination", secured),
    ] {
        let metrics = cluster.kubectl.exec(
            "mesh",
            &format!("{pod}/{container}"),
            &["wget", "-qO-", "http://127.0.0.1:15020/metrics"],
        )?;
        let wanted = format!("reporter=\"{reporter}\"");
        let counted = metrics.out.lines().any(|line| {
            line.starts_with("istio_requests_total")
                && line.contains(&wanted)
                && line.contains(says)
        });
        ensure!(
            counted,
            "no istio_requests_total of {reporter} in\n{}",
            metrics.all()
        );
    }
    Ok(())
}
