//! Step 2: the agents have filled their warm pools from EC2; gates stand beside them.

use std::time::Duration;

use anyhow::Result;

use crate::{claims::Evidence, http, wait_for, world::World};

const METRICS: &str = "127.0.0.1:61678";

pub(super) fn tell(world: &mut World) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    for node in &world.nodes {
        let metrics = || {
            Some(
                http::get(&node.namespace, METRICS.parse().ok()?, "/metrics")
                    .ok()?
                    .body,
            )
        };
        let filled = wait_for(Duration::from_secs(15), || {
            let metrics = metrics()?;
            let free = value(&metrics, "awscni_total_ip_addresses")?
                - value(&metrics, "awscni_assigned_ip_addresses")?;
            (free >= 4.0).then_some(free)
        });
        evidence.claim(
            format!("{} keeps addresses warm for pods to come", node.name),
            filled.is_some(),
            filled.map_or("the pool stayed empty".to_owned(), |free| {
                format!("{free} free")
            }),
        );
        let calls = metrics().and_then(|metrics| value(&metrics, "awscni_ec2api_req_count"));
        evidence.claim(
            format!("{} got them from EC2's API by the AWS SDK", node.name),
            calls.is_some_and(|calls| calls > 0.0),
            format!("{} calls", calls.unwrap_or_default()),
        );
        let most = metrics().and_then(|metrics| value(&metrics, "awscni_ip_max"));
        evidence.figure(
            format!("{}: most pod addresses", node.name),
            most.unwrap_or_default(),
        );
    }
    Ok(evidence)
}

/// The sum of a metric over its series.
pub(super) fn value(metrics: &str, name: &str) -> Option<f64> {
    let lines = metrics.lines().filter(|line| {
        line.strip_prefix(name)
            .map(|rest| rest.strip_prefix("_total").unwrap_or(rest))
            .is_some_and(|rest| rest.starts_with(['{', ' ']))
    });
    let values: Vec<f64> = lines
        .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
        .collect();
    (!values.is_empty()).then(|| values.iter().sum())
}
