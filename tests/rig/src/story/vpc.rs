//! Step 1: the VPC is there, is isolated, and behaves like EC2.

use anyhow::Result;
use turnpike_vpc::netns::{Command, Namespace};

use crate::{claims::Evidence, world::World};

pub(super) fn tell(world: &mut World) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    let isolation = world.prove_isolation();
    evidence.claim(
        "no namespace has a way out to this machine's network",
        isolation.is_ok(),
        isolation.map_or_else(
            |error| error.to_string(),
            |()| "every link ends in the box".into(),
        ),
    );

    let node = world.node("node-a")?.namespace.clone();
    let without = run(
        &node,
        &["-s", "-o", "/dev/null", "-w", "%{http_code}", METADATA],
    )?;
    evidence.claim(
        "instance metadata asks for a token",
        without == "401",
        &without,
    );
    let token = run(&node, &["-s", "-X", "PUT", "-H", TTL, TOKEN])?;
    let header = format!("X-aws-ec2-metadata-token: {token}");
    let kind = run(&node, &["-s", "-H", &header, METADATA])?;
    evidence.claim(
        "with a token, node-a is an m5.large",
        kind == "m5.large",
        &kind,
    );

    let root = world.ready.root.clone();
    let outside = run(
        &node,
        &[
            "-s",
            "--max-time",
            "5",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "--cacert",
            &root.to_string_lossy(),
            "--resolve",
            "api.payments.example:443:203.0.113.10",
            "https://api.payments.example/",
        ],
    )?;
    evidence.claim(
        "the NAT gateway leads to the pretended internet",
        outside == "200",
        &outside,
    );

    let unassigned = Command::new("sh")
        .args(["-c", SPOOF])
        .output(&node)
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())?;
    evidence.claim(
        "the fabric drops an address that EC2 has not assigned",
        unassigned.trim() == "dropped",
        unassigned.trim(),
    );
    Ok(evidence)
}

const METADATA: &str = "http://169.254.169.254/latest/meta-data/instance-type";
const TOKEN: &str = "http://169.254.169.254/latest/api/token";
const TTL: &str = "X-aws-ec2-metadata-token-ttl-seconds: 60";
/// First with the node's own address, which must arrive, then with one nobody assigned.
const SPOOF: &str = "\
curl -s --max-time 2 -o /dev/null -k https://203.0.113.10/ || { echo 'not even its own'; exit; }
ip addr add 10.0.63.77/32 dev lo
curl -s --max-time 1 -o /dev/null -k --interface 10.0.63.77 https://203.0.113.10/ && echo passed || echo dropped
ip addr del 10.0.63.77/32 dev lo";

fn run(node: &Namespace, arguments: &[&str]) -> Result<String> {
    let output = Command::new("curl").args(arguments).output(node)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
