//! A box from its first namespace to its last: the one place that composes the rest.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    net::{TcpListener, UdpSocket},
    task::JoinSet,
};

use crate::{
    claim,
    cloud::{Cloud, StartError},
    ec2,
    fabric::{self, Fabric, Namespaces, gateway, isolation, rules::API_PORT},
    http,
    internet::{self, Log, Root},
    metadata::Metadata,
    netns::{self, Namespace, system},
    resolver::{self, Resolver},
    spec::{METADATA, Spec},
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Claim(#[from] claim::Error),
    #[error(transparent)]
    Namespace(#[from] netns::Error),
    #[error(transparent)]
    Fabric(#[from] fabric::Error),
    #[error(transparent)]
    Cloud(#[from] StartError),
    #[error(transparent)]
    Internet(#[from] internet::Error),
    #[error("opening the box's sockets: {0}")]
    Socket(#[from] io::Error),
}

/// A box to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its namespaces are `NAME-router`, `NAME-internet` and `NAME-INSTANCE`.
    pub name: String,
    pub spec: Spec,
    /// Where its files are kept; made where absent.
    pub state: PathBuf,
}

/// What `STATE/ready` says, once everything answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ready {
    pub name: String,
    pub pid: u32,
    pub region: String,
    pub cidr: String,
    pub router: String,
    pub internet: String,
    /// By the spec's name.
    pub instances: BTreeMap<String, ReadyInstance>,
    /// Names of the pretended internet and their addresses.
    pub hosts: BTreeMap<String, Vec<IpAddr>>,
    pub nat_address: Ipv4Addr,
    pub resolver: SocketAddr,
    pub metadata: String,
    pub ec2: String,
    /// The test root in PEM.
    pub root: PathBuf,
    /// What reached the internet, as JSON lines.
    pub internet_log: PathBuf,
    /// Names to add, as JSON; write it by `resolver::write_zone`.
    pub zone_file: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReadyInstance {
    pub namespace: String,
    pub id: String,
    #[serde(rename = "type")]
    pub instance_type: String,
    pub zone: String,
    pub address: Ipv4Addr,
    pub gateway: Option<Ipv4Addr>,
    pub ipv6: Option<String>,
    /// A /80 that the fabric carries to the instance.
    pub ipv6_prefix: Option<String>,
}

/// Runs a box until `stop`, then removes all of it, also after an error.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> Result<(), Error> {
    let namespaces = Namespaces::named(&options.name, &options.spec)?;
    let (name, state) = (options.name.clone(), options.state.clone());
    fs::create_dir_all(&state).map_err(system(format!("making {}", state.display())))?;
    let claimed: Vec<Namespace> = namespaces.all().cloned().collect();
    let (taken, taken_state) = (name.clone(), state.clone());
    blocking(move || {
        let all: Vec<&Namespace> = claimed.iter().collect();
        claim::take(&taken, &taken_state, &all)
    })
    .await??;
    let ran = Box::pin(operate(options, namespaces, stop)).await;
    let released = blocking(move || claim::release(&name)).await?;
    ran.and(released.map(drop).map_err(Error::from))
}

async fn operate(
    options: Options,
    namespaces: Namespaces,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    let running = Box::pin(start(&options, namespaces)).await?;
    let Running {
        ready,
        cloud,
        mut tasks,
    } = running;
    let file = options.state.join("ready");
    write_ready(&file, &ready).map_err(system(format!("writing {}", file.display())))?;
    tracing::info!(name = options.name, ready = %file.display(), "the box is ready");
    tokio::select! {
        () = stop => tracing::info!(name = options.name, "stopping"),
        () = cloud.settle() => {}
        ended = tasks.join_next() => {
            return Err(io::Error::other(format!("a part of the box ended: {ended:?}")).into());
        }
    }
    Ok(())
}

struct Running {
    ready: Ready,
    cloud: Arc<Cloud>,
    /// Everything that answers; it ends when this is dropped.
    tasks: JoinSet<()>,
}

async fn start(options: &Options, namespaces: Namespaces) -> Result<Running, Error> {
    let Options {
        name: _,
        spec,
        state,
    } = options;
    let fabric = Fabric::build(spec, namespaces.clone()).await?;
    let all: Vec<Namespace> = namespaces.all().cloned().collect();
    let cloud = Arc::new(Cloud::start(spec, fabric).await?);
    isolation::prove(&namespaces.router, &all, spec.cidr()).await?;

    let mut tasks = JoinSet::new();
    let root = Root::generate()?;
    fs::write(state.join("root.pem"), root.pem())?;
    let log = Arc::new(Log::create(&state.join("internet.jsonl"))?);
    let zone_file = state.join("zone.json");
    if !zone_file.exists() {
        resolver::write_zone(&zone_file, &resolver::Names::new())?;
    }
    let resolver = Arc::new(Resolver::new(spec, zone_file, Arc::clone(&log)));
    internet::start(
        spec,
        &namespaces.internet,
        &root,
        &log,
        &resolver,
        &mut tasks,
    )?;

    let router = &namespaces.router;
    let dns = SocketAddr::new(spec.resolver().into(), 53);
    tasks.spawn(Arc::clone(&resolver).serve_udp(bind(router, dns)?));
    tasks.spawn(resolver.serve_tcp(listen(router, dns)?));
    let api = SocketAddr::new(spec.resolver().into(), API_PORT);
    let answering = Arc::clone(&cloud);
    tasks.spawn(http::serve(listen(router, api)?, move |peer, request| {
        ec2::answer(Arc::clone(&answering), peer, request)
    }));
    let metadata = Arc::new(Metadata::new(Arc::clone(&cloud)));
    let address = SocketAddr::new(METADATA.into(), 80);
    tasks.spawn(http::serve(
        listen(router, address)?,
        move |peer, request| {
            let metadata = Arc::clone(&metadata);
            async move { metadata.answer(peer, &request) }
        },
    ));
    Ok(Running {
        ready: ready(options, &namespaces, &cloud),
        cloud,
        tasks,
    })
}

fn ready(options: &Options, namespaces: &Namespaces, cloud: &Cloud) -> Ready {
    let Options { name, spec, state } = options;
    let world = cloud.current();
    let instances = world.instances.values().filter_map(|instance| {
        let (interface, _) = world.attached_to(&instance.id).first().copied()?;
        let subnet = spec
            .subnets()
            .iter()
            .find(|subnet| subnet.id == instance.subnet);
        let ready = ReadyInstance {
            namespace: namespaces.instances.get(&instance.name)?.name().into(),
            id: instance.id.to_string(),
            instance_type: instance.limits.name.into(),
            zone: subnet.map_or_else(String::new, |subnet| subnet.zone.clone()),
            address: interface.primary(),
            gateway: subnet.map(|subnet| gateway(subnet.cidr)),
            ipv6: interface.ipv6.map(|v6| v6.to_string()),
            ipv6_prefix: interface.ipv6_prefix.map(|net| net.to_string()),
        };
        Some((instance.name.clone(), ready))
    });
    let hosts = spec.hosts().iter().map(|host| {
        let addresses = [Some(IpAddr::V4(host.v4)), host.v6.map(IpAddr::V6)];
        (host.name.clone(), addresses.into_iter().flatten().collect())
    });
    Ready {
        name: name.clone(),
        pid: std::process::id(),
        region: spec.region().into(),
        cidr: spec.cidr().to_string(),
        router: namespaces.router.name().into(),
        internet: namespaces.internet.name().into(),
        instances: instances.collect(),
        hosts: hosts.collect(),
        nat_address: spec.nat_address(),
        resolver: SocketAddr::new(spec.resolver().into(), 53),
        metadata: format!("http://{METADATA}"),
        ec2: format!("http://{}:{API_PORT}", spec.resolver()),
        root: state.join("root.pem"),
        internet_log: state.join("internet.jsonl"),
        zone_file: state.join("zone.json"),
    }
}

/// Whole or not at all: whoever waits for the file may read it at once.
fn write_ready(path: &Path, ready: &Ready) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(ready)?;
    text.push(b'\n');
    let fresh = path.with_extension("new");
    fs::write(&fresh, text)?;
    fs::rename(fresh, path)
}

fn listen(namespace: &Namespace, address: SocketAddr) -> Result<TcpListener, Error> {
    let listener = namespace.run(|| std::net::TcpListener::bind(address))??;
    listener.set_nonblocking(true)?;
    Ok(TcpListener::from_std(listener)?)
}

fn bind(namespace: &Namespace, address: SocketAddr) -> Result<UdpSocket, Error> {
    let socket = namespace.run(|| std::net::UdpSocket::bind(address))??;
    socket.set_nonblocking(true)?;
    Ok(UdpSocket::from_std(socket)?)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    Ok(tokio::task::spawn_blocking(work)
        .await
        .map_err(fabric::Error::Worker)?)
}

/// Removes a box of that name in whatever state it is; says whether there was one.
pub async fn down(name: String) -> Result<bool, Error> {
    let released = tokio::time::timeout(
        Duration::from_secs(60),
        blocking(move || claim::release(&name)),
    );
    let late = |_| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            "removing the box took over a minute",
        )
    };
    Ok(released.await.map_err(late)???)
}
