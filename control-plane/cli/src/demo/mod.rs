//! The demo: brings a world up, tells the story step by step, and reports what held.

mod kubernetes;
mod page;
mod screen;

use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use turnpike_cluster::Cluster;
use turnpike_rig::{Evidence, Options, World, story::STEPS};

use self::screen::Screen;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    /// Leave everything running, and say how to look around
    #[arg(long)]
    keep: bool,
    /// On a real Kubernetes of two nodes, which is left running to look around
    #[arg(long, conflicts_with_all = ["steps", "report"])]
    kubernetes: bool,
    /// Where the report goes, as a page for a browser
    #[arg(long, default_value = "turnpike-demo.html")]
    report: PathBuf,
    /// Tell only these steps, such as `4` or `1,7`; each makes what it needs
    #[arg(long, value_delimiter = ',', value_parser = number_of_a_step)]
    steps: Vec<usize>,
    /// Prefix of the namespaces, so that several boxes can stand side by side
    #[arg(long, global = true, default_value = "tp-demo")]
    name: String,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Take down what --keep or a killed demo left
    Down,
}

/// Steps are numbered as in the report.
fn number_of_a_step(typed: &str) -> Result<usize, String> {
    let number = typed.trim().parse().ok();
    let valid = number.filter(|number| (1..=STEPS.len()).contains(number));
    valid.ok_or_else(|| format!("the steps are 1 to {}", STEPS.len()))
}

/// One step as it was told.
#[derive(Debug)]
struct Told {
    number: usize,
    title: &'static str,
    time: Duration,
    evidence: Evidence,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Arguments {
        action,
        keep,
        kubernetes,
        report,
        steps,
        name,
    } = arguments;
    if let Some(Action::Down) = action {
        // Of either kind: a cluster's leavings include those of a world.
        Cluster::clean(name)?;
        println!("the demo is down: no namespace, rule or process of it is left");
        return Ok(ExitCode::SUCCESS);
    }
    clean_on_interrupt(name.clone())?;
    if *kubernetes {
        return kubernetes::run(name);
    }
    let screen = Screen::new();
    let begun = Instant::now();
    let options = Options {
        name: name.clone(),
        keep: *keep,
        otlp: std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").ok(),
        proxy: None,
        agent_environment: Vec::new(),
    };
    let bar = screen.begin("Bringing the box up");
    let mut world = match World::up(options, &|what| bar.set_message(what.to_owned())) {
        Ok(world) => world,
        Err(error) => {
            screen.failed(&bar, "the box did not come up");
            return Err(error);
        }
    };
    screen.done(
        &bar,
        &format!("The box is up: {} nodes, control plane", world.nodes.len()),
        begun.elapsed(),
    );

    let wanted = (1..)
        .zip(STEPS)
        .filter(|(number, _)| steps.is_empty() || steps.contains(number));
    let told: Vec<Told> = wanted
        .map(|(number, step)| screen.tell(number, step.title, || (step.tell)(&mut world)))
        .collect();
    let held = told.iter().all(|step| step.evidence.held());
    let total = begun.elapsed();
    screen.summary(&told, total);
    fs::write(report, page::render(&told, total).into_string())
        .with_context(|| format!("writing {}", report.display()))?;
    println!("\nThe same as a page: {}", report.display());
    if *keep {
        screen::look_around(&world);
    } else {
        world.down()?;
    }
    Ok(if held {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Ctrl-C takes the box down before the program ends.
fn clean_on_interrupt(name: String) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::spawn(move || {
        if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            eprintln!("\ntaking the box down");
            if let Err(error) = Cluster::clean(&name) {
                eprintln!("{error:#}");
            }
            std::process::exit(130);
        }
    });
    Ok(())
}
