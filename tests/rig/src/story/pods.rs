//! Step 3: pods get VPC addresses from the CNI executable and reach each other across nodes.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use turnpike_vpc::netns::{Command, Namespace};

use super::cast;
use crate::{Pod, capture::Capture, claims::Evidence, cluster, http, pods::name_of, world::World};

/// Where an agent shows its pool.
const INTROSPECTION: &str = "127.0.0.1:61679";

/// Enough small pods on a t3.medium (five secondary addresses an interface) to need a second one.
const CROWD: usize = 6;

pub(super) fn tell(world: &mut World) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    cast(world)?;
    let web = world.pod("shop", "web-1")?.address;
    let client = world.pod("shop", "client")?.address;
    let in_zone = |address: IpAddr, third: std::ops::Range<u8>| matches!(address, IpAddr::V4(v4) if v4.octets()[..2] == [10, 0] && third.contains(&v4.octets()[2]));
    evidence.claim(
        "pods have addresses of their node's subnet",
        in_zone(web, 0..64) && in_zone(client, 64..128),
        format!("shop/web-1 {web} in zone a, shop/client {client} in zone b"),
    );
    evidence.claim(
        "the namespace's label gives pods a sidecar, others have none",
        world.pod("shop", "web-1")?.sidecar.is_some()
            && world.pod("legacy", "caller")?.sidecar.is_none(),
        "shop is labelled, legacy is not",
    );

    let begun = Instant::now();
    for index in 0..CROWD {
        let name = format!("crowd-{index}");
        world.start_pod(&cluster::client("legacy", &name, "crowd", "node-b"), false)?;
    }
    evidence.figure(
        "six pods, CNI ADD to running",
        format!("{:.2} s", begun.elapsed().as_secs_f64()),
    );
    second_interface(world, &mut evidence)?;

    let target = format!("http://{web}:8080/");
    let mut reached = 0;
    let deadline = Instant::now() + Duration::from_secs(60);
    for index in 0..CROWD {
        let name = format!("crowd-{index}");
        let said = super::curl(world, "legacy", &name, &[&target])?;
        reached += usize::from(said.out.trim() == "200" && Instant::now() < deadline);
    }
    evidence.claim(
        "every one of them reaches nginx on the other node, in the other zone",
        reached == CROWD,
        format!("{reached} of {CROWD}"),
    );
    for index in 0..CROWD {
        world.delete_pod("legacy", &format!("crowd-{index}"))?;
    }
    borrowed_address(world, &mut evidence)?;
    Ok(evidence)
}

/// Some pod's address is of an interface that the agent had EC2 attach, and what the pod sends
/// leaves by that one: anywhere else the fabric would drop it.
fn second_interface(world: &World, evidence: &mut Evidence) -> Result<()> {
    let node = &world.node("node-b")?.namespace;
    let answer = http::get(node, INTROSPECTION.parse()?, "/v1/enis")?;
    let enis: Value = serde_json::from_str(&answer.body)?;
    let second = enis["enis"].as_array().and_then(|enis| {
        let attached = |eni: &&Value| eni["deviceIndex"] == 1;
        enis.iter().find(attached)
    });
    let on_it = |pod: &&Pod| {
        let address = Value::from(pod.address.to_string());
        let addresses = second.and_then(|eni| eni["addresses"].as_array());
        addresses.is_some_and(|all| all.contains(&address))
    };
    let says = "a pod's address is of a second network interface, by which its packets leave";
    let crowd = world.pods.values().filter(|pod| pod.node == "node-b");
    let (Some(eni), Some(pod)) = (second, crowd.clone().find(on_it)) else {
        evidence.claim(says, false, format!("{} pods, {enis}", crowd.count()));
        return Ok(());
    };
    let mac = eni["mac"].as_str().unwrap_or_default();
    let before = sent_by(node, mac)?;
    let target = format!("http://{}:8080/", world.pod("shop", "web-1")?.address);
    let (namespace, name) = (
        name_of(&pod.object.metadata.namespace),
        name_of(&pod.object.metadata.name),
    );
    let said = super::curl(world, &namespace, &name, &[&target])?;
    let packets = sent_by(node, mac)?.saturating_sub(before);
    evidence.claim(
        says,
        packets > 3 && said.out.trim() == "200",
        format!("{name} {} of {}: {packets} packets", pod.address, eni["id"]),
    );
    Ok(())
}

/// Packets that the link with this MAC has sent.
fn sent_by(node: &Namespace, mac: &str) -> Result<u64> {
    let line = ["-j", "-s", "link", "show"];
    let output = Command::new("ip").args(line).output(node)?;
    let links: Value = serde_json::from_slice(&output.stdout)?;
    let links = links.as_array().map(Vec::as_slice).unwrap_or_default();
    let link = links.iter().find(|link| link["address"] == mac);
    let packets = link.and_then(|link| link["stats64"]["tx"]["packets"].as_u64());
    packets.with_context(|| format!("no link has the MAC {mac}"))
}

/// A pod that sends with its neighbour's address, which EC2 has assigned to the same interface, is
/// not heard: its veth lets out its own address alone.
fn borrowed_address(world: &World, evidence: &mut Evidence) -> Result<()> {
    let (caller, lender) = (world.pod("legacy", "caller")?, world.pod("shop", "client")?);
    let web = world.pod("shop", "web-1")?;
    let target = format!("http://{}:8080/", web.address);
    let capture = Capture::begin(&web.namespace, &world.folder)?;
    super::curl(world, "legacy", "caller", &[&target])?;
    let borrow = format!(
        "ip addr add {0}/32 dev lo; curl -s --max-time 1 --interface {0} {target}; \
         ip addr del {0}/32 dev lo",
        lender.address
    );
    world.exec_as(caller, 0, &["bash", "-c", &borrow])?;
    let wire = capture.finish()?;
    evidence.claim(
        "a pod is heard with its own address, and not with its neighbour's",
        wire.heard(caller.address) && !wire.heard(lender.address),
        format!(
            "at nginx: {} {}, {} {}",
            caller.address,
            if wire.heard(caller.address) {
                "heard"
            } else {
                "not heard"
            },
            lender.address,
            if wire.heard(lender.address) {
                "heard"
            } else {
                "not heard"
            },
        ),
    );
    Ok(())
}
