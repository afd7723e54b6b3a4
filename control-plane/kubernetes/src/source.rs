//! What every source of objects has in common.

use std::fmt;

use turnpike_api::{Object, ObjectKey};

/// A stream of objects, without end but for a fault of its own. Whatever fails underneath is retried there, and reported as an
/// [`Event::Rejected`] or [`Event::Impaired`] if a person must act.
pub trait Source: Send {
    /// Waits for the next event. Cancelling the wait loses none. `None`: a part of it has died; what
    /// goes on without it would not see every change, so begin anew.
    fn next(&mut self) -> impl Future<Output = Option<Event>> + Send;

    /// Where a person wrote the object that is in force. `None`: not in a file.
    fn place(&self, _object: &ObjectKey) -> Option<Place> {
        None
    }
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
    /// Part of what there is cannot be read. What was read before stays in force.
    Impaired(Impairment),
    /// What was impaired before is as it should be.
    Restored(Impairment),
    /// All objects that existed when the source started have been delivered. Once; what changed
    /// while they were read may already have been delivered too.
    Synced,
}

/// Where an object says what it is about, for whoever must change that.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Place {
    pub file: String,
    /// From 1.
    pub line: usize,
    /// Such as `spec.targetRefs`. `None`: the line is the object's first.
    pub field: Option<&'static str>,
}

/// `shop.yaml:12: spec.targetRefs`.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, field } = self;
        write!(f, "{file}:{line}")?;
        field.map_or(Ok(()), |field| write!(f, ": {field}"))
    }
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

/// Why a part of the source cannot be read, for whoever runs it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Impairment {
    /// `egresspolicies.turnpike.dev`, `https://10.96.0.1`.
    pub what: String,
    /// What is wrong and what to do.
    pub message: String,
    /// The source is not synced before it is over.
    pub blocking: bool,
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

/// `egresspolicies.turnpike.dev: …`.
impl fmt::Display for Impairment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.message)
    }
}
