//! The specification's errors.

use serde::Serialize;
use serde_json::{Value, json};

use crate::input::NEWEST;

/// An error code of the specification; those from 100 on are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Code(pub u32);

impl Code {
    pub const INCOMPATIBLE_VERSION: Self = Self(1);
    pub const UNSUPPORTED_FIELD: Self = Self(2);
    pub const UNKNOWN_CONTAINER: Self = Self(3);
    pub const INVALID_ENVIRONMENT: Self = Self(4);
    pub const IO: Self = Self(5);
    pub const DECODE: Self = Self(6);
    pub const INVALID_CONFIG: Self = Self(7);
    pub const TRY_AGAIN_LATER: Self = Self(11);
    /// STATUS: no ADD can be served.
    pub const NOT_AVAILABLE: Self = Self(50);
    /// STATUS: nor is the network of running containers whole.
    pub const LIMITED_CONNECTIVITY: Self = Self(51);
    /// The agent failed in a way that another attempt may not mend.
    pub const AGENT_FAILED: Self = Self(100);
    /// CHECK: the network is not the one that ADD answered with.
    pub const DIFFERS: Self = Self(101);
}

/// What standard output carries in place of a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CniError {
    pub code: Code,
    pub message: String,
    pub details: String,
    /// As the configuration has it, once that is known.
    pub cni_version: Option<String>,
}

impl CniError {
    pub fn new(code: Code, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: details.into(),
            cni_version: None,
        }
    }

    pub(crate) fn for_version(mut self, version: &str) -> Self {
        self.cni_version.get_or_insert_with(|| version.to_owned());
        self
    }

    pub fn to_json(&self) -> Value {
        let mut value = json!({
            "cniVersion": self.cni_version.as_deref().unwrap_or(NEWEST),
            "code": self.code,
            "msg": self.message,
        });
        if !self.details.is_empty() {
            value["details"] = self.details.clone().into();
        }
        value
    }
}
