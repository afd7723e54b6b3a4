//! What every source of objects has in common.

use std::fmt;

use turnpike_api::{Object, ObjectKey};

/// A stream of objects without end. Whatever fails underneath is retried there, and reported as an
/// [`Event::Rejected`] if a person must act.
pub trait Source: Send {
    /// Waits for the next event. Cancelling the wait loses none.
    fn next(&mut self) -> impl Future<Output = Event> + Send;
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A new object, or a new version of one. It is valid by itself ([`turnpike_api::valid`]).
    Applied(Object),
    Deleted(ObjectKey),
    /// Something was refused. What was in force of the same object before stays in force.
    Rejected(Rejection),
    /// What was rejected before is mended or gone.
    Resolved(Rejection),
    /// All objects that existed when the source started have been delivered. Once, and before any
    /// later change.
    Synced,
}

/// Why a document has no effect, for whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rejection {
    /// The file, or the API's path of the object.
    pub file: String,
    /// From 1.
    pub line: Option<usize>,
    /// `None`: unreadable before that was known.
    pub object: Option<ObjectKey>,
    /// `spec.allow[0].hosts[1]`.
    pub field: Option<String>,
    /// What is wrong, what is allowed, and what stays in force.
    pub message: String,
}

/// `shop.yaml:12: EgressPolicy shop/payments: spec.allow[0].prots: unknown field …`.
impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            file,
            line,
            object,
            field,
            message,
        } = self;
        f.write_str(file)?;
        if let Some(line) = line {
            write!(f, ":{line}")?;
        }
        if let Some(object) = object {
            write!(f, ": {object}")?;
        }
        if let Some(field) = field {
            write!(f, ": {field}")?;
        }
        write!(f, ": {message}")
    }
}
