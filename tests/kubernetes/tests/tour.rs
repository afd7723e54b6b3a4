//! The demo: its tour holds, and what it says may be typed afterwards works when it is pasted.

use anyhow::{Result, ensure};
use turnpike_cluster::{Cluster, tour};

pub(crate) fn holds(cluster: &mut Cluster) -> Result<()> {
    for step in tour::STEPS {
        let evidence = (step.tell)(cluster)?;
        let broken: Vec<_> = evidence.claims.iter().filter(|claim| !claim.held).collect();
        ensure!(evidence.held(), "{}: {broken:#?}", step.title);
    }
    let said = tour::take_walk_through(cluster)?;
    for seen in [
        "HTTP/1.1 200",
        "api.payments.example",
        "istio_requests_total",
        "STATUS: deployed",
        "containerd",
    ] {
        ensure!(said.contains(seen), "no {seen:?} in\n{said}");
    }
    Ok(())
}
