//! Step 3: pods get VPC addresses from the CNI executable and reach each other across nodes.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::Result;
use turnpike_vpc::netns::Command;

use super::cast;
use crate::{claims::Evidence, cluster, world::World};

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
    let node = world.node("node-b")?.namespace.clone();
    let show = |what: &str| -> Result<String> {
        let output = Command::new("ip")
            .args(["-4", what, "show"])
            .output(&node)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (links, rules) = (show("addr")?, show("rule")?);
    evidence.claim(
        "the sixth pod's address is on a second network interface, with rules of its own",
        links.contains("eth1") && rules.contains("1536:"),
        format!("{} policy rules on node-b", rules.lines().count()),
    );

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
    Ok(evidence)
}
