//! A run that ends leaves nothing; what a killed run leaves, the next one removes.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

use std::{
    collections::BTreeSet,
    fs,
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use turnpike_rig::{Options, World, cluster, story::STEPS, world::program};

/// What one of these tests leaves for a moment, another would find; and a demo waits for the world
/// of another.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything of this machine that a world might leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    namespaces: BTreeSet<String>,
    mounts: BTreeSet<String>,
    links: BTreeSet<String>,
    rules: String,
    processes: BTreeSet<String>,
    files: bool,
}

fn traces(name: &str) -> Traces {
    let list = |folder: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    };
    let output = |program: &str, arguments: &[&str]| {
        let output = Command::new(program)
            .args(arguments)
            .output()
            .expect("it is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let ours = |text: &String| text.contains(name);
    let command_line = |pid: &String| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ")
    };
    Traces {
        namespaces: list("/run/netns").into_iter().filter(ours).collect(),
        mounts: mounts.lines().map(str::to_owned).filter(ours).collect(),
        links: list("/sys/class/net"),
        rules: output("nft", &["list", "ruleset"]) + &output("ip", &["rule"]),
        processes: list("/proc")
            .iter()
            .map(command_line)
            .filter(ours)
            .collect(),
        files: fs::exists(format!("/run/turnpike-box/{name}")).unwrap_or(true),
    }
}

#[test]
fn a_world_taken_down_leaves_nothing() {
    let _alone = alone();
    let name = "tpt-gone";
    World::clean(name).unwrap();
    let before = traces(name);
    let mut world = World::up(Options::test("gone"), &|_| ()).unwrap();
    world.furnish().unwrap();
    world
        .start_pod(&cluster::nginx("web-1", "web", "node-a", 0), true)
        .unwrap();
    assert_ne!(
        traces(name),
        before,
        "the test would see a namespace, a process, a file"
    );
    drop(world);
    assert_eq!(traces(name), before);
}

/// The demo is killed while it brings its second node up; whatever stands by then is left.
#[test]
fn the_next_run_removes_what_a_killed_one_left() {
    let _alone = alone();
    let name = "tpt-killed";
    World::clean(name).unwrap();
    let before = traces(name);
    let mut demo = demo(name, &["--keep"]);
    let up = turnpike_rig::wait_for(Duration::from_secs(60), || {
        fs::exists(format!("/run/turnpike-box/{name}/node-b"))
            .ok()?
            .then_some(())
    });
    demo.kill().unwrap();
    demo.wait().unwrap();
    assert!(
        up.is_some(),
        "the demo did not get as far as its second node"
    );
    assert_ne!(
        traces(name),
        before,
        "a killed demo leaves something to clean"
    );

    World::clean(name).unwrap();
    assert_eq!(traces(name), before);
}

/// Step 8 of the demo: the report, and the exit status.
#[test]
fn the_demo_reports_and_leaves_nothing() {
    let _alone = alone();
    let name = "tpt-demo";
    World::clean(name).unwrap();
    let before = traces(name);
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let status = demo(name, &["--report", &page.to_string_lossy()])
        .wait()
        .unwrap();
    assert!(status.success(), "the demo ended with {status}");
    assert_eq!(traces(name), before);
    let page = fs::read_to_string(page).unwrap();
    for step in STEPS {
        assert!(
            page.contains(step.title),
            "{} is not in the report",
            step.title
        );
    }
    assert!(
        !page.contains("http-equiv") && !page.contains("<script src"),
        "it needs nothing else"
    );
}

fn demo(name: &str, arguments: &[&str]) -> Child {
    Command::new(program("turnpike").unwrap())
        .args(["demo", "--name", name])
        .args(arguments)
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}
