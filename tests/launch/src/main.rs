//! `cargo demo`, `cargo verify` and `cargo bench-proxy`: sets the machine up, builds, hands over.
//!
//! 1. [`machine`] looks for what the command needs and installs it by the package manager where
//!    it may, else says exactly what to type;
//! 2. [`steps`] runs cargo and the built programs one after the other, each with its time;
//! 3. the demo itself is `turnpike demo`, the tests are cargo's own.
//!
//! This program has no dependencies, so that a clean clone shows something within seconds.

mod machine;
mod steps;

use std::process::ExitCode;

const USAGE: &str = "\
cargo demo [--keep] [--report FILE]   the whole of Turnpike on this machine, in namespaces of its own
cargo demo --kubernetes               the same on a real two-node Kubernetes, left running to look around
cargo demo down                       takes down what --keep, --kubernetes or a killed demo left
cargo verify                          formatting, lints, every test
cargo verify quick                    formatting, lints and the tests that need no namespaces
cargo verify tests [NAME]             only the tests (whose name contains NAME)
cargo verify kubernetes [NAME]        the tests on a real Kubernetes (whose name contains NAME)
cargo bench-proxy [--without-envoy] [ARGUMENT...]
                                      our proxy beside Envoy and nginx, as a table
";

/// What the code was written with: every warning of it fails the run. A later one may know lints that
/// nobody could meet.
const CLIPPY: &str = concat!("clippy 0.", env!("CARGO_PKG_RUST_VERSION"));

/// Without it, a comparison that lacks Envoy is no result.
const WITHOUT_ENVOY: &str = "--without-envoy";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.split_first() {
        Some((&"demo", rest)) => demo(rest),
        Some((&"verify", rest)) => verify(rest),
        Some((&"bench", rest)) => bench(rest),
        _ => Err(format!("what is there to do?\n\n{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("\n{message}");
            ExitCode::FAILURE
        }
    }
}

fn demo(rest: &[&str]) -> Result<(), String> {
    machine::require_root("cargo demo")?;
    let kubernetes = rest.contains(&"--kubernetes");
    machine::require(if kubernetes {
        machine::KUBERNETES
    } else {
        machine::DEMO
    })?;
    steps::cargo("build the programs", &["build", "--workspace", "--bins"])?;
    if kubernetes {
        steps::run("build Kubernetes", "turnpike-cluster", &["build"])?;
    }
    let mut arguments = vec!["demo"];
    arguments.extend(rest);
    steps::hand_over("turnpike", &arguments)
}

fn verify(rest: &[&str]) -> Result<(), String> {
    match rest {
        [] => {
            machine::require_root("cargo verify")?;
            machine::require(machine::VERIFY)?;
            checks()?;
            tests(&[])?;
        }
        ["quick"] => {
            checks()?;
            steps::cargo(
                "tests beside the code",
                &["test", "--workspace", "--lib", "--bins"],
            )?;
        }
        ["tests", filter @ ..] => {
            machine::require_root("cargo verify tests")?;
            machine::require(machine::VERIFY)?;
            tests(filter)?;
        }
        ["kubernetes", filter @ ..] => {
            machine::require_root("cargo verify kubernetes")?;
            machine::require(machine::KUBERNETES)?;
            kubernetes(filter)?;
        }
        other => {
            return Err(format!(
                "`cargo verify {}` is not known\n\n{USAGE}",
                other.join(" ")
            ));
        }
    }
    steps::summary();
    Ok(())
}

fn checks() -> Result<(), String> {
    steps::cargo("formatting", &["fmt", "--all", "--check"])?;
    let deny: &[&str] = if steps::says(&["clippy", "--version"]).starts_with(CLIPPY) {
        &["--", "--deny", "warnings"]
    } else {
        eprintln!("another clippy than {CLIPPY}: what it warns of fails nothing");
        &[]
    };
    let all = ["clippy", "--workspace", "--all-targets"];
    steps::cargo("lints", &[&all[..], deny].concat())?;
    // Not among all targets, because a plain `cargo test` leaves it out.
    let cluster = ["clippy", "--workspace", "--test", "kubernetes"];
    let name = "lints of the tests on Kubernetes";
    steps::cargo(name, &[&cluster[..], deny].concat())?;
    if machine::has("cargo-deny") {
        // Not its advisories: their database comes from outside, where not every machine may look.
        // `cargo deny check advisories` asks it.
        steps::cargo(
            "licences and sources",
            &[
                "deny",
                "--all-features",
                "check",
                "licenses",
                "bans",
                "sources",
            ],
        )?;
    } else {
        steps::skipped(
            "licences and sources",
            "`cargo install cargo-deny --locked` adds it",
        );
    }
    Ok(())
}

fn tests(filter: &[&str]) -> Result<(), String> {
    build_for_tests()?;
    let mut arguments = vec!["test", "--workspace"];
    if let [name, ..] = filter {
        arguments.push(name);
    }
    steps::cargo("tests", &arguments)
}

/// The whole-system tests start the programs as a user would, so these are built first: together with
/// the tests, since the programs alone have other features of their dependencies, and everything would
/// be compiled again. For the same reason each test is run as one of the whole workspace.
fn build_for_tests() -> Result<(), String> {
    let all = ["build", "--workspace", "--all-targets"];
    steps::cargo("build programs and tests", &all)
}

/// The cluster takes itself down, also when a test fails.
fn kubernetes(filter: &[&str]) -> Result<(), String> {
    build_for_tests()?;
    steps::run("build Kubernetes", "turnpike-cluster", &["build"])?;
    if !filter.is_empty() {
        return cluster_tests("tests on Kubernetes", "kubernetes", filter);
    }
    // With the helm that was just built.
    cluster_tests("the chart", "chart", &["--include-ignored"])?;
    cluster_tests("tests on Kubernetes", "kubernetes", &[])?;
    let controller = "the controller beside an API server";
    cluster_tests(controller, "api_server", &["--ignored"])
}

fn cluster_tests(name: &str, test: &str, arguments: &[&str]) -> Result<(), String> {
    let test = ["test", "--workspace", "--test", test, "--"];
    steps::cargo(name, &[&test[..], arguments].concat())
}

fn bench(rest: &[&str]) -> Result<(), String> {
    machine::require_root("cargo bench-proxy")?;
    machine::require(machine::BENCH)?;
    steps::cargo(
        "build our proxy for speed",
        &["build", "--release", "-p", "turnpike-sidecar"],
    )?;
    steps::cargo(
        "build the programs around it",
        &["build", "--workspace", "--bins"],
    )?;
    let (without, rest): (Vec<&str>, Vec<&str>) =
        rest.iter().partition(|word| **word == WITHOUT_ENVOY);
    let envoy = match &without[..] {
        [] => Some(machine::envoy().map_err(|why| {
            format!(
                "Envoy is not to be had: {why}\n\n`cargo bench-proxy {WITHOUT_ENVOY}` leaves it out"
            )
        })?),
        _ => None,
    };
    let mut arguments = rest;
    arguments.extend(envoy.iter().flat_map(|path| ["--envoy", path]));
    steps::hand_over("turnpike-bench", &arguments)
}
