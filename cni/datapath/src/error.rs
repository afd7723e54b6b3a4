//! What can fail, by what a caller does about it.

use std::{fmt, io, path::PathBuf};

use crate::Mac;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The plan itself is wrong; trying again cannot help.
    #[error("refused before anything was touched: {what}")]
    Invalid { what: String },
    /// The pod's namespace is gone or never was.
    #[error("{} is no network namespace that can be entered: {source}", path.display())]
    Netns { path: PathBuf, source: io::Error },
    /// The host's end of the pair exists: another sandbox of the same pod has it.
    #[error(
        "interface {interface} exists{}: remove that attachment first",
        holder(container_id)
    )]
    Occupied {
        interface: String,
        container_id: Option<String>,
    },
    /// Not yet attached, or gone again.
    #[error("no interface has the address {mac}: the ENI is not attached")]
    NoSuchEni { mac: Mac },
    /// The pod is not known here: neither applied nor adopted.
    #[error("no pod network of container {container_id} is known")]
    Unknown { container_id: String },
    #[error("{step}: {source}")]
    Kernel { step: String, source: io::Error },
    #[error("nft refused {what}: {message}")]
    Nft { what: String, message: String },
    /// The datapath is being shut down.
    #[error("the datapath is shutting down")]
    Closed,
}

fn holder(container_id: &Option<String>) -> String {
    container_id
        .as_ref()
        .map(|id| format!(" for container {id}"))
        .unwrap_or_default()
}

impl Error {
    pub(crate) fn kernel(step: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let step = step.into();
        |source| Self::Kernel { step, source }
    }
}

/// A pod's network could not be built; what had been built is gone, except for what `undo` names.
#[derive(Debug, thiserror::Error)]
pub struct ApplyError {
    #[source]
    pub cause: Error,
    pub undo: Vec<Error>,
}

impl fmt::Display for ApplyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        self.undo
            .iter()
            .try_for_each(|error| write!(f, "; and left behind: {error}"))
    }
}

/// What stood in the way of a removal; all else of it is gone.
#[derive(Debug, thiserror::Error)]
pub struct RemoveError(pub Vec<Error>);

impl fmt::Display for RemoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&texts.join("; "))
    }
}
