//! What people and attackers send by mistake or on purpose: refused with a reason, without a side
//! effect, and without harm to the neighbours.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

mod certificates;
mod cni;
mod wire;
mod yaml;

use std::time::Duration;

use turnpike_rig::{Options, World, cluster, wait_for};

const SOON: Duration = Duration::from_secs(10);
const WEB: &str = "http://10.96.0.20/";

fn world(name: &str) -> World {
    let mut world = World::up(Options::test(name), &|_| ()).unwrap();
    world.furnish().unwrap();
    world
        .start_pod(&cluster::nginx("web-1", "web", "node-a", 0), true)
        .unwrap();
    world
        .start_pod(&cluster::client("shop", "client", "client", "node-b"), true)
        .unwrap();
    world
        .start_pod(
            &cluster::client("legacy", "caller", "caller", "node-b"),
            false,
        )
        .unwrap();
    assert!(wait_for(SOON, || served(&world).then_some(())).is_some());
    world
}

fn served(world: &World) -> bool {
    let line = [
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "--max-time",
        "3",
        WEB,
    ];
    world
        .exec("shop", "client", &line)
        .is_ok_and(|said| said.out == "200")
}
