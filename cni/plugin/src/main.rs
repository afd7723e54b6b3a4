//! `turnpike-cni`: see the library.

use std::{
    io::{self, Read as _, Write as _},
    process::ExitCode,
    time::SystemTime,
};

use turnpike_plugin::{
    error::{CniError, Code},
    input::{Environment, INPUT_LIMIT},
};

fn main() -> ExitCode {
    match run() {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(result)) => print(&result, ExitCode::SUCCESS),
        Err(error) => print(&error.to_json(), ExitCode::FAILURE),
    }
}

fn run() -> Result<Option<serde_json::Value>, CniError> {
    let failed = |what: &str| {
        let message = what.to_owned();
        move |error: io::Error| CniError::new(Code::IO, message, error.to_string())
    };
    let mut stdin = Vec::new();
    io::stdin()
        .take(INPUT_LIMIT + 1)
        .read_to_end(&mut stdin)
        .map_err(failed("standard input cannot be read"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed("no runtime can be started"))?;
    runtime.block_on(turnpike_plugin::run(
        &Environment::read(),
        &stdin,
        SystemTime::now(),
    ))
}

/// A runtime that closed its end is not there to be told.
fn print(value: &serde_json::Value, code: ExitCode) -> ExitCode {
    match writeln!(io::stdout(), "{value}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}
