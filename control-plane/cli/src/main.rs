//! `turnpike`: the command that people type.
//!
//! `turnpike demo` shows all of Turnpike on the VPC in a box; `turnpike egress` reads the record of
//! what left; `turnpike inject` shows what the webhook would make of a pod.

mod demo;
mod egress;
mod inject;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "turnpike",
    version,
    about = "Roads and traffic lights for clusters on AWS"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the whole of Turnpike on this machine, on a VPC in network namespaces
    Demo(demo::Arguments),
    /// Read and verify the record of every connection that left
    Egress(egress::Arguments),
    /// Show a Pod as it is after injection
    Inject(inject::Arguments),
}

fn main() -> ExitCode {
    let Arguments { command } = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let done = match command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Egress(arguments) => egress::run(&arguments),
        Command::Inject(arguments) => inject::run(&arguments),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("turnpike: {error:#}");
            ExitCode::FAILURE
        }
    }
}
