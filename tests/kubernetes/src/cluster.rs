//! One cluster, brought up in order and taken down whole.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use turnpike_rig::{
    capture::Capture,
    daemon::{self, Daemon},
    otlp::Sink,
    vpc::{self, Vpc},
    wait_for,
    world::{self, Turn, discard, folder_of},
};
use turnpike_vpc::{claim, netns::Namespace, run::Ready};

use crate::{
    build::{self, Cache},
    cgroup, control,
    control::Keys,
    images,
    kubectl::Kubectl,
    node::{Node, Plan},
};

const NODES: [&str; 2] = ["node-a", "node-b"];
const REGISTERED: Duration = Duration::from_secs(90);

/// What to build.
#[derive(Clone, Debug)]
pub struct Options {
    /// Prefix of every namespace; letters, digits and `-`, at most ten.
    pub name: String,
    /// The processes outlive this one.
    pub keep: bool,
}

/// Everything that stands. Dropping it takes it down, unless it is to be kept.
#[derive(Debug)]
pub struct Cluster {
    pub options: Options,
    pub cache: Cache,
    /// Sockets, logs, keys.
    pub folder: PathBuf,
    pub kubectl: Kubectl,
    pub nodes: Vec<Node>,
    /// Takes traces and metrics while this process lives.
    pub sink: Sink,
    pub control: Namespace,
    /// What the VPC says of itself.
    pub ready: Ready,
    control_plane: Vec<Daemon>,
    vpc: Vpc,
    runtime: tokio::runtime::Runtime,
    _turn: Turn,
}

impl Cluster {
    /// Brings a cluster up; `progress` hears what is being done. Its nodes are not ready: they have
    /// no pod network yet.
    pub fn up(options: Options, progress: &dyn Fn(&str)) -> Result<Self> {
        Self::up_in(Turn::wait(progress)?, options, progress)
    }

    /// The same for whoever has waited for its turn, such as to clean up first: another's cluster of
    /// the same name is not to be taken from under it.
    pub fn up_in(turn: Turn, options: Options, progress: &dyn Fn(&str)) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "a cluster in the box makes namespaces and needs root"
        );
        let cache = Cache::open()?;
        build::build(&cache)?;
        let images = images::make(&cache, progress)?;
        Self::clean(&options.name)?;
        let undo = Undo(Some(options.name.clone()));
        let cluster = Self::start(options, cache, &images, turn, progress)?;
        undo.disarm();
        Ok(cluster)
    }

    fn start(
        options: Options,
        cache: Cache,
        images: &[PathBuf],
        turn: Turn,
        progress: &dyn Fn(&str),
    ) -> Result<Self> {
        let folder = folder_of(&options.name);
        let disk = cache.disk(&options.name);
        for folder in [&folder, &disk] {
            fs::create_dir_all(folder)?;
        }
        progress("VPC: router, subnets, NAT gateway, internet, three instances");
        let vpc = Vpc::start(&options.name, &folder)?;
        let ready = vpc.ready.clone();
        let control = Namespace::open(&format!("{}-control", options.name))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let sink = world::own_sink(&control, &runtime)?;
        let keys = Keys::make(&folder.join("keys"))?;

        progress("nodes: containerd with its images, kubelet, kube-proxy");
        let mut nodes = Vec::new();
        for name in NODES {
            nodes.push(Node::start(&Plan {
                cache: &cache,
                keys: &keys,
                cluster: &options.name,
                name,
                instance: ready
                    .instances
                    .get(name)
                    .with_context(|| format!("the VPC has no {name}"))?,
                images,
                folder: &folder,
                disk: &disk.join(name),
                keep: options.keep,
            })?);
        }
        progress("control plane: etcd, API server, controllers, scheduler");
        let control_plane = control::start(&cache, &keys, &control, &folder, &disk, options.keep)?;
        let kubectl = Kubectl::new(&cache, &control, &keys.kubeconfig("admin"));
        let mut cluster = Self {
            options,
            cache,
            folder,
            kubectl,
            nodes,
            sink,
            control,
            ready,
            control_plane,
            vpc,
            runtime,
            _turn: turn,
        };
        progress("nodes: registering with the API server");
        cluster.furnish()?;
        cluster.wrappers()?;
        cluster.prove_isolation()?;
        Ok(cluster)
    }

    /// Waits for the nodes, and adds what every cluster has: its DNS.
    fn furnish(&mut self) -> Result<()> {
        let registered = wait_for(REGISTERED, || {
            let running = self.nodes.iter_mut().all(Node::is_running);
            if !running {
                return Some(false);
            }
            let listed = self.kubectl.ok(&["get", "nodes", "-o", "name"]).ok()?;
            (listed.lines().count() == NODES.len()).then_some(true)
        });
        ensure!(
            registered == Some(true),
            "the nodes did not register:\n{}",
            self.logs()
        );
        self.kubectl
            .apply(include_str!("../manifests/coredns.yaml"))
    }

    /// Removes whatever a cluster of this name left, in whatever state.
    pub fn clean(name: &str) -> Result<()> {
        let folder = folder_of(name);
        daemon::kill_recorded(&folder);
        vpc::down(name)?;
        cgroup::remove(name)?;
        discard(&folder)?;
        discard(&Cache::locate()?.disk(name))
    }

    /// Fails unless no namespace of this cluster, pods' included, has a way out to the machine's
    /// own network.
    pub fn prove_isolation(&self) -> Result<()> {
        let mut pods = Vec::new();
        for node in &self.nodes {
            for path in node.pod_networks()? {
                pods.extend(Borrowed::take(&self.options.name, pods.len(), &path)?);
            }
        }
        let namespaces = pods.iter().map(|pod| pod.namespace.clone());
        let proof = vpc::prove_isolation(&self.ready, namespaces);
        self.runtime.block_on(proof)
    }

    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .with_context(|| format!("no node {name}"))
    }

    pub fn node_mut(&mut self, name: &str) -> Result<&mut Node> {
        let found = self.nodes.iter_mut().find(|node| node.name == name);
        found.with_context(|| format!("no node {name}"))
    }

    /// Captures every packet that crosses the VPC's router.
    pub fn capture(&self) -> Result<Capture> {
        Capture::begin(&Namespace::open(&self.ready.router)?, &self.folder)
    }

    /// Takes everything down, in the reverse order of building.
    pub fn down(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            node.kill()?;
        }
        for daemon in self.control_plane.iter_mut().rev() {
            daemon.stop(Duration::from_secs(3))?;
        }
        self.vpc.stop()?;
        Self::clean(&self.options.name)
    }

    /// The end of every log, for a failure.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let mut show = |name: &str, log: &str| {
            text.push_str(&format!("──── {name}\n{}\n", daemon::tail(log)));
        };
        for daemon in &self.control_plane {
            show(daemon.name(), &daemon.log());
        }
        for node in &self.nodes {
            show(&node.name, &node.boot_log());
            for service in ["containerd", "kubelet", "kube-proxy"] {
                show(&format!("{} {service}", node.name), &node.log(service));
            }
        }
        text
    }

    /// Scripts for people: kubectl, helm, a shell on a node, a command on the control instance.
    fn wrappers(&self) -> Result<()> {
        let folder = self.folder.join("bin");
        fs::create_dir_all(&folder)?;
        let enter = format!("nsenter --net={}", self.control.path().display());
        let kubeconfig = self.kubectl.kubeconfig().display().to_string();
        let programs = self.cache.programs();
        let mut scripts = vec![("on-control".to_owned(), format!("exec {enter} \"$@\""))];
        for name in ["kubectl", "helm"] {
            let program = programs.join(name);
            scripts.push((
                name.to_owned(),
                format!(
                    "KUBECONFIG={kubeconfig} exec {enter} {} \"$@\"",
                    program.display()
                ),
            ));
        }
        for node in &self.nodes {
            // Looked for each time, because a node that boots again has another.
            let process = node.process_file();
            let process = process.display();
            scripts.push((
                node.name.clone(),
                format!(
                    "outer=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' {process})\n\
                     read -r pid _ < /proc/$outer/task/$outer/children\n\
                     [ $# -gt 0 ] || set -- bash\n\
                     exec nsenter --target \"$pid\" --mount --pid --net --uts --ipc --root --wd \"$@\""
                ),
            ));
        }
        for (name, script) in scripts {
            let path = folder.join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
            executable(&path)?;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.options.keep {
            return;
        }
        if thread::panicking() {
            eprintln!("{}", self.logs());
        }
        if let Err(error) = self.down() {
            eprintln!("taking the cluster down: {error:#}");
        }
    }
}

/// A pod's network namespace under a name, for as long as it is looked at.
struct Borrowed {
    cluster: String,
    namespace: Namespace,
}

impl Borrowed {
    /// `None` where the pod has ended meanwhile.
    fn take(cluster: &str, number: usize, path: &Path) -> Result<Option<Self>> {
        let namespace = Namespace::handle(&format!("{cluster}-pod-{number}"))?;
        claim::add(cluster, &namespace)?;
        let borrowed = Self {
            cluster: cluster.to_owned(),
            namespace,
        };
        let place = borrowed.namespace.path();
        fs::write(&place, "")?;
        const NOTHING: Option<&str> = None;
        if mount(Some(path), &place, NOTHING, MsFlags::MS_BIND, NOTHING).is_err() {
            ensure!(!path.exists(), "{} cannot be looked at", path.display());
            return Ok(None);
        }
        Ok(Some(borrowed))
    }
}

impl Drop for Borrowed {
    /// Gives the name back; the namespace is its pod's.
    fn drop(&mut self) {
        let place = self.namespace.path();
        let _ = umount2(&place, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&place);
        let _ = claim::forget(&self.cluster, &self.namespace);
    }
}

/// Takes down what a failed start left.
struct Undo(Option<String>);

impl Undo {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(name) = &self.0
            && let Err(error) = Cluster::clean(name)
        {
            eprintln!("cleaning up: {error:#}");
        }
    }
}

fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}
