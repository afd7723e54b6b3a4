//! Ethernet addresses: read, written, and made up for veth pairs.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A MAC address, written `02:00:00:00:01:05`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A unicast address from the locally administered range.
    pub fn random() -> Self {
        let mut bytes = fastrand::u64(..).to_be_bytes();
        bytes[0] = bytes[0] & 0xfc | 0x02;
        Self([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a MAC address: expected six hexadecimal bytes with `:` between")]
pub struct InvalidMac(String);

impl FromStr for Mac {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let invalid = || InvalidMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(invalid)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() {
            Err(invalid())
        } else {
            Ok(Self(bytes))
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, InvalidMac> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<&[u8]> for Mac {
    type Error = InvalidMac;

    fn try_from(bytes: &[u8]) -> Result<Self, InvalidMac> {
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| InvalidMac(hex::encode(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes_and_nothing_else() {
        let mac: Mac = "02:00:00:00:01:05".parse().unwrap();
        assert_eq!(mac, Mac([2, 0, 0, 0, 1, 5]));
        assert_eq!(mac.to_string(), "02:00:00:00:01:05");
        for wrong in [
            "",
            "02:00:00:00:01",
            "02:00:00:00:01:05:06",
            "2:0:0:0:1:5",
            "+2:00:00:00:01:0g",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn made_up_addresses_are_local_and_unicast() {
        for _ in 0..1000 {
            assert_eq!(Mac::random().0[0] & 0x03, 0x02);
        }
    }
}
