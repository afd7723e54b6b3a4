//! `turnpike-controller`.

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use turnpike_server::{Args, Controller};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    log();
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        told.cancel();
    });
    Controller::start(args).await?.run(stop).await
}

/// On standard error, by `RUST_LOG`; JSON where `TURNPIKE_LOG=json`.
fn log() {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info,kube_runtime=error,kube_client=error"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if std::env::var("TURNPIKE_LOG").is_ok_and(|format| format == "json") {
        lines.json().init();
    } else {
        lines.init();
    }
}
