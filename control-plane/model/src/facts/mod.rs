//! What the model keeps of each object: typed, checked, and without what it has no use for, so that
//! an object whose other parts change is seen to be the same.

pub(crate) mod mesh;
pub(crate) mod pod;
pub(crate) mod policy;
pub(crate) mod route;
pub(crate) mod service;
pub(crate) mod slice;

/// Why an object cannot be part of the mesh. It is then treated as absent and reported in the
/// statuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}

impl From<turnpike_api::valid::Invalid> for Refusal {
    fn from(invalid: turnpike_api::valid::Invalid) -> Self {
        Self::new("Invalid", invalid.to_string())
    }
}
