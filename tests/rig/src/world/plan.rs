//! The programs of a world: what each is told, and where it runs.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use turnpike_vpc::netns::{Command, Namespace};

use super::{
    AGENT_HTTP, AUDIT_HTTP, AUDIT_PORT, CONTROL, CONTROLLER_HTTP, CONTROLLER_NAME, CONTROLLER_PORT,
    GATE_HTTP, Node, Options, program,
};
use crate::{
    daemon::Daemon,
    tokens::{AUDIENCE, ISSUER, Issuer, Subject},
};

/// What the daemons of one world have in common.
pub(super) struct Plan<'a> {
    pub(super) options: &'a Options,
    pub(super) folder: &'a Path,
    pub(super) issuer: &'a Issuer,
}

impl Plan<'_> {
    pub(super) fn controller(&self, control: &Namespace, policies: &Path) -> Result<Daemon> {
        let folder = self.folder.join("control");
        fs::create_dir_all(&folder)?;
        let keys = folder.join("tokens.jwks");
        self.issuer.publish(&keys)?;
        let command = Command::new(program("turnpike-controller")?)
            .args(["--cluster", "cluster", "--trust-domain", "cluster.local"])
            .arg("--source-dir")
            .arg(policies)
            .args(["--listen", &format!("{CONTROL}:{CONTROLLER_PORT}")])
            .args(["--http", &format!("{CONTROL}:{CONTROLLER_HTTP}")])
            .arg("--state-dir")
            .arg(folder.join("state"))
            .arg("--root-cert-out")
            .arg(self.root_file())
            .args(["--token-issuer", ISSUER, "--audience", AUDIENCE])
            .arg("--token-jwks")
            .arg(keys);
        Daemon::start("controller", command, control, &folder, self.options.keep)
    }

    pub(super) fn audit(&self, control: &Namespace) -> Result<Daemon> {
        let folder = self.folder.join("control");
        let token = self.token("turnpike-audit", "control")?;
        let command = Command::new(program("turnpike-audit")?)
            .args(["--listen", &format!("{CONTROL}:{AUDIT_PORT}")])
            .args(["--http", &format!("{CONTROL}:{AUDIT_HTTP}")])
            .args([
                "--store",
                &format!("sqlite:{}", folder.join("audit.db").display()),
            ]);
        let command = self.client(command, &token);
        Daemon::start("audit", command, control, &folder, self.options.keep)
    }

    pub(super) fn node(&self, name: &'static str, zone: &'static str) -> Result<Node> {
        let namespace = Namespace::open(&format!("{}-{name}", self.options.name))?;
        let folder = self.folder.join(name);
        fs::create_dir_all(&folder)?;
        let agent = self.agent(name, &namespace, &folder)?;
        let gate = self.gate(name, &namespace, &folder)?;
        Ok(Node {
            name,
            zone,
            namespace,
            agent,
            gate,
            folder,
        })
    }

    fn agent(&self, name: &str, namespace: &Namespace, folder: &Path) -> Result<Daemon> {
        let token = self.token("turnpike-node", name)?;
        let mut command = Command::new(program("turnpike-node")?)
            .args(["--node-name", name, "--cluster", "cluster"])
            .arg("--cni-socket")
            .arg(folder.join("cni.sock"))
            .arg("--feed-socket")
            .arg(folder.join("feed.sock"))
            .arg("--state-dir")
            .arg(folder.join("agent"))
            .args(["--http", &format!("127.0.0.1:{AGENT_HTTP}")])
            .env("AWS_ENDPOINT_URL_EC2", "http://10.0.0.2:8773")
            .env("AWS_REGION", "eu-west-1")
            .env("WARM_IP_TARGET", "4");
        for (name, value) in &self.options.agent_environment {
            command = command.env(name, value);
        }
        let command = self.client(command, &token);
        Daemon::start(
            &format!("{name}/agent"),
            command,
            namespace,
            folder,
            self.options.keep,
        )
    }

    fn gate(&self, name: &str, namespace: &Namespace, folder: &Path) -> Result<Daemon> {
        let token = self.token("turnpike-gate", name)?;
        let command = Command::new(program("turnpike-gate")?)
            .args(["--node-name", name, "--cluster", "cluster"])
            .arg("--feed-socket")
            .arg(folder.join("feed.sock"))
            .arg("--spool-dir")
            .arg(folder.join("spool"))
            .args(["--upstream-dns", "10.0.0.2", "--cluster-dns", "10.0.0.2"])
            .args(["--audit", &format!("{CONTROL}:{AUDIT_PORT}")])
            .args(["--http", &format!("127.0.0.1:{GATE_HTTP}")]);
        let command = self.client(command, &token);
        Daemon::start(
            &format!("{name}/gate"),
            command,
            namespace,
            folder,
            self.options.keep,
        )
    }

    /// What every client of the controller is told.
    fn client(&self, command: Command, token: &Path) -> Command {
        command
            .args(["--controller", &format!("{CONTROL}:{CONTROLLER_PORT}")])
            .args(["--controller-name", CONTROLLER_NAME])
            .arg("--token-file")
            .arg(token)
            .arg("--root-file")
            .arg(self.root_file())
            .env("RUST_LOG", "info")
    }

    fn root_file(&self) -> PathBuf {
        self.folder.join("root.pem")
    }

    fn token(&self, account: &str, node: &str) -> Result<PathBuf> {
        let subject = Subject {
            namespace: "turnpike-system",
            service_account: account,
            pod: None,
            node: Some(node),
        };
        let path = self.folder.join(format!("{node}-{account}.token"));
        fs::write(
            &path,
            self.issuer
                .token(&subject, Duration::from_secs(24 * 3600))?,
        )?;
        Ok(path)
    }
}
