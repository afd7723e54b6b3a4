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
cargo bench-proxy [ARGUMENT...]       our proxy beside Envoy and nginx, as a table
";

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
    steps::cargo(
        "lints",
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "--deny",
            "warnings",
        ],
    )?;
    if machine::has("cargo-deny") {
        steps::cargo(
            "licences and advisories",
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
            "licences and advisories",
            "`cargo install cargo-deny --locked` adds it",
        );
    }
    Ok(())
}

/// The programs are built first, because the whole-system tests start them as a user would.
fn tests(filter: &[&str]) -> Result<(), String> {
    steps::cargo("build the programs", &["build", "--workspace", "--bins"])?;
    let mut arguments = vec!["test", "--workspace"];
    if let [name, ..] = filter {
        arguments.push(name);
    }
    steps::cargo("tests", &arguments)
}

/// The cluster takes itself down, also when a test fails.
fn kubernetes(filter: &[&str]) -> Result<(), String> {
    steps::cargo("build the programs", &["build", "--workspace", "--bins"])?;
    steps::run("build Kubernetes", "turnpike-cluster", &["build"])?;
    let mut arguments = vec!["test", "-p", "turnpike-cluster", "--test", "kubernetes"];
    if let [_, ..] = filter {
        arguments.push("--");
        arguments.extend(filter);
    }
    steps::cargo("tests on Kubernetes", &arguments)
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
    let envoy = machine::envoy();
    let mut arguments: Vec<&str> = rest.to_vec();
    match &envoy {
        Ok(path) => arguments.extend(["--envoy", path]),
        Err(why) => eprintln!("Envoy is left out: {why}"),
    }
    steps::hand_over("turnpike-bench", &arguments)
}
