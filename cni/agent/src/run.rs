//! The composition: everything is made here, in the order in which it must stand.

use std::{fs, io, sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use turnpike_cloud::Cloud;
use turnpike_daemon::tasks::{Ended, Tasks};
use turnpike_datapath::{Datapath, Error as DatapathError, Mac, NodePlan, PrimaryEni, Snat};
use turnpike_ipam::{Config, Store, journal::JournalError};
use turnpike_rules::pod::{Members, PodNetwork};
use turnpike_wire::{
    ads::{self, ClientConfig, Subscription},
    names::WILDCARD,
    node::{cni_server::CniServer, feed_server::FeedServer},
    resource::Resource,
};

use crate::{
    apply,
    clock::{self, Clock},
    cni::CniService,
    config::Settings,
    denials,
    feed::FeedService,
    guard,
    identity::{Identity, IdentityError},
    install,
    node::{Node, Parts, datapath_eni},
    pages::{self, Show},
    policy::{self, Policy},
    restore,
    sockets::{self, Access, SocketError},
    tombstones::Tombstones,
    warm,
};

/// What runs when the signal comes may take this long to end.
const DRAIN: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("the node's own rules: {0}")]
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        source: io::Error,
    },
    #[error("the interface address `{0}` is no MAC address")]
    Mac(String),
    #[error("{0}; the agent ends with it, pods keep their network")]
    Ended(#[from] Ended),
}

/// Runs the agent until `stop` is cancelled. The datapath stays when it ends: pods go on.
pub async fn run<C: Cloud>(
    settings: Settings,
    cloud: C,
    stop: CancellationToken,
) -> Result<(), RunError> {
    let Some(node) = stop
        .run_until_cancelled(start(settings, &cloud, stop.clone()))
        .await
    else {
        return Ok(());
    };
    let node = node?;
    let mut tasks = Tasks::default();
    serve(&node, &mut tasks)?;
    http_servers(&node, &mut tasks).await?;
    background(&node, cloud, &mut tasks);
    tracing::info!(node = node.settings.node_name, "ready");
    let ended = tokio::select! {
        // First: tasks end because of it.
        biased;
        () = stop.cancelled() => Ok(()),
        ended = tasks.ended() => Err(ended.into()),
    };
    stop.cancel();
    node.work.close();
    let drained = async {
        node.work.wait().await;
        tasks.drained().await;
    };
    if tokio::time::timeout(DRAIN, drained).await.is_err() {
        tracing::warn!("not everything ended in time; the next start will restore it");
    }
    ended
}

/// Everything up to the point where requests may come.
async fn start<C: Cloud>(
    settings: Settings,
    cloud: &C,
    stop: CancellationToken,
) -> Result<Arc<Node>, RunError> {
    let io = |what| move |source| RunError::Io { what, source };
    let clock = Clock::start().map_err(io("the boot clock"))?;
    let boot = clock::boot_id().map_err(io("the boot id"))?;
    let identity = Identity::learn(cloud, &settings.state_dir).await?;
    let config = Config {
        limits: identity.pool_limits(),
        targets: settings.targets,
        cooldown: settings.cooldown,
    };
    let store = Store::open(&settings.state_dir, config, &boot, clock.now())?;
    let datapath = Datapath::open(&node_plan(&settings, &identity, &store)?).await?;
    let policy = Policy::load(&settings.state_dir);
    let tombstones =
        Tombstones::beside(&settings.cni_socket).map_err(io("the tombstones' folder"))?;
    let node = Node::new(Parts {
        settings,
        clock,
        identity,
        store,
        datapath,
        policy,
        tombstones,
        stop,
    });
    restore::restore(&node).await?;
    // What the journal knows serves pods, whether or not EC2 can be heard.
    let known = node.store.read(|pool| pool.enis().count() > 0);
    node.warmed.send_replace(known);
    restore::bury(&node).await.map_err(io("tombstones"))?;
    Ok(node)
}

/// The node's own network: its interfaces as the journal knows them and the kernel has them.
/// Those that have come or gone meanwhile, the first look at EC2 sets right.
fn node_plan(
    settings: &Settings,
    identity: &Identity,
    store: &Store,
) -> Result<NodePlan, RunError> {
    let instance = &identity.instance;
    let mac = |text: &str| {
        text.parse::<Mac>()
            .map_err(|_| RunError::Mac(text.to_owned()))
    };
    let links = links();
    let attached = |mac: &str| links.iter().any(|link| link == mac);
    let enis: Vec<_> = store.read(|pool| pool.enis().cloned().collect());
    let present: Vec<_> = enis
        .into_iter()
        .filter(|eni| eni.is_primary() || attached(&eni.mac))
        .collect();
    let secondary = present
        .iter()
        .filter_map(|eni| datapath_eni(eni, settings.eni_mtu))
        .collect();
    for eni in &present {
        store.ready(&eni.id);
    }
    let direct = instance
        .vpc_cidrs
        .iter()
        .chain(&settings.exclude_snat)
        .copied()
        .collect();
    Ok(NodePlan {
        primary: PrimaryEni {
            mac: mac(&instance.mac)?,
            address: instance.address,
            address6: None,
        },
        secondary,
        snat: (!settings.external_snat).then_some(Snat { direct }),
        sysctls: settings.sysctl_dir.clone(),
    })
}

/// Hardware addresses of this namespace's links.
fn links() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/class/net") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("address")).ok())
        .map(|address| address.trim().to_ascii_lowercase())
        .collect()
}

fn serve(node: &Arc<Node>, tasks: &mut Tasks) -> Result<(), RunError> {
    let Settings {
        cni_socket,
        feed_socket,
        gate_uid,
        ..
    } = &node.settings;
    let cni = sockets::bind(cni_socket, Access::RootOnly)?;
    let feed = sockets::bind(feed_socket, Access::GroupOf(*gate_uid))?;
    let stop = node.stop.clone();
    let service = CniServer::new(CniService(Arc::clone(node)));
    tasks.spawn("the CNI server", async move {
        let server = Server::builder().add_service(service);
        let incoming = UnixListenerStream::new(cni);
        report(
            server
                .serve_with_incoming_shutdown(incoming, stop.cancelled())
                .await,
        );
    });
    let stop = node.stop.clone();
    let service = FeedServer::new(FeedService(Arc::clone(node)));
    tasks.spawn("the feed's server", async move {
        let server = Server::builder().add_service(service);
        let incoming = UnixListenerStream::new(feed);
        report(
            server
                .serve_with_incoming_shutdown(incoming, stop.cancelled())
                .await,
        );
    });
    Ok(())
}

fn report(served: Result<(), tonic::transport::Error>) {
    if let Err(error) = served {
        tracing::error!(%error, "a server ended");
    }
}

async fn http_servers(node: &Arc<Node>, tasks: &mut Tasks) -> Result<(), RunError> {
    let Settings {
        metrics,
        introspection,
        ..
    } = node.settings;
    let listen = async |address| {
        let bound = TcpListener::bind(address).await;
        bound.map_err(|source| RunError::Io {
            what: "an HTTP port",
            source,
        })
    };
    let listener = listen(metrics).await?;
    tasks.spawn(
        "metrics",
        pages::serve(Arc::clone(node), listener, Show::Metrics),
    );
    let listener = listen(introspection).await?;
    tasks.spawn(
        "introspection",
        pages::serve(Arc::clone(node), listener, Show::Introspection),
    );
    Ok(())
}

fn background<C: Cloud>(node: &Arc<Node>, cloud: C, tasks: &mut Tasks) {
    tasks.spawn(
        "the warm pool",
        warm::run(Arc::clone(node), Arc::new(cloud)),
    );
    if let Some(folders) = node.settings.install.clone() {
        tasks.spawn("the CNI's files", install::keep(Arc::clone(node), folders));
    }
    let parts = Arc::clone(node);
    tasks.spawn("the journal's writer", async move {
        parts.stop.run_until_cancelled(parts.store.ended()).await;
    });
    let parts = Arc::clone(node);
    tasks.spawn("a writer of the kernel's rules and links", async move {
        parts.stop.run_until_cancelled(parts.datapath.ended()).await;
    });
    tasks.spawn("policy to pods", apply::run(Arc::clone(node)));
    tasks.spawn("policy to disk", policy::keep(Arc::clone(node)));
    tasks.spawn("denials", denials::forward(Arc::clone(node)));
    tasks.spawn("untold denials", denials::tell_untold(Arc::clone(node)));
    tasks.spawn("the watch over the rules", guard::keep(Arc::clone(node)));
    let confirming = Arc::clone(node);
    tasks.spawn("what only the disk says", async move {
        policy::confirm(Arc::clone(&confirming)).await;
        confirming.stop.cancelled().await;
    });
    tasks.spawn("the controller's client", discover(Arc::clone(node)));
}

/// One stream to the controller, for everything about this node.
async fn discover(node: Arc<Node>) {
    let Settings {
        node_name,
        cluster,
        controller,
        ..
    } = &node.settings;
    // Both fit: nothing is ever full.
    let (subscribe, subscriptions) = mpsc::channel(2);
    for type_url in [PodNetwork::TYPE_URL, Members::TYPE_URL] {
        subscribe
            .send(Subscription::subscribe(type_url, [WILDCARD]))
            .await
            .ok();
    }
    let config = ClientConfig::new(node_name, cluster);
    let client = ads::run(
        config,
        controller.clone(),
        subscriptions,
        node.policy.clone(),
    );
    node.stop.run_until_cancelled(client).await;
    drop(subscribe);
}
