//! The box that the subjects are measured in.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use turnpike_rig::{Options, Workload, World, cluster, daemon::Daemon};

use crate::peers;

/// What is compared with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Setting {
    /// One proxy beside the client, plaintext HTTP/1.1 both ways.
    Plain,
    /// A proxy on each side, mutual TLS between them, HTTP/1.1 all the way.
    Pair,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Proxy {
    Turnpike,
    Nginx,
    Envoy,
}

/// One proxy (or two) with its client's pod.
#[derive(Debug)]
pub(crate) struct Subject {
    pub(crate) setting: Setting,
    pub(crate) proxy: Proxy,
    /// Namespace and name of the client's pod.
    pub(crate) client: (&'static str, &'static str),
    pub(crate) url: &'static str,
    /// The proxies' processes: their CPU time is what counts.
    pub(crate) processes: Vec<u32>,
}

impl Subject {
    pub(crate) fn name(&self) -> String {
        format!("{:?} {:?}", self.setting, self.proxy)
    }
}

#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) world: World,
    pub(crate) subjects: Vec<Subject>,
    // Held, so that they run.
    peers: Vec<Daemon>,
}

const BARE: &str = "http://10.96.1.10/";
const OURS: &str = "http://10.96.1.11/";
const THEIRS: &str = "http://10.96.1.12/";

impl Stage {
    pub(crate) fn up(proxy: &Path, envoy: Option<&Path>) -> Result<Self> {
        ensure!(
            proxy.is_file(),
            "{} is not built; `cargo bench-proxy` builds it",
            proxy.display()
        );
        let options = Options {
            proxy: Some(proxy.canonicalize()?),
            ..Options::test("bench")
        };
        let mut world = World::up(options, &|what| eprintln!("{what}"))?;
        world
            .directory
            .write("bench", include_str!("../cluster.yaml"))?;
        start(&mut world, server("bare", "node-a"), false)?;
        start(&mut world, server("ours", "node-a"), true)?;
        start(
            &mut world,
            cluster::client("bench", "plain-ours", "client", "node-b"),
            true,
        )?;
        start(
            &mut world,
            cluster::client("bench", "pair-ours", "client", "node-b"),
            true,
        )?;
        let mut stage = Self {
            world,
            subjects: Vec::new(),
            peers: Vec::new(),
        };
        stage.ours()?;
        stage.nginx()?;
        if let Some(envoy) = envoy {
            stage.envoy(envoy)?;
        }
        Ok(stage)
    }

    fn ours(&mut self) -> Result<()> {
        let pid = |name: &str| -> Result<u32> {
            let sidecar = self.world.pod("bench", name)?.sidecar.as_ref();
            sidecar
                .and_then(Daemon::pid)
                .with_context(|| format!("{name} has a sidecar"))
        };
        let (plain, pair, server) = (pid("plain-ours")?, pid("pair-ours")?, pid("ours")?);
        self.subjects.push(Subject {
            setting: Setting::Plain,
            proxy: Proxy::Turnpike,
            client: ("bench", "plain-ours"),
            url: BARE,
            processes: vec![plain],
        });
        self.subjects.push(Subject {
            setting: Setting::Pair,
            proxy: Proxy::Turnpike,
            client: ("bench", "pair-ours"),
            url: OURS,
            processes: vec![pair, server],
        });
        Ok(())
    }

    fn nginx(&mut self) -> Result<()> {
        let bare = self.world.pod("bench", "bare")?.address;
        let daemon = self.in_place_of_sidecar("plain-nginx", |pod| peers::nginx(pod, bare))?;
        self.subjects.push(Subject {
            setting: Setting::Plain,
            proxy: Proxy::Nginx,
            client: ("bench", "plain-nginx"),
            url: BARE,
            processes: vec![daemon],
        });
        Ok(())
    }

    fn envoy(&mut self, envoy: &Path) -> Result<()> {
        let bare = self.world.pod("bench", "bare")?.address;
        let plain = self.in_place_of_sidecar("plain-envoy", |pod| {
            peers::envoy(envoy, pod, &peers::plain(bare))
        })?;
        start(&mut self.world, server("theirs", "node-a"), true)?;
        let theirs = self.world.pod("bench", "theirs")?.address;
        let certificates = peers::Certificates::make()?;
        let server = self.replace("theirs", |pod| {
            peers::envoy(envoy, pod, &peers::terminate(theirs, &certificates))
        })?;
        let pair = self.in_place_of_sidecar("pair-envoy", |pod| {
            peers::envoy(envoy, pod, &peers::originate(theirs, &certificates))
        })?;
        self.subjects.push(Subject {
            setting: Setting::Plain,
            proxy: Proxy::Envoy,
            client: ("bench", "plain-envoy"),
            url: BARE,
            processes: vec![plain],
        });
        self.subjects.push(Subject {
            setting: Setting::Pair,
            proxy: Proxy::Envoy,
            client: ("bench", "pair-envoy"),
            url: THEIRS,
            processes: vec![pair, server],
        });
        Ok(())
    }

    /// A client's pod whose traffic is captured by a peer instead of our sidecar.
    fn in_place_of_sidecar(
        &mut self,
        name: &'static str,
        peer: impl FnOnce(&turnpike_rig::Pod) -> Result<Daemon>,
    ) -> Result<u32> {
        start(
            &mut self.world,
            cluster::client("bench", name, "client", "node-b"),
            true,
        )?;
        self.replace(name, peer)
    }

    fn replace(
        &mut self,
        name: &str,
        peer: impl FnOnce(&turnpike_rig::Pod) -> Result<Daemon>,
    ) -> Result<u32> {
        let pod = self.world.pod_mut("bench", name)?;
        if let Some(mut sidecar) = pod.sidecar.take() {
            sidecar.kill()?;
        }
        let daemon = peer(pod)?;
        let pid = daemon.pid().context("it was started")?;
        self.peers.push(daemon);
        Ok(pid)
    }
}

fn start(world: &mut World, workload: Workload<'_>, labelled: bool) -> Result<()> {
    world.start_pod(&workload, labelled).map(|_| ())
}

/// nginx that answers 1 KiB from memory.
fn server(name: &'static str, node: &'static str) -> Workload<'static> {
    Workload {
        namespace: "bench",
        name,
        app: name,
        service_account: name,
        node,
        command: &["nginx", "-c", "/run/config/nginx.conf"],
        port: Some(8080),
        files: vec![("nginx.conf", peers::origin())],
    }
}
