//! The story that the demo tells and the tests check: seven steps of real traffic.
//!
//! Each step makes what it needs and is not there yet, so that it can be told alone.

mod egress;
mod mtls;
mod nodes;
mod pods;
mod resilience;
mod telemetry;
mod vpc;

use anyhow::Result;

use crate::{claims::Evidence, cluster, world::World};

/// One step: its title, and what shows it.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub title: &'static str,
    pub tell: fn(&mut World) -> Result<Evidence>,
}

/// In the order of telling.
pub const STEPS: [Step; 7] = [
    Step {
        title: "A VPC in a box",
        tell: vpc::tell,
    },
    Step {
        title: "Nodes with warm pools",
        tell: nodes::tell,
    },
    Step {
        title: "Pods with VPC addresses",
        tell: pods::tell,
    },
    Step {
        title: "Mutual TLS",
        tell: mtls::tell,
    },
    Step {
        title: "Retries and circuit breaking",
        tell: resilience::tell,
    },
    Step {
        title: "Nothing leaves unless allowed",
        tell: egress::tell,
    },
    Step {
        title: "Traces and metrics",
        tell: telemetry::tell,
    },
];

/// nginx behind the Service `web` on one node, a client on the other, and a caller without a
/// sidecar.
fn cast(world: &mut World) -> Result<()> {
    if world.pod("shop", "web-1").is_ok() {
        return Ok(());
    }
    world.furnish()?;
    world.start_pod(&cluster::nginx("web-1", "web", "node-a", 0), true)?;
    world.start_pod(&cluster::client("shop", "client", "client", "node-b"), true)?;
    world.start_pod(
        &cluster::client("legacy", "caller", "caller", "node-b"),
        false,
    )?;
    Ok(())
}

/// One curl run: `--max-time`, quiet, the status code on standard output.
fn curl(world: &World, namespace: &str, pod: &str, arguments: &[&str]) -> Result<crate::Said> {
    let mut line = vec![
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code} ",
        "--max-time",
        "5",
    ];
    line.extend(arguments);
    world.exec(namespace, pod, &line)
}
