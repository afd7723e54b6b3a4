//! A container runtime's part: the CNI executable, called with its environment and standard input.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use turnpike_vpc::netns::{Command, Namespace, Output};

use crate::world::{World, program};

/// What a runtime knows of a pod when it calls the CNI executable.
#[derive(Clone, Debug)]
pub struct Sandbox<'a> {
    pub node: &'a str,
    /// Namespace and name of the pod.
    pub key: &'a (String, String),
    /// Container id: a new one for each start.
    pub id: &'a str,
    pub namespace: &'a Namespace,
}

impl World {
    /// Calls the CNI executable on a node as a runtime does. Its result, if it succeeded.
    pub fn cni(&self, verb: &str, sandbox: &Sandbox<'_>) -> Result<Value> {
        let Sandbox {
            node,
            key: (pod_namespace, name),
            id,
            namespace,
        } = sandbox;
        let node = self.node(node)?;
        let config = json!({
            "cniVersion": "1.1.0", "name": "turnpike", "type": "turnpike-cni",
            "agentSocket": node.folder.join("cni.sock"),
        });
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={pod_namespace};K8S_POD_NAME={name};K8S_POD_UID={id}"
        );
        let command = Command::new(program("turnpike-cni")?)
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", namespace.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", arguments)
            .stdin_piped()
            .stdout(Output::Piped)
            .stderr(Output::Piped);
        let mut child = command.spawn(&node.namespace)?;
        let mut input = child.stdin.take().context("standard input was asked for")?;
        std::io::Write::write_all(&mut input, config.to_string().as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!("CNI {verb} for {pod_namespace}/{name} was refused: {said}");
        }
        Ok(if said.trim().is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&said)?
        })
    }
}

pub(super) fn address_of(result: &Value) -> Result<IpAddr> {
    let text = result["ips"][0]["address"]
        .as_str()
        .context("the CNI result has an address")?;
    Ok(text.split('/').next().unwrap_or_default().parse()?)
}
