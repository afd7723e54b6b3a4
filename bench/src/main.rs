//! Our sidecar beside Envoy and nginx: the same pods, the same wire, in turns in one run.
//!
//! 1. [`stage`] brings up a box with a pod for each subject: captured the same way, calling the
//!    same nginx; where the subject is a peer, it stands in the sidecar's place;
//! 2. [`measure`] drives each in turn with wrk and reads the kernel's account of its CPU time;
//! 3. [`table`] prints medians over the rounds, and ratios. CPU per request comes first: it is
//!    steadier than throughput.

mod measure;
mod peers;
mod stage;
mod table;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

use crate::{measure::Load, stage::Stage, table::Results};

#[derive(Debug, Parser)]
#[command(about = "Our sidecar beside Envoy and nginx, in turns in one run")]
struct Arguments {
    /// Our proxy, built for speed
    #[arg(long, default_value = "target/release/turnpike-proxy")]
    proxy: PathBuf,
    /// Envoy's executable; without it Envoy is left out
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// Seconds of load in each turn
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Turns of each subject
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    rounds: u32,
}

/// Concurrent connections, as in the project's goals.
const CONNECTIONS: [u32; 3] = [2, 8, 64];

fn main() -> Result<()> {
    let Arguments {
        proxy,
        envoy,
        seconds,
        rounds,
    } = Arguments::parse();
    let mut stage = Stage::up(&proxy, envoy.as_deref())?;
    let mut results = Results::default();
    results.idle(&stage.subjects)?;
    for connections in CONNECTIONS {
        for round in 0..rounds {
            for subject in &stage.subjects {
                eprintln!(
                    "{} · {connections} connections · round {}",
                    subject.name(),
                    round + 1
                );
                let load = Load {
                    connections,
                    seconds,
                };
                let run = measure::run(&stage.world, subject, &load)?;
                results.add(subject, connections, run);
            }
        }
    }
    results.grown(&mut stage)?;
    println!("{}", results.render());
    stage.world.down()
}
