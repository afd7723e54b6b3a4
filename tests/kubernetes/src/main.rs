//! `turnpike-cluster`: builds Kubernetes, brings a cluster up in the box, takes it down; and is the
//! first process of the cluster's nodes.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};
use turnpike_cluster::{Cluster, Options, build, chart, images, node};

#[derive(Debug, Parser)]
#[command(
    name = "turnpike-cluster",
    version,
    about = "A real Kubernetes on the VPC in a box"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build Kubernetes and its company, once per machine
    Build,
    /// Make the container images
    Images,
    /// Bring a cluster up and leave it
    Up {
        #[arg(long, default_value = "tp-kube")]
        name: String,
        /// Install the chart too
        #[arg(long)]
        install: bool,
    },
    /// Take down what `up` or a killed run left
    Down {
        #[arg(long, default_value = "tp-kube")]
        name: String,
    },
    /// Be a node
    #[command(hide = true)]
    Node { machine: PathBuf },
    /// Be the first process of a node
    #[command(hide = true)]
    Init { machine: PathBuf },
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\n{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let progress = |what: &str| eprintln!("{what}");
    match Cli::parse().command {
        Command::Build => build::build(&build::Cache::open()?),
        Command::Images => {
            for archive in images::make(&build::Cache::open()?, &progress)? {
                println!("{}", archive.display());
            }
            Ok(())
        }
        Command::Up { name, install } => {
            let cluster = Cluster::up(Options { name, keep: true }, &progress)?;
            if install {
                cluster.install(&chart::values(), &progress)?;
            }
            println!("{}", cluster.folder.join("bin/kubectl").display());
            Ok(())
        }
        Command::Down { name } => Cluster::clean(&name),
        Command::Node { machine } => node::init::outer(&machine),
        Command::Init { machine } => node::init::init(&machine),
    }
}
