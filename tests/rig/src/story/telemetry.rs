//! Step 7: one request's spans across both sidecars under one trace id, and metrics beside them.

use std::time::Duration;

use anyhow::Result;

use super::{cast, curl};
use crate::{claims::Evidence, otlp, wait_for, world::World};

pub(super) fn tell(world: &mut World) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    cast(world)?;
    let said = curl(world, "shop", "client", &["http://web.shop/traced"])?;
    evidence.claim(
        "a request to be traced",
        said.out.trim() == "200",
        &said.out,
    );
    if let Some(sink) = &world.sink {
        let mentions = |span: &otlp::Span| span.attributes.values().any(|v| v.contains("/traced"));
        let spans = wait_for(Duration::from_secs(15), || {
            let spans = sink.trace_of(mentions);
            (spans.len() >= 2).then_some(spans)
        })
        .unwrap_or_default();
        let child = spans
            .iter()
            .any(|span| spans.iter().any(|other| other.id == span.parent));
        evidence.claim(
            "both sidecars' spans came over OTLP, one below the other, under one trace id",
            child,
            format!("{} spans", spans.len()),
        );
        evidence.exhibit("One request across both sidecars", otlp::tree(&spans));
        let metrics = wait_for(Duration::from_secs(70), || {
            let names = sink.metric_names();
            (!names.is_empty()).then_some(names)
        });
        evidence.claim(
            "metrics came over OTLP",
            metrics.is_some(),
            format!(
                "{:?}",
                metrics.map(|names| names.into_keys().collect::<Vec<_>>())
            ),
        );
    }
    // As in Istio, only the side that checked the certificate says how the connection was secured.
    let secured = "connection_security_policy=\"mutual_tls\"";
    for (pod, reporter, says) in [("client", "source", ""), ("web-1", "destination", secured)] {
        let metrics = world.pod("shop", pod)?.metrics()?;
        let wanted = format!("reporter=\"{reporter}\"");
        let line = metrics.lines().find(|line| {
            line.starts_with("istio_requests_total")
                && line.contains(&wanted)
                && line.contains(says)
        });
        evidence.claim(
            format!("{pod}'s sidecar counts requests under Istio's names, as {reporter}"),
            line.is_some(),
            line.unwrap_or("no such series"),
        );
    }
    Ok(evidence)
}
