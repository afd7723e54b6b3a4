//! `turnpike-gate`: binds, gives up its privileges, serves until SIGTERM, or until a part of it has ended
//! (exit 1).

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::Parser;
use turnpike_certs::CredentialStore;
use turnpike_daemon::{log, signals};
use turnpike_gate::{
    app::{Gate, GateConfig, Sources},
    dns::DnsConfig,
    door::DoorConfig,
    listen::{self, Sockets},
    privileges,
    spool::SpoolConfig,
    state::PodLimits,
    upload::UploadConfig,
};
use turnpike_rules::{Identity, host::HostName};
use turnpike_wire::channel::Controller;

/// The node's egress gate.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The node's name in the cluster
    #[arg(long, env = "TURNPIKE_NODE_NAME")]
    node_name: String,
    /// The cluster's name, as the controller has it
    #[arg(long, env = "TURNPIKE_CLUSTER", default_value = "cluster")]
    cluster: String,
    /// The mesh's trust domain
    #[arg(long, env = "TURNPIKE_TRUST_DOMAIN", default_value = "cluster.local")]
    trust_domain: String,
    /// host:port of the controller
    #[arg(long, env = "TURNPIKE_CONTROLLER", value_parser = filled_in)]
    controller: String,
    /// The name in the controller's certificate
    #[arg(
        long,
        env = "TURNPIKE_CONTROLLER_NAME",
        default_value = "turnpike-controller.turnpike-system.svc"
    )]
    controller_name: String,
    /// The gate's service-account token, with audience `istio-ca`
    #[arg(long, env = "TURNPIKE_TOKEN_FILE")]
    token_file: PathBuf,
    /// The mesh's roots
    #[arg(long, env = "TURNPIKE_ROOT_FILE")]
    root_file: PathBuf,
    /// The agent's feed
    #[arg(long, env = "TURNPIKE_FEED_SOCKET")]
    feed_socket: PathBuf,
    /// Where the record and the last policy are kept
    #[arg(long, env = "TURNPIKE_SPOOL_DIR")]
    spool_dir: PathBuf,
    /// The record never takes more than this on disk; then new egress is denied
    #[arg(long, env = "TURNPIKE_SPOOL_MAX_BYTES", default_value_t = 1 << 30)]
    spool_max_bytes: u64,
    /// Port of the door, to which the node's rules turn captured TCP
    #[arg(long, env = "TURNPIKE_DOOR", default_value_t = 15002)]
    door: u16,
    /// Addresses at which pods' DNS questions are answered
    #[arg(
        long,
        env = "TURNPIKE_DNS_LISTEN",
        value_delimiter = ',',
        default_value = "169.254.20.10,fd00:20::10"
    )]
    dns_listen: Vec<IpAddr>,
    /// IP or IP:port of the VPC's resolver
    #[arg(long, env = "TURNPIKE_UPSTREAM_DNS", value_parser = server)]
    upstream_dns: SocketAddr,
    /// IP or IP:port of the cluster's DNS
    #[arg(long, env = "TURNPIKE_CLUSTER_DNS", value_parser = server)]
    cluster_dns: SocketAddr,
    /// The cluster's DNS domain
    #[arg(long, env = "TURNPIKE_CLUSTER_DOMAIN", default_value = "cluster.local")]
    cluster_domain: HostName,
    /// Further domains in the pods' search lists, such as eu-west-1.compute.internal
    #[arg(long, env = "TURNPIKE_SEARCH_DOMAINS", value_delimiter = ',')]
    search_domains: Vec<HostName>,
    /// host:port of the central record; without it entries stay in the spool
    #[arg(long, env = "TURNPIKE_AUDIT", value_parser = filled_in)]
    audit: Option<String>,
    /// Metrics and health
    #[arg(long, env = "TURNPIKE_HTTP", default_value = "127.0.0.1:15022")]
    http: SocketAddr,
    /// The user to become once all is bound
    #[arg(long, env = "TURNPIKE_UID", default_value_t = 1338)]
    uid: u32,
    /// Seconds that door and DNS wait at the start for the node's pods and their policies
    #[arg(long, env = "TURNPIKE_START_SECONDS", default_value_t = 5)]
    start_seconds: u64,
    /// Seconds that connections may go on for after SIGTERM
    #[arg(long, env = "TURNPIKE_DRAIN_SECONDS", default_value_t = 20)]
    drain_seconds: u64,
}

/// An address, with port 53 where none is given.
fn server(text: &str) -> Result<SocketAddr, String> {
    let bare = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
    bare.or_else(|_| text.parse())
        .map_err(|_| format!("`{text}` is neither IP nor IP:port"))
}

/// Kubelet leaves `$(…)` as it is where a Service did not exist when it started the container.
fn filled_in(text: &str) -> Result<String, &'static str> {
    if text.contains("$(") {
        return Err(
            "not filled in by kubelet: the Service did not exist when this container was started; \
             it will be known at the next start",
        );
    }
    Ok(text.to_owned())
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    log::init("info");
    let dns: Vec<_> = args
        .dns_listen
        .iter()
        .copied()
        .filter(|ip| usable(*ip))
        .collect();
    let sockets = listen::bind(args.door, &dns, args.http)?;
    privileges::give(&args.spool_dir, args.uid)?;
    privileges::drop_to(args.uid)?;
    privileges::close(&args.spool_dir)?;
    // Threads from here on: capabilities belong to threads.
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(run(args, sockets))
}

/// A node without IPv6 has no IPv6 resolver address; that is no reason not to start.
fn usable(ip: IpAddr) -> bool {
    ip.is_ipv4() || std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

async fn run(args: Args, sockets: Sockets) -> anyhow::Result<()> {
    let system = |account: &str| Identity::new(&args.trust_domain, "turnpike-system", account);
    let told_to_end = signals::told_to_end()?;
    let mut spool = SpoolConfig::new(&args.spool_dir, &args.node_name);
    spool.max_bytes = args.spool_max_bytes;
    let config = GateConfig {
        node: args.node_name.clone(),
        spool,
        dns: DnsConfig {
            upstream: args.upstream_dns,
            cluster: args.cluster_dns,
            cluster_domain: args.cluster_domain,
            search_domains: args.search_domains,
        },
        door: DoorConfig::default(),
        start_timeout: Duration::from_secs(args.start_seconds),
        drain: Duration::from_secs(args.drain_seconds),
    };
    let sources = Sources {
        cluster: args.cluster,
        controller: Controller {
            address: args.controller,
            server_name: args.controller_name,
            root_file: args.root_file,
            token_file: args.token_file,
        },
        identity: system("turnpike-gate")?,
        feed_socket: args.feed_socket,
        audit: match args.audit {
            Some(address) => Some(UploadConfig {
                address,
                identity: system("turnpike-audit")?,
                node: args.node_name,
                spool_dir: args.spool_dir,
            }),
            None => None,
        },
    };
    let credentials: Arc<CredentialStore> = CredentialStore::empty();
    let gate = Gate::start(config, PodLimits::default(), credentials, sockets).await?;
    gate.follow(sources);
    tracing::info!("the gate has started");
    Ok(gate.run(told_to_end).await?)
}
