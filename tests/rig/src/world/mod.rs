//! One VPC with its control plane and nodes, brought up in order and taken down whole.

mod plan;
mod turn;

use std::{
    collections::BTreeMap,
    env, fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use turnpike_vpc::{netns::Namespace, resolver::Names, run::Ready};

use crate::{
    daemon::{self, Daemon},
    directory::Directory,
    otlp::Sink,
    pods::Pod,
    tokens::Issuer,
    vpc::{self, Vpc},
};

use self::plan::Plan;
pub use self::turn::Turn;

/// Where worlds keep their files while they stand.
const ROOT: &str = "/run/turnpike-box";

/// Where a world of this name keeps its files.
pub fn folder_of(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// Fixed address of the instance that runs the control plane.
pub const CONTROL: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 10));
const CONTROLLER_PORT: u16 = 15012;
const CONTROLLER_HTTP: u16 = 15014;
const AUDIT_PORT: u16 = 15016;
const AUDIT_HTTP: u16 = 15018;
pub(crate) const OTLP_PORT: u16 = 4317;
const AGENT_HTTP: u16 = 61678;
const GATE_HTTP: u16 = 15022;
pub const CONTROLLER_NAME: &str = "turnpike-controller.turnpike-system.svc";
const READY: Duration = Duration::from_secs(30);

/// The nodes of the box: name, and the zone it is in.
pub const NODES: [(&str, &str); 2] = [("node-a", "eu-west-1a"), ("node-b", "eu-west-1b")];

/// What to build.
#[derive(Clone, Debug)]
pub struct Options {
    /// Prefix of every namespace; letters, digits and `-`, at most ten.
    pub name: String,
    /// The processes outlive this one.
    pub keep: bool,
    /// A collector outside of the box. The world's own sink, which sidecars reach, passes on to it
    /// what it takes.
    pub otlp: Option<String>,
    /// Another build of the sidecar than the one beside this program.
    pub proxy: Option<PathBuf>,
    /// Added to the agents' environment, e.g. `WARM_IP_TARGET`.
    pub agent_environment: Vec<(String, String)>,
}

impl Options {
    /// A world for one test.
    pub fn test(name: &str) -> Self {
        Self {
            name: format!("tpt-{name}"),
            keep: false,
            otlp: None,
            proxy: None,
            agent_environment: Vec::new(),
        }
    }
}

/// A node: an instance with its agent and gate.
#[derive(Debug)]
pub struct Node {
    pub name: &'static str,
    pub zone: &'static str,
    pub namespace: Namespace,
    pub agent: Daemon,
    pub gate: Daemon,
    pub folder: PathBuf,
}

/// Everything that stands. Dropping it takes it down, unless it is to be kept.
#[derive(Debug)]
pub struct World {
    pub options: Options,
    pub folder: PathBuf,
    pub directory: Directory,
    pub issuer: Issuer,
    pub controller: Daemon,
    pub audit: Daemon,
    pub nodes: Vec<Node>,
    pub pods: BTreeMap<(String, String), Pod>,
    /// Takes what the sidecars export.
    pub sink: Sink,
    pub control: Namespace,
    /// What the VPC says of itself.
    pub ready: Ready,
    names: Names,
    vpc: Vpc,
    runtime: tokio::runtime::Runtime,
    _turn: Turn,
}

impl World {
    /// Brings a world up; `progress` hears what is being done.
    pub fn up(options: Options, progress: &dyn Fn(&str)) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the VPC in a box makes network namespaces and needs root"
        );
        let turn = Turn::wait(progress)?;
        Self::clean(&options.name)?;
        let folder = folder_of(&options.name);
        fs::create_dir_all(&folder)?;
        let undo = Undo(Some(options.name.clone()));
        let world = Self::build(options, folder, turn, progress)?;
        undo.disarm();
        Ok(world)
    }

    fn build(
        options: Options,
        folder: PathBuf,
        turn: Turn,
        progress: &dyn Fn(&str),
    ) -> Result<Self> {
        progress("VPC: router, subnets, NAT gateway, internet, two nodes");
        let vpc = Vpc::start(&options.name, &folder)?;
        let ready = vpc.ready.clone();
        let control = Namespace::open(&format!("{}-control", options.name))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let sink = own_sink(&control, &runtime)?;
        if let Some(collector) = &options.otlp {
            sink.pass_on(collector, &runtime)?;
        }
        let issuer = Issuer::new()?;
        let directory = Directory::create(folder.join("policies"))?;
        directory.write("mesh", include_str!("../../cluster/mesh.yaml"))?;

        progress("control plane: controller with its CA, audit");
        let plan = Plan {
            options: &options,
            folder: &folder,
            issuer: &issuer,
        };
        let mut controller = plan.controller(&control, directory.path())?;
        controller.ready(at(CONTROL, CONTROLLER_HTTP), "/healthz/ready", READY)?;
        let mut audit = plan.audit(&control)?;
        audit.ready(at(CONTROL, AUDIT_HTTP), "/healthz/live", READY)?;

        progress("nodes: agent and gate, warm pools of addresses");
        let mut nodes = Vec::new();
        for (name, zone) in NODES {
            nodes.push(plan.node(name, zone)?);
        }
        for node in &mut nodes {
            let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
            node.agent
                .ready(at(loopback, AGENT_HTTP), "/healthz/ready", READY)?;
            node.gate
                .ready(at(loopback, GATE_HTTP), "/healthz/live", READY)?;
        }
        let world = Self {
            options,
            folder,
            directory,
            issuer,
            controller,
            audit,
            nodes,
            pods: BTreeMap::new(),
            sink,
            control,
            ready,
            names: Names::new(),
            vpc,
            runtime,
            _turn: turn,
        };
        world.prove_isolation()?;
        Ok(world)
    }

    /// Removes whatever a world of this name left, in whatever state.
    pub fn clean(name: &str) -> Result<()> {
        let folder = folder_of(name);
        daemon::kill_recorded(&folder);
        vpc::down(name)?;
        discard(&folder)
    }

    /// Fails unless no namespace of this world, pods' included, has a way out to the machine's own
    /// network.
    pub fn prove_isolation(&self) -> Result<()> {
        let pods = self.pods.values().map(|pod| pod.namespace.clone());
        self.runtime
            .block_on(vpc::prove_isolation(&self.ready, pods))
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

    /// A namespace of the fabric: `router`, `internet`, an instance, or a pod's.
    pub fn namespace(&self, suffix: &str) -> Result<Namespace> {
        Ok(Namespace::open(&format!("{}-{suffix}", self.options.name))?)
    }

    /// Asks the controller's HTTP port.
    pub fn ask_controller(&self, path: &str) -> Result<crate::http::Response> {
        crate::http::get(&self.control, at(CONTROL, CONTROLLER_HTTP), path)
    }

    /// Asks the central record.
    pub fn ask_audit(&self, path: &str) -> Result<crate::http::Response> {
        crate::http::get(&self.control, at(CONTROL, AUDIT_HTTP), path)
    }

    /// Gives the cluster's resolver a name.
    pub fn name(&mut self, name: &str, addresses: &[IpAddr]) -> Result<()> {
        if addresses.is_empty() {
            self.names.remove(name);
        } else {
            self.names.insert(name.to_owned(), addresses.to_vec());
        }
        turnpike_vpc::resolver::write_zone(&self.ready.zone_file, &self.names)?;
        Ok(())
    }

    pub(crate) fn otlp_endpoint(&self) -> String {
        format!("http://{CONTROL}:{OTLP_PORT}")
    }

    /// Takes everything down, in the reverse order of building.
    pub fn down(&mut self) -> Result<()> {
        let names: Vec<_> = self.pods.keys().cloned().collect();
        for (namespace, name) in names {
            if let Err(error) = self.delete_pod(&namespace, &name) {
                tracing::warn!(%error, namespace, name, "the pod was not deleted as a runtime would");
            }
        }
        for node in &mut self.nodes {
            node.gate.stop(Duration::from_secs(3))?;
            node.agent.stop(Duration::from_secs(3))?;
        }
        self.audit.stop(Duration::from_secs(3))?;
        self.controller.stop(Duration::from_secs(3))?;
        self.vpc.stop()?;
        Self::clean(&self.options.name)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.options.keep {
            return;
        }
        if thread::panicking() {
            eprintln!("{}", self.logs());
        }
        if let Err(error) = self.down() {
            eprintln!("taking the world down: {error:#}");
        }
    }
}

impl World {
    /// The end of every log, for a failed test.
    pub fn logs(&self) -> String {
        let daemons = [&self.controller, &self.audit]
            .into_iter()
            .chain(self.nodes.iter().flat_map(|node| [&node.agent, &node.gate]))
            .chain(self.pods.values().flat_map(Pod::daemons));
        daemons
            .map(|daemon| format!("──── {}\n{}\n", daemon.name(), daemon::tail(&daemon.log())))
            .collect()
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
            && let Err(error) = World::clean(name)
        {
            eprintln!("cleaning up: {error:#}");
        }
    }
}

/// A collector of our own on the control instance.
pub fn own_sink(control: &Namespace, runtime: &tokio::runtime::Runtime) -> Result<Sink> {
    let listener = control.run(|| TcpListener::bind(at(CONTROL, OTLP_PORT)))??;
    let _entered = runtime.enter();
    Sink::serve(listener)
}

/// Takes away what programs mounted below a folder, the newest first.
pub fn unmount_below(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounted = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .rev();
    for mount in mounted.filter(|mount| Path::new(mount).starts_with(folder)) {
        // What is busy goes when its last user does.
        let _ = nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Removes a folder with what is mounted below it; one that is not there is fine.
pub fn discard(folder: &Path) -> Result<()> {
    unmount_below(folder);
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// One of our programs, beside this one.
pub fn program(name: &str) -> Result<PathBuf> {
    let here = env::current_exe()?;
    here.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not built; type `cargo build --workspace --bins`"))
}

pub(crate) fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}
