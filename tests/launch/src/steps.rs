//! Steps run one after the other, each with its time; the first that fails ends the run.

use std::{
    env,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::Command,
    sync::Mutex,
    time::{Duration, Instant},
};

static DONE: Mutex<Vec<(String, Result<Duration, String>)>> = Mutex::new(Vec::new());

/// Runs cargo with its own progress display.
pub(crate) fn cargo(name: &str, arguments: &[&str]) -> Result<(), String> {
    eprintln!("\n── {name}: cargo {}", arguments.join(" "));
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let start = Instant::now();
    let status = Command::new(cargo)
        .args(arguments)
        // Set for this program by the cargo that runs it; they are not for the cargo it runs.
        .env_remove("CARGO_MANIFEST_DIR")
        .env_remove("CARGO_MANIFEST_PATH")
        .status()
        .map_err(|error| format!("cargo: {error}"))?;
    if !status.success() {
        return Err(format!(
            "{name} failed: `cargo {}` ended with {status}",
            arguments.join(" ")
        ));
    }
    note(name, Ok(start.elapsed()));
    Ok(())
}

/// What cargo answers, or nothing.
pub(crate) fn says(arguments: &[&str]) -> String {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo).args(arguments).output();
    output.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

pub(crate) fn skipped(name: &str, why: &str) {
    note(name, Err(why.to_owned()));
}

/// Runs one of the built programs to its end.
pub(crate) fn run(name: &str, program: &str, arguments: &[&str]) -> Result<(), String> {
    eprintln!("\n── {name}: {program} {}", arguments.join(" "));
    let start = Instant::now();
    let status = Command::new(built(program)?)
        .args(arguments)
        .status()
        .map_err(|error| format!("{program}: {error}"))?;
    if !status.success() {
        return Err(format!("{name} failed: `{program}` ended with {status}"));
    }
    note(name, Ok(start.elapsed()));
    Ok(())
}

/// Becomes one of the built programs.
pub(crate) fn hand_over(program: &str, arguments: &[&str]) -> Result<(), String> {
    let error = Command::new(built(program)?).args(arguments).exec();
    Err(format!("{program}: {error}"))
}

/// Where a built program is: beside this one.
fn built(program: &str) -> Result<PathBuf, String> {
    let here = env::current_exe().map_err(|error| format!("this program's place: {error}"))?;
    let folder: PathBuf = here.parent().map(Into::into).unwrap_or_default();
    Ok(folder.join(program))
}

pub(crate) fn summary() {
    let done = DONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    eprintln!();
    for (name, result) in done.iter() {
        match result {
            Ok(time) => eprintln!("  ✓ {name:<28} {:>6.1} s", time.as_secs_f64()),
            Err(why) => eprintln!("  – {name:<28} not run: {why}"),
        }
    }
}

fn note(name: &str, result: Result<Duration, String>) {
    DONE.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .push((name.to_owned(), result));
}
