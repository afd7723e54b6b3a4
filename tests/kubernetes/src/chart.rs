//! Installing Turnpike as a user does: Gateway API's resources, then `helm install`.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{
    cluster::Cluster,
    images::{REGISTRY, TAGS},
    kubectl::Said,
};

pub const NAMESPACE: &str = "turnpike-system";
const RELEASE: &str = "turnpike";

/// Where the chart is in a checkout.
pub fn folder() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../charts/turnpike"
    ))
}

/// Endpoints and image names of the box; everything else is the chart's own default.
pub fn values() -> Value {
    json!({
        "image": {"registry": REGISTRY, "tag": TAGS[0], "pullPolicy": "Never"},
        "mesh": {"prefixes": ["10.0.0.0/16", "10.96.0.0/16"]},
        "node": {"env": {
            "AWS_ENDPOINT_URL_EC2": "http://10.0.0.2:8773",
            "AWS_REGION": "eu-west-1",
            "WARM_IP_TARGET": "4",
        }},
        "gate": {"upstreamDns": "10.0.0.2", "clusterDns": "10.96.0.10"},
        "telemetry": {"otlpEndpoint": "http://10.0.0.10:4317"},
        "audit": {"persistence": {"enabled": false}},
    })
}

impl Cluster {
    /// Everything a user types before the first policy, and the nodes are ready.
    pub fn install(&self, values: &Value, progress: &dyn Fn(&str)) -> Result<()> {
        progress("Gateway API: its custom resources");
        self.install_gateway_api()?;
        progress("helm install turnpike");
        let said = self.helm_install("install", values)?;
        ensure!(said.ok, "helm install: {}", said.all().trim());
        progress("nodes: their network, then everything else");
        self.kubectl.wait(
            "default",
            "node/node-a",
            "condition=Ready",
            Duration::from_secs(120),
        )?;
        self.kubectl.wait(
            "default",
            "node/node-b",
            "condition=Ready",
            Duration::from_secs(120),
        )?;
        self.rolled_out()?;
        self.kubectl
            .rolled_out("kube-system", "deploy/coredns", Duration::from_secs(60))
    }

    /// Waits until every part of ours is up, as its template says now.
    pub fn rolled_out(&self) -> Result<()> {
        for what in [
            "ds/turnpike-node",
            "ds/turnpike-gate",
            "deploy/turnpike-controller",
            "sts/turnpike-audit",
        ] {
            // Each node's gate may drain for as long as it may.
            self.kubectl
                .rolled_out(NAMESPACE, what, Duration::from_secs(150))?;
        }
        Ok(())
    }

    pub fn install_gateway_api(&self) -> Result<()> {
        let resources = self.cache.gateway_api();
        let mut files: Vec<PathBuf> = fs::read_dir(&resources)
            .with_context(|| resources.display().to_string())?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| !path.ends_with("kustomization.yaml"))
            .collect();
        files.sort();
        // Too large for the annotation that a client-side apply keeps.
        let mut line = vec!["apply", "--server-side"];
        let files: Vec<String> = files
            .iter()
            .map(|path| path.to_string_lossy().into_owned())
            .collect();
        line.extend(files.iter().flat_map(|file| ["-f", file]));
        self.kubectl.ok(&line)?;
        Ok(())
    }

    /// `helm install` or `helm upgrade` with these values; what it said.
    pub fn helm_install(&self, verb: &str, values: &Value) -> Result<Said> {
        let file = self.folder.join("values.json");
        fs::write(&file, values.to_string())?;
        let (chart, file) = (folder(), file.to_string_lossy().into_owned());
        self.kubectl.helm(&[
            verb,
            RELEASE,
            &chart.to_string_lossy(),
            "--namespace",
            NAMESPACE,
            "--create-namespace",
            "--values",
            &file,
        ])
    }

    pub fn helm_uninstall(&self) -> Result<Said> {
        self.kubectl.helm(&[
            "uninstall",
            RELEASE,
            "--namespace",
            NAMESPACE,
            "--wait",
            "--timeout",
            "60s",
        ])
    }
}
