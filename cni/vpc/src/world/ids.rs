//! Names that EC2 gives: an id is never reused, a MAC never shared.

use std::{fmt, str::FromStr};

use super::Refusal;

macro_rules! id {
    ($name:ident, $prefix:literal) => {
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            pub(super) fn random(rng: &mut fastrand::Rng) -> Self {
                Self(format!(concat!($prefix, "-{:017x}"), rng.u128(..) >> 60))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        /// Takes any text, so that what does not exist is refused as such.
        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }
    };
}

id!(InstanceId, "i");
id!(AttachmentId, "eni-attach");

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InterfaceId(String);

impl InterfaceId {
    pub(super) fn random(rng: &mut fastrand::Rng) -> Self {
        Self(format!("eni-{:017x}", rng.u128(..) >> 60))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InterfaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for InterfaceId {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let rest = text.strip_prefix("eni-").unwrap_or_default();
        let hex = matches!(rest.len(), 8 | 17) && rest.bytes().all(|b| b.is_ascii_hexdigit());
        if hex {
            Ok(Self(text.into()))
        } else {
            Err(Refusal::malformed_interface(text))
        }
    }
}

/// An interface's hardware address, in AWS's locally administered range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    pub(super) fn random(rng: &mut fastrand::Rng) -> Self {
        let [a, b, c, d, e, ..] = rng.u64(..).to_be_bytes();
        Self([0x02, a, b, c, d, e])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
