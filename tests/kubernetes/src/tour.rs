//! The short tour that the demo shows and a test takes: each step does what a user would do with
//! kubectl, and says what was seen.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use turnpike_rig::{Evidence, wait_for};

use crate::{Cluster, chart, kubectl::name_of, workloads};

const SHOP: &str = "shop";
const LEGACY: &str = "legacy";
const READY: Duration = Duration::from_secs(120);
/// For a policy to be in force everywhere.
const EFFECT: Duration = Duration::from_secs(45);
const SECRET: &str = "x-card: 4242-4242-4242-4242";
const OPEN: &str = "x-open: seen-by-everyone";

/// One step: its title, and what shows it.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub title: &'static str,
    pub tell: fn(&Cluster) -> Result<Evidence>,
}

/// In the order of telling.
pub const STEPS: [Step; 4] = [
    Step {
        title: "Roads: nodes ready, pods with VPC addresses",
        tell: roads,
    },
    Step {
        title: "A label, and pods have sidecars",
        tell: sidecars,
    },
    Step {
        title: "Mutual TLS between nodes",
        tell: mtls,
    },
    Step {
        title: "Nothing leaves unless allowed",
        tell: egress,
    },
];

fn roads(cluster: &Cluster) -> Result<Evidence> {
    let kubectl = &cluster.kubectl;
    let mut evidence = Evidence::default();
    let mut objects = Vec::new();
    for (namespace, meshed) in [(SHOP, true), (LEGACY, false)] {
        objects.push(workloads::namespace(namespace, meshed));
    }
    // All on one node, the clients on the other, so that every call crosses.
    objects.extend(workloads::web_on("node-a", SHOP, "web", 2));
    objects.extend(workloads::client(SHOP, "client", "client", "node-b"));
    objects.extend(workloads::client(
        SHOP,
        "payer",
        "payment-processor",
        "node-b",
    ));
    objects.extend(workloads::client(LEGACY, "caller", "caller", "node-b"));
    kubectl.apply(&workloads::list(&objects))?;
    kubectl.rolled_out(SHOP, "deploy/web", READY)?;
    for (namespace, pod) in [
        (SHOP, "pod/client"),
        (SHOP, "pod/payer"),
        (LEGACY, "pod/caller"),
    ] {
        kubectl.wait(namespace, pod, "condition=Ready", READY)?;
    }
    let nodes = kubectl.ok(&["get", "nodes", "-L", "topology.kubernetes.io/zone"])?;
    let ready = nodes
        .lines()
        .filter(|line| line.contains(" Ready "))
        .count();
    evidence.claim(
        "both nodes became Ready by our CNI",
        ready == 2,
        format!("{ready} of 2"),
    );
    let pods = kubectl.list::<Pod>(SHOP, "app=web")?;
    let addresses: Vec<String> = pods
        .iter()
        .filter_map(|pod| pod.status.as_ref()?.pod_ip.clone())
        .collect();
    let vpc = addresses.len() == 2 && addresses.iter().all(|address| address.starts_with("10.0."));
    evidence.claim(
        "kubelet's pods have addresses of the VPC",
        vpc,
        addresses.join(", "),
    );
    let said = call(cluster, LEGACY, "caller", &["http://web.shop/"])?;
    evidence.claim(
        "DNS and kube-proxy lead to a Service's pods",
        said == "200",
        said,
    );
    cluster.prove_isolation()?;
    evidence.claim(
        "no namespace here has a way out to this machine's network",
        true,
        "proved for every pod",
    );
    evidence.exhibit("kubectl get nodes", nodes);
    Ok(evidence)
}

fn sidecars(cluster: &Cluster) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    let pods = cluster.kubectl.list::<Pod>(SHOP, "app=web")?;
    let injected = |pod: &Pod| {
        let first = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.init_containers.as_ref()?.first().cloned());
        first.is_some_and(|first| {
            first.name == "turnpike-proxy" && first.restart_policy.as_deref() == Some("Always")
        })
    };
    evidence.claim(
        "pods of a labelled namespace have a native sidecar, under Pod Security `restricted`",
        !pods.is_empty() && pods.iter().all(injected),
        pods.iter().map(name_of).collect::<Vec<_>>().join(", "),
    );
    let caller: Pod = cluster.kubectl.get(LEGACY, "caller")?;
    evidence.claim(
        "pods of others are as they were written",
        !injected(&caller),
        "legacy/caller",
    );
    let log = cluster.kubectl.logs(SHOP, "client", "turnpike-proxy")?;
    let identity = log
        .lines()
        .find(|line| line.contains("certificate issued"))
        .unwrap_or_default();
    let wanted = "spiffe://cluster.local/ns/shop/sa/client";
    evidence.claim(
        "its identity came of its service account's token",
        identity.contains(wanted),
        wanted,
    );
    Ok(evidence)
}

fn mtls(cluster: &Cluster) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    let pods = cluster.kubectl.list::<Pod>(SHOP, "app=web")?;
    let on_a =
        |pod: &&Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some("node-a");
    let across = pods.iter().find(on_a).context("a web pod on node-a")?;
    let address = across
        .status
        .as_ref()
        .and_then(|status| status.pod_ip.clone())
        .unwrap_or_default();
    let capture = cluster.capture()?;
    let mut statuses = Vec::new();
    for _ in 0..8 {
        statuses.push(call(
            cluster,
            SHOP,
            "client",
            &["-H", SECRET, "http://web/cards"],
        )?);
    }
    let plain = call(
        cluster,
        LEGACY,
        "caller",
        &["-H", OPEN, &format!("http://{address}:8080/")],
    )?;
    let wire = capture.finish()?;
    evidence.claim(
        "curl → sidecar → sidecar → nginx",
        statuses.iter().all(|status| status == "200"),
        statuses.join(" "),
    );
    evidence.claim(
        "no header of it was readable between the nodes",
        !wire.carried(SECRET),
        format!("{} bytes captured at the VPC's router", wire.len()),
    );
    let name = "p80.web.shop.cluster.svc.turnpike";
    evidence.claim(
        "it was TLS, addressed to the Service by name",
        wire.carried(name),
        name,
    );
    evidence.claim(
        "the capture would have shown plaintext: a caller without a sidecar is in it",
        plain == "200" && wire.carried(OPEN),
        OPEN,
    );
    Ok(evidence)
}

fn egress(cluster: &Cluster) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    let before = call(cluster, SHOP, "payer", &["https://attacker.example/"])?;
    evidence.claim(
        "without a policy the payer reaches anything",
        before == "200",
        before,
    );
    cluster.kubectl.apply(&policy())?;
    let denied = wait_for(EFFECT, || {
        let said = call(cluster, SHOP, "payer", &["https://attacker.example/"]).ok()?;
        (said != "200").then_some(said)
    });
    // The agent may have it before the gate: then nothing is allowed for a moment.
    let allowed = wait_for(EFFECT, || {
        let said = call(cluster, SHOP, "payer", &["https://api.payments.example/"]).ok()?;
        (said == "200").then_some(said)
    });
    evidence.claim(
        "with one, the name that it allows is reached",
        allowed.is_some(),
        "https://api.payments.example/",
    );
    evidence.claim(
        "and no other",
        denied.is_some(),
        "https://attacker.example/",
    );
    let by_address = call(cluster, SHOP, "payer", &["https://203.0.113.66/"])?;
    evidence.claim(
        "nor by address",
        by_address != "200",
        "https://203.0.113.66/",
    );
    let log = wait_for(Duration::from_secs(40), || {
        let said = cluster
            .kubectl
            .exec(chart::NAMESPACE, "turnpike-audit-0", &EGRESS_LOG)
            .ok()?;
        (said.out.contains("allowed") && said.out.contains("denied")).then_some(said.out)
    });
    evidence.claim(
        "both are on record, with pod and service account",
        log.is_some(),
        "turnpike egress log",
    );
    evidence.exhibit("turnpike egress log", log.unwrap_or_default());
    Ok(evidence)
}

const EGRESS_LOG: [&str; 7] = [
    "turnpike",
    "egress",
    "log",
    "--limit",
    "6",
    "--namespace",
    SHOP,
];

/// The policy of the project's README, as far as the tour goes.
fn policy() -> String {
    json!({
        "apiVersion": "turnpike.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"name": "payments", "namespace": SHOP},
        "spec": {
            "selector": {"matchLabels": {"app": "payment-processor"}},
            "allow": [{"hosts": ["api.payments.example"], "ports": [{"port": 443, "protocol": "TLS"}]}],
        },
    })
    .to_string()
}

/// The status of one call from a pod.
fn call(cluster: &Cluster, namespace: &str, pod: &str, arguments: &[&str]) -> Result<String> {
    let mut line = vec![
        "curl",
        "-s",
        "-k",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "--max-time",
        "5",
    ];
    line.extend(arguments);
    Ok(cluster
        .kubectl
        .exec(namespace, &format!("{pod}/curl"), &line)?
        .out)
}

/// What a newcomer may type after the tour: what for, and a command for a shell of root.
pub fn walk_through(cluster: &Cluster) -> Vec<(&'static str, String)> {
    let bin = cluster.folder.join("bin");
    vec![
        ("let the shell find the wrappers", format!("export PATH={}:$PATH", bin.display())),
        ("see what runs", "kubectl get pods -A -o wide".to_owned()),
        ("call through the mesh", "kubectl -n shop exec client -c curl -- curl -si http://web/".to_owned()),
        ("try to leave", "kubectl -n shop exec payer -c curl -- curl -sS --max-time 3 https://attacker.example/ || true".to_owned()),
        ("what left, and what not", format!("kubectl -n {} exec turnpike-audit-0 -- turnpike egress log --limit 10", chart::NAMESPACE)),
        (
            "refuse callers without identity",
            "kubectl apply -f - <<'END'\napiVersion: turnpike.dev/v1alpha1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: shop}\nspec: {mtls: {mode: STRICT}}\nEND".to_owned(),
        ),
        ("a sidecar's metrics", "kubectl -n shop exec client -c curl -- curl -s http://127.0.0.1:15020/metrics | head".to_owned()),
        ("a web pod at a local port, there", "kubectl -n shop port-forward deploy/web 8080:8080 > /dev/null & on-control curl -s --retry 20 --retry-delay 1 --retry-connrefused http://127.0.0.1:8080/; kill $!".to_owned()),
        ("what the chart set up", "helm -n turnpike-system status turnpike | head".to_owned()),
        ("look at a node from inside", "node-a ps -e -o pid,args | head -20".to_owned()),
    ]
}

/// Types the whole of it into a shell, which must be content with each line.
pub fn take_walk_through(cluster: &Cluster) -> Result<String> {
    let lines: Vec<String> = walk_through(cluster)
        .into_iter()
        .map(|(_, command)| command)
        .collect();
    let output = std::process::Command::new("sh")
        .args(["-ec", &lines.join("\n")])
        .output()?;
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(output.status.success(), "{said}");
    Ok(said)
}
