//! containerd and runc, as Debian ships them, call the CNI executable by themselves.
//!
//! 1. containerd runs on a node of the box, with a conflist that names `turnpike-cni`;
//! 2. a pod sandbox is asked of it over the Container Runtime Interface, as a kubelet asks;
//! 3. its address is one of the VPC's, traffic flows, and removing it gives the address back.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

mod containerd;
mod image;

use std::{net::IpAddr, time::Duration};

use serde_json::json;
use turnpike_rig::{Options, World, cluster, http, wait_for};

use crate::containerd::{Containerd, Request};

const SOON: Duration = Duration::from_secs(10);

/// Answers one request after the other with the same line.
const SERVE: &str =
    "while true; do printf 'HTTP/1.0 200 OK\\r\\n\\r\\nboxed' | busybox nc -l -p 8080; done";

#[test]
fn containerd_gives_pods_vpc_addresses() {
    let mut world = World::up(Options::test("runtime"), &|_| ()).unwrap();
    world.furnish().unwrap();
    world
        .start_pod(
            &cluster::client("legacy", "caller", "caller", "node-b"),
            false,
        )
        .unwrap();
    let runtime = Containerd::start(&world, "node-a").unwrap();
    let ready = wait_for(SOON, || runtime.network_ready().ok()?.then_some(()));
    assert!(
        ready.is_some(),
        "STATUS tells containerd that the network is ready"
    );

    let request = Request {
        namespace: "legacy",
        name: "boxed",
        uid: "6a1d0d2e-boxed",
    };
    world
        .directory
        .write_object("pod-legacy-boxed", &bound_pod(&request))
        .unwrap();
    let before = assigned(&world);
    let sandbox = runtime.run_sandbox(&request).unwrap();
    assert_eq!(assigned(&world), before + 1.0, "the address is taken");
    let address: IpAddr = sandbox.address.parse().unwrap();
    assert!(
        sandbox.address.starts_with("10.0."),
        "{} is no address of the VPC",
        sandbox.address
    );

    let container = runtime
        .start_container(&sandbox, &["sh", "-c", SERVE])
        .unwrap();
    let shown = runtime
        .exec(&container, &["ip", "-4", "addr", "show", "eth0"])
        .unwrap();
    assert!(shown.contains(&format!("{address}/32")), "{shown}");
    let url = format!("http://{address}:8080/");
    let line = ["curl", "-s", "--max-time", "5", &url];
    let answered = wait_for(SOON, || {
        let said = world.exec("legacy", "caller", &line).unwrap();
        (said.out.trim() == "boxed").then_some(())
    });
    assert!(answered.is_some(), "{url} is not answered");

    runtime.remove_sandbox(&sandbox).unwrap();
    let node = &world.node("node-a").unwrap().namespace;
    let output = turnpike_vpc::netns::Command::new("ip")
        .args(["route"])
        .output(node)
        .unwrap();
    let routes = String::from_utf8_lossy(&output.stdout);
    assert!(
        !routes.contains(&sandbox.address),
        "the pod's route is gone: {routes}"
    );
    assert_eq!(assigned(&world), before, "the address is not given back");
}

/// How many addresses the node's agent has given to pods.
fn assigned(world: &World) -> f64 {
    let node = &world.node("node-a").unwrap().namespace;
    let address = "127.0.0.1:61678".parse().unwrap();
    let metrics = http::get(node, address, "/metrics").unwrap().body;
    let name = "awscni_assigned_ip_addresses";
    let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// What the API server would say of the pod by then.
fn bound_pod(request: &Request<'_>) -> serde_json::Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": request.namespace, "name": request.name, "uid": request.uid},
        "spec": {"nodeName": "node-a", "containers": [{"name": "app", "image": image::NAME}]},
    })
}
