//! `turnpike-vpc`: runs a VPC in a box, and takes it down.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand};
use turnpike_daemon::{log, signals};
use turnpike_vpc::{
    run::{self, Options},
    spec::{DEFAULT, Spec},
};

#[derive(Debug, Parser)]
#[command(
    name = "turnpike-vpc",
    version,
    about = "A VPC in a box: needs root, nft and nothing else"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a box until SIGTERM or SIGINT, then remove all of it.
    Run {
        /// Its namespaces begin with this.
        #[arg(long, env = "TURNPIKE_NAME")]
        name: String,
        /// What it is made of, JSON or YAML; the built-in box if absent.
        #[arg(long, env = "TURNPIKE_SPEC")]
        spec: Option<PathBuf>,
        /// Where its files are kept.
        #[arg(long, env = "TURNPIKE_STATE")]
        state: PathBuf,
    },
    /// Remove a box in whatever state it is.
    Down {
        #[arg(long, env = "TURNPIKE_NAME")]
        name: String,
    },
    /// Print the built-in spec.
    Spec,
}

fn main() -> anyhow::Result<()> {
    log::init("info");
    let Cli { command } = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    match command {
        Command::Spec => print!("{DEFAULT}"),
        Command::Down { name } => {
            if !runtime.block_on(run::down(name.clone()))? {
                eprintln!("there is no box `{name}`");
            }
        }
        Command::Run { name, spec, state } => {
            anyhow::ensure!(
                nix::unistd::geteuid().is_root(),
                "network namespaces need root: run it with sudo"
            );
            let text = match &spec {
                None => DEFAULT.into(),
                Some(path) => std::fs::read_to_string(path)
                    .with_context(|| format!("reading {}", path.display()))?,
            };
            let from = spec.map_or_else(|| "the built-in spec".into(), |p| p.display().to_string());
            let spec = Spec::parse(&text).with_context(|| format!("in {from}"))?;
            let state = std::path::absolute(state).context("finding the state directory")?;
            runtime.block_on(async {
                let stop = signals::told_to_end()?;
                anyhow::Ok(run::run(Options { name, spec, state }, stop).await?)
            })?;
        }
    }
    Ok(())
}
