//! The log, on standard error.

use tracing_subscriber::EnvFilter;

/// Begins it, once. What is logged is up to `RUST_LOG`, else `default_filter`; a line is JSON where
/// `TURNPIKE_LOG` is `json`, else text.
pub fn init(default_filter: &str) {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_filter));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if std::env::var("TURNPIKE_LOG").is_ok_and(|format| format == "json") {
        lines.json().init();
    } else {
        lines.init();
    }
}
