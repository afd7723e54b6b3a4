//! containerd on a node of the box, and the few calls of its runtime interface that a pod needs.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, runtime::Runtime};
use tonic::transport::{Channel, Endpoint, Uri};
use turnpike_rig::{
    World,
    daemon::Daemon,
    wait_for,
    world::{program, unmount_below},
};
use turnpike_vpc::netns::{Command, Namespace};

use self::cri::runtime_service_client::RuntimeServiceClient;
use crate::image;

#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    unused_qualifications,
    reason = "generated"
)]
mod cri {
    tonic::include_proto!("runtime.v1");
}

/// Where runc puts its control groups, so that leftovers can be found by name.
const CGROUP: &str = "/tpt-runtime";

/// The plugin that containerd 1.6 calls by itself for every pod, of containernetworking-plugins.
const LOOPBACK: &str = "/usr/lib/cni/loopback";

/// A pod as the runtime is asked for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) uid: &'a str,
}

#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) address: String,
    config: cri::PodSandboxConfig,
}

#[derive(Debug)]
pub(crate) struct Containerd {
    daemon: Daemon,
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
}

impl Containerd {
    pub(crate) fn start(world: &World, node: &str) -> Result<Self> {
        kill_leftovers();
        let node = world.node(node)?;
        let folder = node.folder.join("containerd");
        let socket = folder.join("containerd.sock");
        configure(&folder, &node.folder.join("cni.sock"))?;
        let command = Command::new("containerd")
            .arg("--config")
            .arg(folder.join("config.toml"));
        let daemon = Daemon::start("containerd", command, &node.namespace, &folder, false)?;
        wait_for(Duration::from_secs(20), || {
            ctr(&node.namespace, &socket, &["version"]).ok()
        })
        .with_context(|| format!("containerd did not start: {}", daemon.log()))?;
        let archive = folder.join("image.tar");
        image::write(&folder.join("image"), &archive)?;
        ctr(
            &node.namespace,
            &socket,
            &[
                "-n",
                "k8s.io",
                "images",
                "import",
                &archive.to_string_lossy(),
            ],
        )?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let client = RuntimeServiceClient::new(runtime.block_on(connect(socket))?);
        Ok(Self {
            daemon,
            runtime,
            client,
        })
    }

    pub(crate) fn network_ready(&self) -> Result<bool> {
        let status = self
            .runtime
            .block_on(
                self.client
                    .clone()
                    .status(cri::StatusRequest { verbose: false }),
            )?
            .into_inner();
        let conditions = status
            .status
            .map(|status| status.conditions)
            .unwrap_or_default();
        Ok(conditions
            .iter()
            .any(|c| c.r#type == "NetworkReady" && c.status))
    }

    pub(crate) fn run_sandbox(&self, request: &Request<'_>) -> Result<Sandbox> {
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: request.name.to_owned(),
                uid: request.uid.to_owned(),
                namespace: request.namespace.to_owned(),
                attempt: 0,
            }),
            hostname: request.name.to_owned(),
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: CGROUP.to_owned(),
            }),
            ..cri::PodSandboxConfig::default()
        };
        let ask = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let made = self
            .runtime
            .block_on(self.client.clone().run_pod_sandbox(ask))
            .with_context(|| {
                format!(
                    "containerd's log:\n{}",
                    turnpike_rig::daemon::tail(&self.daemon.log())
                )
            })?;
        let id = made.into_inner().pod_sandbox_id;
        let ask = cri::PodSandboxStatusRequest {
            pod_sandbox_id: id.clone(),
            verbose: false,
        };
        let status = self
            .runtime
            .block_on(self.client.clone().pod_sandbox_status(ask))?
            .into_inner();
        let network = status.status.and_then(|status| status.network);
        let address = network.context("the sandbox has a network")?.ip;
        Ok(Sandbox {
            id,
            address,
            config,
        })
    }

    /// Its id.
    pub(crate) fn start_container(&self, sandbox: &Sandbox, line: &[&str]) -> Result<String> {
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: "app".into(),
                attempt: 0,
            }),
            image: Some(cri::ImageSpec {
                image: image::NAME.into(),
            }),
            command: vec!["/bin/busybox".into()],
            args: line.iter().map(|&word| word.into()).collect(),
        };
        let ask = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.id.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox.config.clone()),
        };
        let id = self
            .runtime
            .block_on(self.client.clone().create_container(ask))?;
        let container_id = id.into_inner().container_id;
        let ask = cri::StartContainerRequest {
            container_id: container_id.clone(),
        };
        self.runtime
            .block_on(self.client.clone().start_container(ask))?;
        Ok(container_id)
    }

    /// Standard output of a command in a container.
    pub(crate) fn exec(&self, container: &str, line: &[&str]) -> Result<String> {
        let ask = cri::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: line.iter().map(|&word| word.into()).collect(),
            timeout: 10,
        };
        let mut client = self.client.clone();
        let said = self.runtime.block_on(async move {
            // The command's own limit does not cover what it left running.
            tokio::time::timeout(Duration::from_secs(20), client.exec_sync(ask)).await
        })??;
        let said = said.into_inner();
        let error = String::from_utf8_lossy(&said.stderr);
        ensure!(
            said.exit_code == 0,
            "{line:?} ended with {}: {error}",
            said.exit_code
        );
        Ok(String::from_utf8_lossy(&said.stdout).into_owned())
    }

    pub(crate) fn remove_sandbox(&self, sandbox: &Sandbox) -> Result<()> {
        let id = sandbox.id.clone();
        let mut client = self.client.clone();
        self.runtime.block_on(async move {
            client
                .stop_pod_sandbox(cri::StopPodSandboxRequest {
                    pod_sandbox_id: id.clone(),
                })
                .await?;
            client
                .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id })
                .await?;
            Ok(())
        })
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        kill_leftovers();
        if let Err(error) = self.daemon.stop(Duration::from_secs(5)) {
            eprintln!("containerd: {error:#}");
        }
        // It leaves the pods' namespaces and its snapshots mounted.
        unmount_below(self.daemon.folder());
    }
}

/// Kills what runs in our control groups and takes the groups away.
fn kill_leftovers() {
    let hierarchies = fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten();
    for hierarchy in hierarchies {
        let group = hierarchy.path().join(CGROUP.trim_start_matches('/'));
        if group.is_dir() {
            empty(&group);
        }
    }
}

fn empty(group: &Path) {
    for child in fs::read_dir(group).into_iter().flatten().flatten() {
        if child.path().is_dir() {
            empty(&child.path());
        }
    }
    for _ in 0..50 {
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines().filter_map(|line| line.parse().ok()) {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        if fs::remove_dir(group).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn configure(folder: &Path, agent: &Path) -> Result<()> {
    let (conf, bin) = (folder.join("conf"), folder.join("bin"));
    fs::create_dir_all(&conf)?;
    fs::create_dir_all(&bin)?;
    fs::copy(program("turnpike-cni")?, bin.join("turnpike-cni"))?;
    fs::copy(LOOPBACK, bin.join("loopback")).context(LOOPBACK)?;
    // containerd 1.6 speaks CNI up to 1.0.0.
    let conflist = serde_json::json!({
        "cniVersion": "1.0.0", "name": "turnpike",
        "plugins": [{"type": "turnpike-cni", "agentSocket": agent}],
    });
    fs::write(conf.join("10-turnpike.conflist"), conflist.to_string())?;
    let text = include_str!("containerd.toml.in")
        .replace("@FOLDER@", &folder.to_string_lossy())
        .replace("@PAUSE@", image::NAME);
    Ok(fs::write(folder.join("config.toml"), text)?)
}

fn ctr(namespace: &Namespace, socket: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new("ctr")
        .arg("--address")
        .arg(socket)
        .args(arguments)
        .output(namespace)?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ctr {arguments:?}: {error}");
    Ok(())
}

async fn connect(socket: PathBuf) -> Result<Channel> {
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The URI is not used: the connector knows the socket.
    Ok(Endpoint::from_static("http://containerd")
        .connect_with_connector(connector)
        .await?)
}
