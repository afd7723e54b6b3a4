//! The demo on a real Kubernetes: brings a cluster up, installs the chart as a user does, takes a
//! short tour, and leaves it running.

use std::{process::ExitCode, time::Instant};

use anyhow::Result;
use turnpike_cluster::{
    Cluster, Options, build, chart,
    tour::{self, STEPS},
};

use super::{Told, screen::Screen};

pub(super) fn run(name: &str) -> Result<ExitCode> {
    // It shows its own progress: minutes, when this machine does it for the first time.
    build::build(&build::Cache::open()?)?;
    let screen = Screen::new();
    let begun = Instant::now();
    let cluster = bring_up(&screen, name)?;
    let told: Vec<Told> = (1..)
        .zip(STEPS)
        .map(|(number, step)| screen.tell(number, step.title, || (step.tell)(&cluster)))
        .collect();
    let held = told.iter().all(|step| step.evidence.held());
    screen.summary(&told, begun.elapsed());
    look_around(&cluster);
    Ok(if held {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn bring_up(screen: &Screen, name: &str) -> Result<Cluster> {
    let begun = Instant::now();
    let bar = screen.begin("Bringing a Kubernetes up");
    let options = Options {
        name: name.to_owned(),
        keep: true,
    };
    let say = |what: &str| bar.set_message(what.to_owned());
    let installed = Cluster::up(options, &say).and_then(|cluster| {
        cluster.install(&values(), &say)?;
        Ok(cluster)
    });
    match installed {
        Ok(cluster) => {
            let text = "Kubernetes is up, and Turnpike installed by helm";
            screen.done(&bar, text, begun.elapsed());
            Ok(cluster)
        }
        Err(error) => {
            screen.failed(
                &bar,
                "Kubernetes did not come up; `cargo demo down` removes what there is of it",
            );
            Err(error)
        }
    }
}

/// Traces go to the user's collector, if there is one: ours would end with this program.
fn values() -> serde_json::Value {
    let mut values = chart::values();
    let collector = std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").unwrap_or_default();
    values["telemetry"]["otlpEndpoint"] = collector.into();
    values
}

fn look_around(cluster: &Cluster) {
    println!(
        "
The cluster is still up.

  kubeconfig   {}
  kubectl      {}

Its API server is reached from inside the box alone, which the wrappers see to. Look around, in a
shell of root:
",
        cluster.kubectl.kubeconfig().display(),
        cluster.folder.join("bin/kubectl").display(),
    );
    for (what, command) in tour::walk_through(cluster) {
        println!("# {what}\n{command}\n");
    }
    println!("Take it down: cargo demo down");
}
