//! `turnpike-node`: one on every node.

use clap::Parser;
use tokio_util::sync::CancellationToken;
use turnpike_agent::config::{Args, Settings};
use turnpike_cloud::{Ec2, Pace};
use turnpike_daemon::{log, signals};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    log::init("info");
    let settings = Settings::try_from(Args::parse())?;
    let stop = CancellationToken::new();
    let told_to_end = signals::told_to_end()?;
    let stopper = stop.clone();
    tokio::spawn(async move {
        told_to_end.await;
        tracing::info!("stopping; pods keep their network");
        stopper.cancel();
    });
    let cloud = Ec2::connect(Pace::default()).await;
    Ok(turnpike_agent::run(settings, cloud, stop).await?)
}
