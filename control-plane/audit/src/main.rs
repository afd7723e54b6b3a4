//! `turnpike-audit`: the central egress record.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Context;
use clap::Parser;
use tokio::net::TcpListener;
use turnpike_audit::{
    Store,
    app::{self, Listeners},
};
use turnpike_certs::CredentialStore;
use turnpike_daemon::{log, signals, tasks::Tasks};
use turnpike_rules::Identity;
use turnpike_wire::{ca_client, channel::Controller};

/// Collects and keeps the egress records of all nodes.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Where gates upload
    #[arg(long, env = "TURNPIKE_LISTEN", default_value = "0.0.0.0:15016")]
    listen: SocketAddr,
    /// sqlite:PATH
    #[arg(long, env = "TURNPIKE_STORE")]
    store: String,
    /// Questions, metrics and health
    #[arg(long, env = "TURNPIKE_HTTP", default_value = "127.0.0.1:15018")]
    http: SocketAddr,
    /// Metrics and health alone, where others than this host may ask; unset: nowhere else
    #[arg(long, env = "TURNPIKE_HEALTH")]
    health: Option<SocketAddr>,
    /// Of the identities of gates and of the record itself
    #[arg(long, env = "TURNPIKE_TRUST_DOMAIN", default_value = "cluster.local")]
    trust_domain: String,
    /// host:port of the controller
    #[arg(long, env = "TURNPIKE_CONTROLLER")]
    controller: String,
    /// The name in the controller's certificate
    #[arg(
        long,
        env = "TURNPIKE_CONTROLLER_NAME",
        default_value = "turnpike-controller.turnpike-system.svc"
    )]
    controller_name: String,
    /// The record's service-account token, with audience `istio-ca`
    #[arg(long, env = "TURNPIKE_TOKEN_FILE")]
    token_file: PathBuf,
    /// The mesh's roots
    #[arg(long, env = "TURNPIKE_ROOT_FILE")]
    root_file: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    log::init("info");
    let told_to_end = signals::told_to_end()?;
    let system = |account: &str| Identity::new(&args.trust_domain, "turnpike-system", account);
    let store = Store::open(&args.store)
        .await
        .with_context(|| format!("opening {}", args.store))?;
    let listen = |address: SocketAddr| async move {
        TcpListener::bind(address)
            .await
            .with_context(|| format!("listening on {address}"))
    };
    let listeners = Listeners {
        uploads: listen(args.listen).await?,
        questions: listen(args.http).await?,
        health: match args.health {
            Some(address) => Some(listen(address).await?),
            None => None,
        },
    };
    let credentials = CredentialStore::empty();
    let controller = Controller {
        address: args.controller.clone(),
        server_name: args.controller_name.clone(),
        root_file: args.root_file.clone(),
        token_file: args.token_file.clone(),
    };
    let renewal = ca_client::keep_fresh(controller, system("turnpike-audit")?, credentials.clone());
    let mut tasks = Tasks::default();
    tasks.spawn("the certificate's renewal", renewal);
    let gate = system("turnpike-gate")?;
    app::run(store, credentials, gate, listeners, tasks, told_to_end).await?;
    tracing::info!("stopping");
    Ok(())
}
