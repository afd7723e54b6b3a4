//! Step 5: a failing and a hanging backend, with and without a TrafficPolicy.
//!
//! The same client run is shown both ways: so many requests, so many at a time. They are at a time
//! because one after the other they would show little: the balancer turns away from an endpoint
//! that keeps one request waiting, and ejection would never have three failures in a row to count.
//! With the policy it is shown first, since a balancer that has seen callers give up on an endpoint asks it
//! too little for ejection to be seen; one that comes back from it starts afresh.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::cast;
use crate::{Pod, claims::Evidence, cluster, wait_for, world::World};

/// Requests of one client run, and how many of them at a time.
const REQUESTS: usize = 120;
const PARALLEL: usize = 24;
/// Of the bad backend's answers, in percent.
const FAILING: u32 = 40;
const SOON: Duration = Duration::from_secs(10);
/// Longer than an ejection lasts.
const READMITTED: Duration = Duration::from_secs(20);

/// A client run: what is called, for how long at most each time.
struct Run {
    service: &'static str,
    path: &'static str,
    seconds: &'static str,
}

const FLAKY: Run = Run {
    service: "flaky",
    path: "/?",
    seconds: "5",
};
const SLOW: Run = Run {
    service: "slow",
    path: "/work?",
    seconds: "4",
};
/// The same, to be told apart in the log.
const EJECTED: Run = Run {
    path: "/work?ejected-",
    ..SLOW
};

pub(super) fn tell(world: &mut World) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    cast(world)?;
    if world.pod("shop", "flaky-1").is_err() {
        world.start_pod(&cluster::nginx("flaky-1", "flaky", "node-a", FAILING), true)?;
        world.start_pod(&cluster::nginx("flaky-2", "flaky", "node-b", 0), true)?;
        world.start_pod(&cluster::nginx("slow-1", "slow", "node-a", 0), true)?;
        world.start_pod(&cluster::nginx("slow-2", "slow", "node-b", 0), true)?;
    }
    // A sidecar asks for a Service, and so for its policy, when it is first called.
    let urls = ["http://flaky.shop/", "http://slow.shop/"];
    world.exec("shop", "client", &[&["curl", "-s"], &urls[..]].concat())?;
    let hang = world.pod("shop", "slow-1")?.scratch().join("hang");
    fs::write(&hang, "")?;
    let runs = [
        (FLAKY, "the failing backend"),
        (SLOW, "the hanging backend"),
    ];
    world
        .directory
        .write("resilience", include_str!("../../cluster/resilience.yaml"))?;
    let acknowledged = wait_for(SOON, || acknowledged(world));
    evidence.claim(
        "the TrafficPolicy is acknowledged by the sidecars that it concerns",
        acknowledged.is_some(),
        acknowledged.unwrap_or_default(),
    );
    for (run, what) in &runs {
        let failed = failures(world, run)?;
        evidence.claim(
            format!("with it a client run sees nothing of {what}"),
            failed == 0,
            format!("{failed} of {REQUESTS} requests failed"),
        );
    }
    ejection(world, &hang, &mut evidence)?;
    world.directory.remove("resilience")?;
    fs::write(&hang, "")?;
    for (run, what) in &runs {
        // As soon as the proxies have heard of it.
        let failed = wait_for(SOON, || failures(world, run).ok().filter(|n| *n > 0));
        evidence.claim(
            format!("without the TrafficPolicy the same client run sees {what}"),
            failed.is_some(),
            format!("{} of {REQUESTS} requests failed", failed.unwrap_or(0)),
        );
    }
    fs::remove_file(&hang)?;
    Ok(evidence)
}

/// The hanging endpoint is out for its time, whatever it would answer, and no longer.
fn ejection(world: &World, hang: &std::path::Path, evidence: &mut Evidence) -> Result<()> {
    let (client, bad) = (world.pod("shop", "client")?, world.pod("shop", "slow-1")?);
    let counted = series(client, "turnpike_outlier_ejections_total");
    let is_out = || series(client, "turnpike_outlier_ejected") == Some(1.0);
    evidence.claim(
        "the hanging endpoint was ejected, and that is counted",
        counted >= Some(1.0) && is_out(),
        format!(
            "turnpike_outlier_ejections_total {}",
            counted.unwrap_or(0.0)
        ),
    );
    fs::remove_file(hang)?;
    let before = served(bad)?;
    let failed = failures(world, &EJECTED)?;
    let meanwhile = served(bad)? - before;
    let tries = tries_of(client, &EJECTED);
    evidence.claim(
        "while it is out all requests go to the other one, at the first try, though it is repaired",
        (failed, meanwhile, tries) == (0, 0, REQUESTS) && is_out(),
        format!("{REQUESTS} requests, {tries} tries, {meanwhile} of them there, {failed} failed"),
    );
    let readmitted = wait_for(READMITTED, || {
        failures(world, &SLOW).ok()?;
        // The gauge follows at the sidecar's next look.
        served(bad).ok().filter(|now| *now > before && !is_out())
    });
    evidence.claim(
        "its time over, it is readmitted and serves again",
        readmitted.is_some(),
        format!(
            "slow-1 served {} requests since",
            readmitted.unwrap_or(before) - before
        ),
    );
    Ok(())
}

/// Who has the policy, once all that watch it do.
fn acknowledged(world: &World) -> Option<String> {
    let status: Value =
        serde_json::from_str(&world.ask_controller("/debug/status").ok()?.body).ok()?;
    let is_it = |policy: &&Value| policy["object"] == "TrafficPolicy shop/patient";
    let proxies = &status["policies"].as_array()?.iter().find(is_it)?["proxies"];
    let (accepted, watched) = (proxies["accepted"].as_u64()?, proxies["watched"].as_u64()?);
    (watched > 0 && accepted == watched).then(|| format!("{accepted} of {watched} proxies"))
}

/// One client run; how many of its requests were not answered 200.
fn failures(world: &World, run: &Run) -> Result<usize> {
    let Run {
        service,
        path,
        seconds,
    } = run;
    let url = format!("http://{service}.shop{path}[1-{REQUESTS}]");
    let parallel = PARALLEL.to_string();
    let line = [
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code} ",
        "--max-time",
        seconds,
        "--parallel",
        "--parallel-immediate",
        "--parallel-max",
        &parallel,
        &url,
    ];
    let said = world.exec("shop", "client", &line)?;
    let good = said.out.split_whitespace().filter(|code| *code == "200");
    Ok(REQUESTS.saturating_sub(good.count()))
}

/// The value of a sidecar's metric for the Service with the hanging backend.
fn series(pod: &Pod, name: &str) -> Option<f64> {
    let metrics = pod.metrics().ok()?;
    let line = metrics
        .lines()
        .find(|line| line.starts_with(name) && line.contains("slow.shop"))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// How often endpoints were tried for the requests of a run, by the client's sidecar's log.
fn tries_of(client: &Pod, run: &Run) -> usize {
    let tries = || -> Vec<u64> {
        let is_of = |entry: &&Value| {
            let path = entry["path"].as_str();
            path.is_some_and(|path| path.starts_with(run.path))
        };
        let log = client.access_log();
        let entries = log.iter().filter(is_of);
        entries
            .filter_map(|entry| entry["attempts"].as_u64())
            .collect()
    };
    // Lines are written a little after the answer.
    wait_for(Duration::from_secs(3), || {
        (tries().len() >= REQUESTS).then_some(())
    });
    tries().iter().sum::<u64>() as usize
}

/// Requests that a backend answered 200.
fn served(pod: &Pod) -> Result<usize> {
    let log = pod.scratch().join("access.log");
    let text = fs::read_to_string(&log).with_context(|| log.display().to_string())?;
    Ok(text.lines().filter(|line| line.starts_with("200")).count())
}
