//! Being told to end.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

/// Returns at the first SIGTERM or SIGINT from now on, also one that comes before it is polled.
///
/// # Errors
/// The handlers cannot be installed.
pub fn told_to_end() -> io::Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
