//! `turnpike-controller`.

use clap::Parser;
use tokio_util::sync::CancellationToken;
use turnpike_daemon::{log, signals};
use turnpike_server::{Args, Controller};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    log::init("info,kube_runtime=error,kube_client=error");
    let stop = CancellationToken::new();
    let told_to_end = signals::told_to_end()?;
    let stopper = stop.clone();
    tokio::spawn(async move {
        told_to_end.await;
        stopper.cancel();
    });
    Controller::start(args).await?.run(stop).await
}
