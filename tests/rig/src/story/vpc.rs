//! Step 1: the VPC is there, is isolated, and behaves like EC2.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result};
use turnpike_vpc::{
    netns::{Command, Namespace},
    run::ReadyInstance,
};

use crate::{claims::Evidence, wait_for, world::World};

/// What the box says an instance is, by name: its type and its zone.
const INSTANCES: [(&str, &str, &str); 2] = [
    ("node-a", "m5.large", "eu-west-1a"),
    ("node-b", "t3.medium", "eu-west-1b"),
];
/// The pretended internet: a payment API, a partner, an attacker.
const HOSTS: [&str; 3] = [
    "api.payments.example",
    "partner.example",
    "attacker.example",
];
const METADATA: &str = "http://169.254.169.254/latest/meta-data";
const TOKEN: &str = "http://169.254.169.254/latest/api/token";
const TTL: &str = "X-aws-ec2-metadata-token-ttl-seconds: 60";
const STATUS: [&str; 4] = ["-o", "/dev/null", "-w", "%{http_code}"];
/// A datagram to the attacker with the node's own address, which must arrive, then one with an
/// address that nobody assigned. Datagrams, since nothing need come back for them to be heard.
const SPOOF: &str = "\
way=$(ip -4 route show default | head -n 1 | sed 's/^default //; s/ proto .*//')
echo own > /dev/udp/203.0.113.66/7001
ip addr add 10.0.63.77/32 dev lo
ip route add 203.0.113.66/32 $way src 10.0.63.77
echo borrowed > /dev/udp/203.0.113.66/7002
ip route del 203.0.113.66/32
ip addr del 10.0.63.77/32 dev lo";

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
    for (name, kind, zone) in INSTANCES {
        let node = &world.node(name)?.namespace;
        let instance = world.ready.instances.get(name);
        let instance = instance.with_context(|| format!("the box has no instance {name}"))?;
        metadata(node, name, [kind, zone], instance, &mut evidence)?;
    }
    internet(world, &mut evidence)?;
    unassigned(world, &mut evidence)?;
    Ok(evidence)
}

fn metadata(
    node: &Namespace,
    name: &str,
    [kind, zone]: [&str; 2],
    instance: &ReadyInstance,
    evidence: &mut Evidence,
) -> Result<()> {
    let without = run(
        node,
        &[&STATUS[..], &[&format!("{METADATA}/instance-type")]].concat(),
    )?;
    evidence.claim(
        format!("{name}'s instance metadata asks for a token"),
        without == "401",
        &without,
    );
    let token = run(node, &["-X", "PUT", "-H", TTL, TOKEN])?;
    let header = format!("X-aws-ec2-metadata-token: {token}");
    let ask = |path: &str| run(node, &["-H", &header, &format!("{METADATA}/{path}")]);
    let said = [
        ask("instance-type")?,
        ask("placement/availability-zone")?,
        ask("local-ipv4")?,
    ];
    evidence.claim(
        format!("with a token, {name} is {kind} in {zone}, at the address that EC2 gave it"),
        said == [
            kind.to_owned(),
            zone.to_owned(),
            instance.address.to_string(),
        ],
        said.join(" "),
    );
    Ok(())
}

/// By the VPC's resolver and through the NAT gateway, with certificates that verify.
fn internet(world: &World, evidence: &mut Evidence) -> Result<()> {
    let node = &world.node("node-a")?.namespace;
    let resolver = world.folder.join("resolv.conf");
    fs::write(
        &resolver,
        format!("nameserver {}\n", world.ready.resolver.ip()),
    )?;
    let root = world.ready.root.to_string_lossy();
    for host in HOSTS {
        let url = format!("https://{host}/");
        let line = [&STATUS[..], &["--max-time", "5", "--cacert", &root, &url]].concat();
        let status = run_by(node, &line, Some(&resolver))?;
        evidence.claim(
            format!("{host} is a name of the pretended internet, reached by HTTPS through the NAT gateway"),
            status == "200",
            &status,
        );
    }
    Ok(())
}

/// What is heard of an address that EC2 has not assigned, at the other end.
fn unassigned(world: &World, evidence: &mut Evidence) -> Result<()> {
    let node = &world.node("node-a")?.namespace;
    Command::new("bash").args(["-c", SPOOF]).output(node)?;
    let heard = |port: u16| {
        let log = fs::read_to_string(&world.ready.internet_log).unwrap_or_default();
        let wanted = format!("\"port\":{port}");
        log.lines().any(|line| line.contains(&wanted))
    };
    let own = wait_for(Duration::from_secs(3), || heard(7001).then_some(()));
    // It would have come right behind.
    thread::sleep(Duration::from_millis(300));
    let borrowed = heard(7002);
    evidence.claim(
        "the fabric drops what comes from an address that EC2 has not assigned",
        own.is_some() && !borrowed,
        format!(
            "from the node's own address {}, from 10.0.63.77 {}",
            if own.is_some() { "heard" } else { "not heard" },
            if borrowed { "heard" } else { "not heard" }
        ),
    );
    Ok(())
}

fn run(node: &Namespace, arguments: &[&str]) -> Result<String> {
    run_by(node, arguments, None)
}

/// What curl says on a node, with a resolver of its own where names are asked for.
fn run_by(node: &Namespace, arguments: &[&str], resolver: Option<&Path>) -> Result<String> {
    let mut command = Command::new("curl").arg("-s").args(arguments);
    if let Some(file) = resolver {
        command = command.bind_read_only(file, "/etc/resolv.conf");
    }
    let output = command.output(node)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
