//! EgressPolicy on a real cluster: what is allowed leaves, nothing else, and all of it is on record.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use turnpike_cluster::{Cluster, Said, chart, kubectl::Kubectl, workloads};

use crate::stage::{EFFECT, SOON, curl, is_refusal, soon};

/// With a sidecar, and without.
pub(crate) const SELECTED: [(&str, bool); 2] = [("pay", true), ("pay-plain", false)];
pub(crate) const ATTACKER: &str = "203.0.113.66";
/// What [`policy`] allows.
pub(crate) const PAYMENTS: &str = "https://api.payments.example/";

/// For the pods of a namespace that are called `payer`.
pub(crate) fn policy(namespace: &str) -> Value {
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
            denied(kubectl, namespace, &["https://attacker.example/"]).map(|()| true)
        })?;
    }
    let before = attacks(cluster)?;
    for (namespace, _) in SELECTED {
        attempts(kubectl, namespace).with_context(|| namespace.to_owned())?;
    }
    ensure!(
        attacks(cluster)? == before,
        "a selected pod reached the attacker"
    );
    let said = curl(kubectl, "pay", "free", &[&format!("https://{ATTACKER}/")])?;
    ensure!(
        said.out == "200" && attacks(cluster)? > before,
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
        (&[PAYMENTS][..], "200"),
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
        denied(kubectl, namespace, arguments)?;
    }
    Ok(())
}

/// Fails unless the gate refuses a call of the payer, or its name: it resolves no name that no rule
/// allows.
fn denied(kubectl: &Kubectl, namespace: &str, arguments: &[&str]) -> Result<()> {
    let said = curl(kubectl, namespace, "payer", arguments)?;
    let unresolved = said.code == Some(6) && arguments.iter().any(|it| it.contains("attacker."));
    ensure!(
        unresolved || is_refusal(&said),
        "{namespace}/payer → {arguments:?} is not refused: {said:?}"
    );
    Ok(())
}

/// How often anybody reached the attacker's servers.
fn attacks(cluster: &Cluster) -> Result<usize> {
    let log = fs::read_to_string(&cluster.ready.internet_log)?;
    Ok(log.lines().filter(|line| line.contains(ATTACKER)).count())
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
