//! A run that ends leaves nothing, what a killed run leaves the next one removes, and what is kept
//! stays until it is taken down.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

use std::{
    fs,
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use turnpike_rig::{
    Options, Traces, World, cluster,
    otlp::{Sink, Span},
    story::STEPS,
    wait_for,
    world::{folder_of, program},
};

/// What one of these tests leaves for a moment, another would find; and a demo waits for the world
/// of another.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is there before a world of this name is.
fn clean(name: &str) -> Traces {
    World::clean(name).unwrap();
    Traces::of(name)
}

fn nothing_is_left(before: &Traces) {
    let left = before.added_since();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

/// Of each kind of trace something is there: what was not seen now would not be missed later.
fn all_kinds_are_seen(before: &Traces) {
    let there = before.added_since();
    for kind in ["namespace", "mount", "process", "folder"] {
        assert!(
            there.iter().any(|line| line.starts_with(kind)),
            "no {kind} in {there:#?}"
        );
    }
}

#[test]
fn a_world_taken_down_leaves_nothing() {
    let _alone = alone();
    let before = clean("tpt-gone");
    let mut world = World::up(Options::test("gone"), &|_| ()).unwrap();
    world.furnish().unwrap();
    let web = cluster::nginx("web-1", "web", "node-a", 0);
    world.start_pod(&web, true).unwrap();
    all_kinds_are_seen(&before);
    drop(world);
    nothing_is_left(&before);
}

/// The demo is killed when its first pod runs. Whatever stands by then is left, and what it started
/// to be kept lives on.
#[test]
fn the_next_run_removes_what_a_killed_one_left() {
    let _alone = alone();
    let before = clean("tpt-killed");
    let mut demo = demo("tpt-killed", &["--keep"]).spawn().unwrap();
    let sidecar = folder_of("tpt-killed").join("pods/pod-shop-web-1/pod-shop-web-1-web.process");
    let up = wait_for(Duration::from_secs(120), || sidecar.exists().then_some(()));
    demo.kill().unwrap();
    demo.wait().unwrap();
    assert!(up.is_some(), "the demo did not get as far as its first pod");
    all_kinds_are_seen(&before);

    // The next run, as it begins and as it ends.
    let world = World::up(Options::test("killed"), &|_| ()).unwrap();
    assert!(
        !folder_of("tpt-killed").join("pods").exists(),
        "files of the killed run are in the next one"
    );
    drop(world);
    nothing_is_left(&before);
}

/// Step 8 of the demo: the report, the exit status, and nothing left. The collector that the user
/// has named, outside of the box, gets what is measured in it.
#[test]
fn the_demo_reports_exports_and_leaves_nothing() {
    let _alone = alone();
    let before = clean("tpt-demo");
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let (_runtime, collector, endpoint) = collector();
    let status = demo("tpt-demo", &["--report", &page.to_string_lossy()])
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)
        .status()
        .unwrap();
    assert!(status.success(), "the demo ended with {status}");
    nothing_is_left(&before);

    let page = fs::read_to_string(page).unwrap();
    for step in STEPS {
        assert!(
            page.contains(step.title),
            "{} is not in the report",
            step.title
        );
    }
    assert!(
        page.contains(&endpoint),
        "the collector is not in the report"
    );
    assert!(
        !page.contains("http-equiv") && !page.contains("<script src"),
        "it needs nothing else"
    );
    let traced = |span: &Span| span.attributes.values().any(|v| v.contains("/traced"));
    let spans = collector.trace_of(traced);
    assert!(spans.len() >= 2, "the collector got {spans:?}");
    let metrics = collector.metric_names();
    assert!(
        metrics.contains_key("istio_requests_total"),
        "the collector got {metrics:?}"
    );
}

fn collector() -> (tokio::runtime::Runtime, Sink, String) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let entered = runtime.enter();
    let collector = Sink::serve(listener).unwrap();
    drop(entered);
    (runtime, collector, endpoint)
}

/// One claim that does not hold is enough: the collector that is named is not there.
#[test]
fn a_step_that_does_not_hold_is_the_exit_status() {
    let _alone = alone();
    let before = clean("tpt-false");
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let nowhere = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let arguments = ["--steps", "1,7", "--report", &page.to_string_lossy()];
    let output = demo("tpt-false", &arguments)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &nowhere)
        .stdout(Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Not every step held"), "{said}");
    let broken = format!("✗ the collector at {nowhere}");
    assert_eq!(said.matches("    ✗ ").count(), 1, "{said}");
    assert!(said.contains(&broken), "{said}");
    let page = fs::read_to_string(page).unwrap();
    assert_eq!(page.matches("<li class=\"broken\">").count(), 1, "{page}");
    nothing_is_left(&before);
}

/// A demo that was kept serves when its program has ended, follows its policies, and goes when it is
/// told to.
#[test]
fn what_is_kept_serves_until_it_is_taken_down() {
    let _alone = alone();
    let before = clean("tpt-kept");
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let arguments = [
        "--keep",
        "--steps",
        "4",
        "--report",
        &page.to_string_lossy(),
    ];
    let status = demo("tpt-kept", &arguments).status().unwrap();
    assert!(status.success(), "the demo ended with {status}");

    let policies = folder_of("tpt-kept").join("policies");
    let caller = |url: &str| in_pod("tpt-kept", "legacy-caller", url);
    assert_eq!(in_pod("tpt-kept", "shop-client", "http://web.shop/"), "200");
    let web = fs::read_to_string(policies.join("pod-shop-web-1.yaml")).unwrap();
    let web: serde_json::Value = serde_json::from_str(&web).unwrap();
    let direct = format!(
        "http://{}:8080/",
        web["status"]["podIP"].as_str().unwrap_or_default()
    );
    assert_eq!(caller(&direct), "200");
    let strict = include_str!("../rig/cluster/strict.yaml");
    fs::write(policies.join("strict.yaml"), strict).unwrap();
    let refused = wait_for(Duration::from_secs(10), || {
        (caller(&direct) != "200").then_some(())
    });
    assert!(refused.is_some(), "a policy that is saved takes no effect");
    assert_eq!(in_pod("tpt-kept", "shop-client", "http://web.shop/"), "200");

    let down = demo("tpt-kept", &["down"]).status().unwrap();
    assert!(down.success(), "`demo down` ended with {down}");
    nothing_is_left(&before);
}

/// The status that curl gets in a pod, as the demo says how to look.
fn in_pod(name: &str, pod: &str, url: &str) -> String {
    let resolver = folder_of(name).join(format!("pods/pod-{pod}/resolv.conf"));
    let line = "mount --bind \"$0\" /etc/resolv.conf && exec setpriv --reuid 1000 --clear-groups \
                curl -s -o /dev/null -w '%{http_code}' --max-time 3 \"$1\"";
    let output = Command::new("ip")
        .args(["netns", "exec", &format!("{name}-{pod}"), "sh", "-c", line])
        .arg(resolver)
        .arg(url)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn demo(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("turnpike").unwrap());
    command
        .args(["demo", "--name", name])
        .args(arguments)
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
        .stdin(Stdio::null());
    command
}
