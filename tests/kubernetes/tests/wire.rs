//! What a call across nodes is on the wire, and what the logs, metrics and one trace say of it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use turnpike_cluster::{Cluster, kubectl::name_of, workloads};
use turnpike_rig::{otlp::Span, wait_for};

use crate::{
    roads::{address, cast},
    stage::{EFFECT, SOON, curl, passes_soon, soon},
};

const SECRET: &str = "x-card: 4242-4242-4242-4242";
const OPEN: &str = "x-open: seen-by-everyone";

/// A server on the node where the clients are not: every call to it crosses.
fn far(cluster: &Cluster) -> Result<Pod> {
    cast(cluster)?;
    let far = workloads::web_on("node-a", "mesh", "far", 1);
    cluster.kubectl.apply(&workloads::list(&far))?;
    cluster.kubectl.rolled_out("mesh", "deploy/far", SOON)?;
    let mut pods = cluster.kubectl.list::<Pod>("mesh", "app=far")?;
    pods.pop().context("its pod")
}

pub(crate) fn mtls(cluster: &mut Cluster) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let open = format!("http://{}:8080/", address(&far(cluster)?)?);
    // From the first call on, since the connection between the sidecars is kept for the next.
    let capture = cluster.capture()?;
    passes_soon(kubectl, "mesh", "client", "http://far.mesh/")?;
    for _ in 0..8 {
        let said = curl(
            kubectl,
            "mesh",
            "client",
            &["-H", SECRET, "http://far.mesh/cards"],
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
    ensure!(
        !wire.carried(SECRET) && !wire.carried("/cards"),
        "a call in the mesh was readable between the nodes"
    );
    ensure!(
        wire.carried("p80.far.mesh.cluster.svc.turnpike"),
        "no TLS to the Service by name was seen"
    );
    Ok(())
}

pub(crate) fn telemetry(cluster: &mut Cluster) -> Result<()> {
    let server = name_of(&far(cluster)?);
    for _ in 0..8 {
        let said = curl(
            &cluster.kubectl,
            "mesh",
            "client",
            &["http://far.mesh/traced"],
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
            ensure!(entry["response_code"] == 200, "{entry}");
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
