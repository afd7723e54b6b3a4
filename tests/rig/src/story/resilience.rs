//! Step 5: a failing and a hanging backend, with and without a TrafficPolicy.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};

use super::{cast, curl};
use crate::{Pod, claims::Evidence, cluster, wait_for, world::World};

/// Requests of one client run.
const REQUESTS: usize = 120;
/// Of the bad backend's answers, in percent.
const FAILING: u32 = 40;

pub(super) fn tell(world: &mut World) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    cast(world)?;
    if world.pod("shop", "flaky-1").is_err() {
        world.start_pod(&cluster::nginx("flaky-1", "flaky", "node-a", FAILING), true)?;
        world.start_pod(&cluster::nginx("flaky-2", "flaky", "node-b", 0), true)?;
        world.start_pod(&cluster::nginx("slow-1", "slow", "node-a", 0), true)?;
        world.start_pod(&cluster::nginx("slow-2", "slow", "node-b", 0), true)?;
    }
    let hang = world.pod("shop", "slow-1")?.scratch().join("hang");
    fs::write(&hang, "")?;

    let bare = failures(world, "flaky")?;
    evidence.claim(
        "without a TrafficPolicy the client sees the failing backend",
        bare > 0,
        format!("{bare} of {REQUESTS} requests failed"),
    );
    let bare = curl(
        world,
        "shop",
        "client",
        &["--max-time", "2", "http://slow.shop/?[1-4]"],
    )?;
    evidence.claim(
        "and it waits for the hanging one in vain",
        bare.out.contains("000"),
        format!("four requests: {}", bare.out.trim()),
    );

    world
        .directory
        .write("resilience", include_str!("../../cluster/resilience.yaml"))?;
    let calm = wait_for(Duration::from_secs(10), || {
        failures(world, "flaky").ok().filter(|failed| *failed == 0)
    });
    evidence.claim(
        "with retries it sees none of it",
        calm.is_some(),
        format!(
            "{REQUESTS} requests, {} failed",
            calm.map_or("some".into(), |n| n.to_string())
        ),
    );
    let again = failures(world, "slow")?;
    evidence.claim(
        "nor of the hanging one: each try has its own time limit",
        again == 0,
        format!("{again} of {REQUESTS} requests failed"),
    );
    ejection(world, &mut evidence)?;
    fs::remove_file(&hang)?;
    let back = served(world, "slow-1")?;
    let readmitted = wait_for(Duration::from_secs(15), || {
        failures(world, "slow").ok()?;
        served(world, "slow-1").ok().filter(|now| *now > back)
    });
    evidence.claim(
        "repaired, it is readmitted and serves again",
        readmitted.is_some(),
        format!(
            "slow-1 served {} requests after",
            readmitted.unwrap_or(back) - back
        ),
    );
    world.directory.remove("resilience")?;
    Ok(evidence)
}

/// The hanging endpoint is out: a whole run of requests does not reach it.
fn ejection(world: &World, evidence: &mut Evidence) -> Result<()> {
    let client = world.pod("shop", "client")?;
    let before = sent_to(client, world.pod("shop", "slow-1")?);
    failures(world, "slow")?;
    let to_bad = sent_to(client, world.pod("shop", "slow-1")?) - before;
    evidence.claim(
        "the hanging endpoint was ejected: others get the requests",
        to_bad <= REQUESTS / 20,
        format!("{to_bad} of the next {REQUESTS} requests ended there"),
    );
    let metrics = client.metrics()?;
    let line = metrics.lines().find(|line| {
        line.starts_with("turnpike_outlier_ejections_total{") && !line.ends_with(" 0")
    });
    evidence.claim(
        "and counted",
        line.is_some(),
        line.unwrap_or("no metric says so"),
    );
    Ok(())
}

/// One client run; how many of its requests were not answered 200.
fn failures(world: &World, service: &str) -> Result<usize> {
    let url = format!("http://{service}.shop/?[1-{REQUESTS}]");
    let said = curl(world, "shop", "client", &["--max-time", "2", &url])?;
    Ok(REQUESTS.saturating_sub(
        said.out
            .split_whitespace()
            .filter(|code| *code == "200")
            .count(),
    ))
}

/// Requests in the client's access log whose last try went to this pod.
fn sent_to(client: &Pod, pod: &Pod) -> usize {
    let host = format!("{}:", pod.address);
    let is = |entry: &serde_json::Value| {
        entry["upstream_host"]
            .as_str()
            .is_some_and(|upstream| upstream.starts_with(&host))
    };
    client.access_log().iter().filter(|entry| is(entry)).count()
}

/// Requests that a backend answered 200.
fn served(world: &World, name: &str) -> Result<usize> {
    let log = world.pod("shop", name)?.scratch().join("access.log");
    let text = fs::read_to_string(&log).with_context(|| log.display().to_string())?;
    Ok(text.lines().filter(|line| line.starts_with("200")).count())
}
