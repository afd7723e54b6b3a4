//! A machine of the cluster: an instance of the VPC with files, processes, host name and control
//! groups of its own.
//!
//! [`Node::start`] lays out its disk and starts `turnpike-cluster node` in the instance's
//! namespace; [`init`] is what happens there.

mod config;
pub mod init;

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use turnpike_rig::{daemon::Daemon, wait_for, world::program};
use turnpike_vpc::{
    netns::{Command, Namespace},
    run::ReadyInstance,
};

use crate::{
    build::Cache,
    certificates::{Subject, kubeconfig, secret, write_pair},
    cgroup,
    control::{Keys, SERVER},
    kubectl::Said,
};

/// A node, running or not.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub zone: String,
    pub address: Ipv4Addr,
    pub namespace: Namespace,
    daemon: Daemon,
    disk: PathBuf,
}

/// What a node is made of.
#[derive(Debug)]
pub struct Plan<'a> {
    pub cache: &'a Cache,
    pub keys: &'a Keys,
    /// The cluster's name.
    pub cluster: &'a str,
    pub name: &'a str,
    pub instance: &'a ReadyInstance,
    /// Archives to import before the first pod.
    pub images: &'a [PathBuf],
    /// For logs and the note of its process.
    pub folder: &'a Path,
    /// Its own disk, which outlasts a restart.
    pub disk: &'a Path,
    pub keep: bool,
}

impl Node {
    pub fn start(plan: &Plan<'_>) -> Result<Self> {
        let namespace = Namespace::open(&plan.instance.namespace)?;
        let group = cgroup::of_node(plan.cluster, plan.name);
        cgroup::make(&group)?;
        lay_out(plan, &group)?;
        let machine = init::Machine {
            name: plan.name.to_owned(),
            disk: plan.disk.to_owned(),
            root: plan.folder.join(plan.name).join("root"),
            programs: plan.cache.programs(),
            images: plan.images.to_vec(),
            services: config::services(plan),
        };
        fs::create_dir_all(&machine.root)?;
        let file = plan.folder.join(plan.name).join("machine.json");
        fs::write(&file, serde_json::to_vec_pretty(&machine)?)?;
        let command = Command::new(program("turnpike-cluster")?)
            .arg("node")
            .arg(&file);
        let daemon = Daemon::start(
            plan.name,
            command,
            &namespace,
            &plan.folder.join(plan.name),
            plan.keep,
        )?;
        Ok(Self {
            name: plan.name.to_owned(),
            zone: plan.instance.zone.clone(),
            address: plan.instance.address,
            namespace,
            daemon,
            disk: plan.disk.to_owned(),
        })
    }

    /// Cuts its power: everything that runs on it ends at once. Its disk stays.
    pub fn kill(&mut self) -> Result<()> {
        let group = self.init_pid();
        self.daemon.kill()?;
        if let Ok(pid) = group {
            // The last of its processes takes the namespace of its pods along.
            let gone = wait_for(Duration::from_secs(20), || {
                (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
            });
            ensure!(gone.is_some(), "{} survived", self.name);
        }
        Ok(())
    }

    /// Starts it again after [`kill`](Self::kill), with what a machine that boots has lost: its
    /// rules, its routes and the addresses that were set by hand.
    pub fn boot(&mut self) -> Result<()> {
        config::forget_network(&self.namespace)?;
        self.daemon.restart()
    }

    pub fn is_running(&mut self) -> bool {
        self.daemon.is_running()
    }

    /// Its first process, as this machine numbers it.
    pub fn init_pid(&self) -> Result<u32> {
        let outer = self
            .daemon
            .pid()
            .with_context(|| format!("{} does not run", self.name))?;
        let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))?;
        let first = children.split_whitespace().next();
        first
            .and_then(|pid| pid.parse().ok())
            .with_context(|| format!("{} has not booted", self.name))
    }

    /// Where its outer process is noted, whose only child is its first.
    pub(crate) fn process_file(&self) -> PathBuf {
        self.daemon.folder().join(format!("{}.process", self.name))
    }

    /// Runs a command on the node, among its processes and files.
    pub fn run(&self, line: &[&str]) -> Result<Said> {
        let output = std::process::Command::new("nsenter")
            .args(["--target", &self.init_pid()?.to_string()])
            .args([
                "--mount", "--pid", "--net", "--uts", "--ipc", "--root", "--wd", "--",
            ])
            .args(line)
            .env("PATH", init::PATH)
            .output()
            .context("nsenter, of the package util-linux")?;
        Ok(Said {
            ok: output.status.success(),
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Kills the first process of a container, found by pod and container name. Its kubelet will
    /// notice as it notices a crash.
    pub fn kill_container(&self, namespace: &str, pod: &str, container: &str) -> Result<()> {
        for pid in self.processes_of(namespace, pod, container)? {
            self.signal("KILL", &pid)?;
        }
        Ok(())
    }

    /// Stops the first process of a container where it is, until what is returned is dropped: it
    /// keeps its connections and says nothing on them. Kubelet's liveness probes of our own parts
    /// take a minute to see that.
    pub fn pause_container(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
    ) -> Result<Paused<'_>> {
        let processes = self.processes_of(namespace, pod, container)?;
        let paused = Paused {
            node: self,
            processes,
        };
        for pid in &paused.processes {
            self.signal("STOP", pid)?;
        }
        Ok(paused)
    }

    fn signal(&self, signal: &str, pid: &str) -> Result<()> {
        let said = self.run(&["kill", &format!("-{signal}"), pid])?;
        ensure!(
            said.ok,
            "kill -{signal} {pid} on {}: {}",
            self.name,
            said.err
        );
        Ok(())
    }

    /// The first processes of a container's tasks that run, as the node numbers them; at least one.
    fn processes_of(&self, namespace: &str, pod: &str, container: &str) -> Result<Vec<String>> {
        let filter =
            |label: &str, value: &str| format!("labels.\"io.kubernetes.{label}\"=={value}");
        let all = [
            filter("pod.namespace", namespace),
            filter("pod.name", pod),
            filter("container.name", container),
        ]
        .join(",");
        let listed = self.run(&["ctr", "-n", "k8s.io", "containers", "ls", "-q", &all])?;
        let tasks = self.run(&["ctr", "-n", "k8s.io", "tasks", "ls"])?;
        let running = tasks.out.lines().filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [id, pid, "RUNNING"] if listed.out.lines().any(|listed| listed == id) => {
                    Some(pid.to_owned())
                }
                _ => None,
            }
        });
        let running: Vec<String> = running.collect();
        ensure!(
            !running.is_empty(),
            "no container {container} of {namespace}/{pod} runs on {}: {}{}",
            self.name,
            listed.all(),
            tasks.all()
        );
        Ok(running)
    }

    /// The end of a service's log: `containerd`, `kubelet` or `kube-proxy`.
    pub fn log(&self, service: &str) -> String {
        fs::read_to_string(self.disk.join(format!("var/log/{service}.log"))).unwrap_or_default()
    }

    /// What its first process said.
    pub fn boot_log(&self) -> String {
        self.daemon.log()
    }

    /// The network namespaces of its pods, as files that this machine can open.
    pub fn pod_networks(&self) -> Result<Vec<PathBuf>> {
        let folder = format!("/proc/{}/root/run/netns", self.init_pid()?);
        let entries = fs::read_dir(&folder).with_context(|| folder.clone())?;
        Ok(entries.flatten().map(|entry| entry.path()).collect())
    }
}

/// A container whose first process stands still. Dropping it lets it go on.
#[derive(Debug)]
pub struct Paused<'a> {
    node: &'a Node,
    processes: Vec<String>,
}

impl Drop for Paused<'_> {
    /// One that was killed meanwhile has nothing to go on with.
    fn drop(&mut self) {
        for pid in &self.processes {
            let _ = self.node.signal("CONT", pid);
        }
    }
}

/// Puts on the disk what an image for machines brings, and the node's own keys.
fn lay_out(plan: &Plan<'_>, group: &str) -> Result<()> {
    let at = |path: &str| plan.disk.join(path);
    for folder in [
        "etc/kubernetes",
        "etc/containerd",
        "etc/cni/net.d",
        "etc/ssl/certs",
        "opt/cni/bin",
        "var/lib/kubelet",
        "var/lib/cni",
        "var/lib/containerd",
        "var/lib/turnpike",
        "var/log",
        "var/tmp",
        "root",
    ] {
        fs::create_dir_all(at(folder))?;
    }
    for plugin in ["loopback", "portmap"] {
        fs::copy(
            plan.cache.program("cni").join(plugin),
            at("opt/cni/bin").join(plugin),
        )?;
    }
    for (name, text) in config::files(plan, group) {
        fs::write(at(&name), text).with_context(|| name.clone())?;
    }
    for name in [
        "passwd",
        "group",
        "nsswitch.conf",
        "protocols",
        "services",
        "ld.so.cache",
        "ssl/certs/ca-certificates.crt",
    ] {
        // Not every machine has all of them.
        if let Ok(bytes) = fs::read(Path::new("/etc").join(name)) {
            fs::write(at("etc").join(name), bytes)?;
        }
    }
    let folder = at("etc/kubernetes");
    fs::write(folder.join("ca.crt"), plan.keys.authority().pem())?;
    let user = format!("system:node:{}", plan.name);
    let subject = Subject {
        user: &user,
        group: Some("system:nodes"),
    };
    let serving =
        plan.keys
            .authority()
            .server(subject, &[plan.name], &[plan.instance.address.into()])?;
    write_pair(&folder, "kubelet", &serving)?;
    let kubelet = plan.keys.authority().client(subject)?;
    secret(
        &folder.join("kubelet.conf"),
        &kubeconfig(SERVER, plan.keys.authority(), &kubelet),
    )?;
    let proxy = plan
        .keys
        .client("system:kube-proxy", Some("system:node-proxier"))?;
    secret(
        &folder.join("kube-proxy.conf"),
        &kubeconfig(SERVER, plan.keys.authority(), &proxy),
    )
}
