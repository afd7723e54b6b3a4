//! EgressPolicy on a real cluster: what is allowed leaves, nothing else, and all of it is on record.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use turnpike_cluster::{Cluster, Said, chart, kubectl::Kubectl, workloads};

use crate::stage::{EFFECT, SOON, curl, soon};

/// With a sidecar, and without.
const SELECTED: [(&str, bool); 2] = [("pay", true), ("pay-plain", false)];
const ATTACKER: &str = "203.0.113.66";

fn policy(namespace: &str) -> Value {
    json!({
        "apiVersion": "turnpike.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"name": "payments", "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": {"app": "payer"}},
            "mode": "Enforce",
            "allow": [
                {"hosts": ["api.payments.example"], "ports": [{"port": 443, "protocol": "TLS"}]},
                {
                    "hosts": ["partner.example"], "ports": [{"port": 80, "protocol": "HTTP"}],
                    "http": {"methods": ["GET"], "paths": [{"prefix": "/v1/"}]},
                },
            ],
        },
    })
}

pub(crate) fn held_and_recorded(cluster: &mut Cluster) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut objects = Vec::new();
    for (namespace, meshed) in SELECTED {
        objects.push(workloads::namespace(namespace, meshed));
        objects.extend(workloads::client(namespace, "payer", "payer", "node-b"));
        objects.extend(workloads::client(namespace, "free", "free", "node-b"));
    }
    kubectl.apply(&workloads::list(&objects))?;
    for (namespace, _) in SELECTED {
        for pod in ["pod/payer", "pod/free"] {
            kubectl.wait(namespace, pod, "condition=Ready", SOON)?;
        }
        // The way is open before; otherwise a refusal would prove nothing.
        let said = curl(kubectl, namespace, "payer", &["https://attacker.example/"])?;
        ensure!(said.out == "200", "before the policy: {}", said.all());
    }
    for (namespace, _) in SELECTED {
        kubectl.apply(&policy(namespace).to_string())?;
        soon(EFFECT, "the policy takes effect", || {
            Ok(curl(kubectl, namespace, "payer", &["https://attacker.example/"])?.out != "200")
        })?;
    }
    let before = attacks(cluster);
    for (namespace, _) in SELECTED {
        attempts(kubectl, namespace).with_context(|| namespace.to_owned())?;
    }
    ensure!(
        attacks(cluster) == before,
        "a selected pod reached the attacker"
    );
    let said = curl(kubectl, "pay", "free", &[&format!("https://{ATTACKER}/")])?;
    ensure!(
        said.out == "200" && attacks(cluster) > before,
        "an unselected pod would be seen: {}",
        said.all()
    );
    for (namespace, _) in SELECTED {
        recorded(kubectl, namespace)?;
    }
    Ok(())
}

fn attempts(kubectl: &Kubectl, namespace: &str) -> Result<()> {
    let call = |arguments: &[&str]| curl(kubectl, namespace, "payer", arguments);
    for (arguments, status) in [
        (&["https://api.payments.example/"][..], "200"),
        (&["http://partner.example/v1/orders"], "200"),
    ] {
        let said = call(arguments)?;
        ensure!(
            said.out == status,
            "{arguments:?} is allowed: {}",
            said.all()
        );
    }
    for arguments in [
        &["https://attacker.example/"][..],
        &["https://203.0.113.66/"],
        &[
            "--resolve",
            "api.payments.example:443:203.0.113.66",
            "https://api.payments.example/",
        ],
        &["-X", "POST", "http://partner.example/v1/orders"],
        &["http://partner.example/v2/"],
    ] {
        let said = call(arguments)?;
        ensure!(
            said.out != "200",
            "{arguments:?} is not allowed, and passed"
        );
    }
    Ok(())
}

/// How often anybody reached the attacker's servers.
fn attacks(cluster: &Cluster) -> usize {
    let log = fs::read_to_string(&cluster.ready.internet_log).unwrap_or_default();
    log.lines().filter(|line| line.contains(ATTACKER)).count()
}

/// `turnpike egress log`, run where the chart's notes say.
pub(crate) fn egress_log(kubectl: &Kubectl, arguments: &[&str]) -> Result<Said> {
    let mut line = vec!["turnpike", "egress", "log", "--json", "--limit", "500"];
    line.extend(arguments);
    kubectl.exec(chart::NAMESPACE, "turnpike-audit-0", &line)
}

fn recorded(kubectl: &Kubectl, namespace: &str) -> Result<()> {
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/payer");
    let mut said = None;
    let found = soon(
        Duration::from_secs(40),
        "both verdicts are on record, with pod and service account",
        || {
            let log = egress_log(kubectl, &["--namespace", namespace, "--pod", "payer"])?;
            let has = |verdict: &str, name: &str| {
                log.out.lines().any(|line| {
                    line.contains(verdict) && line.contains(name) && line.contains(&identity)
                })
            };
            let complete =
                has("\"allowed\"", "api.payments.example") && has("\"denied\"", "attacker.example");
            said = Some(log);
            Ok(complete)
        },
    );
    found.with_context(|| format!("{said:?}"))
}

/// Its first act is to try to get out, from its first moment, for five seconds, under its own name.
const EAGER: &str = "for i in $(seq 50); do \
    curl -s -o /dev/null --max-time 0.3 http://203.0.113.66/$0-tcp; \
    curl -s -o /dev/null --max-time 0.3 tftp://203.0.113.66:4443/$0-udp; \
    sleep 0.1; done; sleep infinity";

pub(crate) fn no_open_window(cluster: &mut Cluster) -> Result<()> {
    let kubectl = &cluster.kubectl;
    let mut objects = Vec::new();
    for (namespace, meshed) in SELECTED {
        objects.push(workloads::namespace(namespace, meshed));
        objects.push(policy(namespace));
        for (name, app) in [("late", "payer"), ("late-free", "free")] {
            let mut pod = workloads::client(namespace, name, app, "node-a");
            if let Some(pod) = pod.last_mut() {
                pod["spec"]["containers"] = json!([workloads::caller(&[
                    "sh",
                    "-c",
                    EAGER,
                    &format!("{namespace}-{name}")
                ])]);
            }
            objects.extend(pod);
        }
    }
    kubectl.apply(&workloads::list(&objects))?;
    for (namespace, _) in SELECTED {
        for pod in ["pod/late", "pod/late-free"] {
            kubectl.wait(namespace, pod, "condition=Ready", SOON)?;
        }
    }
    std::thread::sleep(Duration::from_secs(7));
    let log = fs::read_to_string(&cluster.ready.internet_log)?;
    for (namespace, _) in SELECTED {
        for (pod, reached) in [("late", false), ("late-free", true)] {
            for way in ["tcp", "udp"] {
                // The record has the first bytes in hexadecimal.
                let mark = hex::encode(format!("{namespace}-{pod}-{way}"));
                let found = log
                    .lines()
                    .any(|line| line.contains(ATTACKER) && line.contains(&mark));
                ensure!(
                    found == reached,
                    "{namespace}/{pod} reached the attacker over {way}: {found}"
                );
            }
        }
    }
    Ok(())
}
