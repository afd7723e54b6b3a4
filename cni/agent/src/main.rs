//! `turnpike-node`: one on every node.

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use turnpike_agent::config::{Args, Settings};
use turnpike_cloud::{Ec2, Pace};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    log();
    let settings = Settings::try_from(Args::parse())?;
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let stopper = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; pods keep their network");
        stopper.cancel();
    });
    let cloud = Ec2::connect(Pace::default()).await;
    Ok(turnpike_agent::run(settings, cloud, stop).await?)
}

fn log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if std::env::var("TURNPIKE_LOG").is_ok_and(|format| format == "json") {
        subscriber.json().init();
    } else {
        subscriber.init();
    }
}
