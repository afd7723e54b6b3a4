//! Host names in one normal form, and patterns over them.
//!
//! Normal: lower case ASCII, no trailing dot, no port; each label 1 to 63 bytes of letters,
//! digits, `-` and `_`; 253 bytes in all; not an IP literal in any notation.

use std::{fmt, sync::Arc};

/// A name in normal form.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(Arc<str>);

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An exact name, or `*.` and a suffix: one label or more in its place, as in network-policy-api.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostPattern {
    Exact(HostName),
    /// The suffix without `*.`.
    Wildcard(HostName),
}
