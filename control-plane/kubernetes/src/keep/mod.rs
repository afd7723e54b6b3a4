//! What the controller keeps in the API as it must be: made where it is missing, corrected where
//! somebody changed it, for as long as the controller runs.
//!
//! - [`roots`]: the mesh's root certificate in every namespace;
//! - [`injector`]: that certificate in the webhook's configuration, so that the API server trusts
//!   the injector.
//!
//! Each watches what it keeps, acts at most once a second, and says what it may not do.

mod injector;
mod roots;

pub use injector::InjectorBundle;
pub use roots::RootConfigMaps;

use std::time::Duration;

use kube::runtime::watcher;

use crate::Impairment;

/// Who is named as the manager of the fields we set.
const MANAGER: &str = "turnpike-controller";
/// Between two rounds, so that a fight with another writer costs little.
const PAUSE: Duration = Duration::from_secs(1);
/// After a failure; jittered.
const RETRY: Duration = Duration::from_secs(5);
/// As for the source's watches.
const WATCH_SECONDS: u32 = 30;

fn retry_pause() -> Duration {
    RETRY.mul_f64(0.5 + fastrand::f64())
}

fn watch_one(name: &str) -> watcher::Config {
    watcher::Config::default()
        .fields(&format!("metadata.name={name}"))
        .timeout(WATCH_SECONDS)
}

/// What the server said, in a line, and for refusals what to grant.
fn refused(what: &str, doing: &str, error: &kube::Error, grant: &str) -> Impairment {
    let message = match error {
        kube::Error::Api(status) if status.code == 403 => {
            format!("{doing} is forbidden: {}; grant {grant}", status.message)
        }
        kube::Error::Api(status) => format!("{doing} failed: {} {}", status.code, status.message),
        error => format!("{doing} failed: {error}; it is tried again"),
    };
    Impairment {
        what: what.to_owned(),
        message,
        blocking: false,
    }
}

/// The same of a watch.
fn unwatched(what: &str, error: &watcher::Error, grant: &str) -> Option<Impairment> {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => match error {
            kube::Error::Api(status) if status.code == 410 => None,
            error @ kube::Error::Api(_) => Some(refused(what, "watching it", error, grant)),
            // That the server is away is said by the source.
            _ => None,
        },
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => None,
    }
}
