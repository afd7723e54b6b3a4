//! Step 7: one request's spans across both sidecars under one trace id, and metrics beside them.

use std::time::Duration;

use anyhow::Result;

use super::{cast, curl};
use crate::{claims::Evidence, otlp, wait_for, world::World};

/// Sidecars send spans after some seconds, and metrics four times a minute.
const SPANS: Duration = Duration::from_secs(15);
const METRICS: Duration = Duration::from_secs(40);

pub(super) fn tell(world: &mut World) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    cast(world)?;
    let said = curl(world, "shop", "client", &["http://web.shop/traced"])?;
    evidence.claim(
        "a request to be traced",
        said.out.trim() == "200",
        &said.out,
    );
    spans(world, &mut evidence);
    metrics(world, &mut evidence);
    outside(world, &mut evidence);
    prometheus(world, &mut evidence)?;
    Ok(evidence)
}

/// The caller's span stands above the callee's, each told by its own sidecar.
fn spans(world: &World, evidence: &mut Evidence) {
    let mentions = |span: &otlp::Span| span.attributes.values().any(|v| v.contains("/traced"));
    let below = |spans: &[otlp::Span]| {
        spans.iter().any(|span| {
            let above = spans.iter().find(|other| other.id == span.parent);
            above.is_some_and(|above| above.service != span.service)
        })
    };
    let both = wait_for(SPANS, || {
        let spans = world.sink.trace_of(mentions);
        below(&spans).then_some(spans)
    });
    let spans = both
        .clone()
        .unwrap_or_else(|| world.sink.trace_of(mentions));
    evidence.claim(
        "both sidecars' spans came over OTLP, one below the other, under one trace id",
        both.is_some(),
        format!("{} spans", spans.len()),
    );
    evidence.exhibit("One request across both sidecars", otlp::tree(&spans));
}

fn metrics(world: &World, evidence: &mut Evidence) {
    let requests = wait_for(METRICS, || {
        let names = world.sink.metric_names();
        names.contains_key("istio_requests_total").then_some(())
    });
    let names: Vec<_> = world.sink.metric_names().into_keys().collect();
    evidence.claim(
        "metrics came over OTLP, those of requests among them",
        requests.is_some(),
        names.join(" "),
    );
}

/// Where the user named a collector, it has taken the same.
fn outside(world: &World, evidence: &mut Evidence) {
    let (Some(collector), Some(_)) = (&world.options.otlp, world.sink.passed()) else {
        return;
    };
    let taken = wait_for(SPANS, || {
        let passed = world.sink.passed()?;
        (passed.traces > 0 && passed.metrics > 0).then_some(())
    });
    let passed = world.sink.passed().unwrap_or_default();
    let seen = match &passed.error {
        Some(error) => format!("{} exports were lost; the last: {error}", passed.lost),
        None => format!(
            "{} exports of spans and {} of metrics",
            passed.traces, passed.metrics
        ),
    };
    evidence.claim(
        format!("the collector at {collector} took them too"),
        taken.is_some() && passed.lost == 0,
        seen,
    );
}

/// Both ends count it, and both say how the connection was secured: the caller's sidecar made it.
fn prometheus(world: &World, evidence: &mut Evidence) -> Result<()> {
    for (pod, reporter) in [("client", "source"), ("web-1", "destination")] {
        let metrics = world.pod("shop", pod)?.metrics()?;
        let wanted = [
            format!("reporter=\"{reporter}\""),
            "connection_security_policy=\"mutual_tls\"".to_owned(),
        ];
        let line = metrics.lines().find(|line| {
            line.starts_with("istio_requests_total")
                && wanted.iter().all(|label| line.contains(label))
        });
        evidence.claim(
            format!(
                "{pod}'s sidecar counts requests over mutual TLS under Istio's names, as {reporter}"
            ),
            line.is_some(),
            line.unwrap_or("no such series"),
        );
    }
    Ok(())
}
