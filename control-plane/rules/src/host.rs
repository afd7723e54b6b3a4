//! Host names in one normal form, and patterns over them.
//!
//! Normal: lower case ASCII, no trailing dot, no port; each label 1 to 63 bytes of letters,
//! digits, `-` and `_`; 253 bytes in all; not an IP literal in any notation.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
    sync::Arc,
};

/// A name in normal form.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(Arc<str>);

/// An exact name, or `*.` and a suffix: one label or more in its place, as in network-policy-api.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostPattern {
    Exact(HostName),
    /// The suffix without `*.`.
    Wildcard(HostName),
}

/// What a Host header or `:authority` names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostOrIp {
    Name(HostName),
    Ip(IpAddr),
}

/// Why a text is not a host name in any form we accept. The text itself is left out: it comes from
/// peers, and whoever reports it quotes and bounds it.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidHost {
    #[error("the name is empty")]
    Empty,
    #[error("the name is longer than 253 bytes")]
    TooLong,
    #[error("a label is empty or longer than 63 bytes")]
    Label,
    #[error("`{0}` may not stand in a host name; letters, digits, `-` and `_` may")]
    Character(char),
    #[error("a name outside ASCII must be written in its `xn--` form")]
    NotAscii,
    #[error("it is an IP address, or a number that some resolvers take for one; a name is needed")]
    Address,
    #[error("a user part before `@` is not accepted")]
    UserInfo,
    #[error("the port is not a number from 1 to 65535 without leading zeros")]
    Port,
    #[error(
        "`*` stands only for the first labels, as in `*.example.com`; `*` alone and `*.*` are not \
         accepted"
    )]
    Wildcard,
}

impl HostName {
    const MAX: usize = 253;

    /// Brings a name into normal form: from an SNI, a DNS question, a host without port, or typed
    /// configuration. One trailing dot is dropped. A name that ends in a number is refused, since
    /// resolvers take `2130706433`, `0x7f.1` and `127.1` for addresses (WHATWG URL, "ends in a
    /// number").
    pub fn parse(text: &str) -> Result<Self, InvalidHost> {
        let name = text.strip_suffix('.').unwrap_or(text);
        check_name(name)?;
        if name.bytes().any(|b| b.is_ascii_uppercase()) {
            Ok(Self(name.to_ascii_lowercase().into()))
        } else {
            Ok(Self(name.into()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is `suffix` with one label or more before it.
    pub fn is_below(&self, suffix: &Self) -> bool {
        self.0
            .strip_suffix(&*suffix.0)
            .is_some_and(|rest| rest.ends_with('.'))
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for HostName {
    type Err = InvalidHost;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl AsRef<str> for HostName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl HostPattern {
    pub fn parse(text: &str) -> Result<Self, InvalidHost> {
        match text.strip_prefix("*.") {
            Some(suffix) if suffix.contains('*') => Err(InvalidHost::Wildcard),
            Some(suffix) => HostName::parse(suffix).map(Self::Wildcard),
            None if text.contains('*') => Err(InvalidHost::Wildcard),
            None => HostName::parse(text).map(Self::Exact),
        }
    }

    pub fn matches(&self, name: &HostName) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Wildcard(suffix) => name.is_below(suffix),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => name.fmt(f),
            Self::Wildcard(suffix) => write!(f, "*.{suffix}"),
        }
    }
}

impl FromStr for HostPattern {
    type Err = InvalidHost;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl HostOrIp {
    pub fn name(&self) -> Option<&HostName> {
        match self {
            Self::Name(name) => Some(name),
            Self::Ip(_) => None,
        }
    }
}

impl fmt::Display for HostOrIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Ip(IpAddr::V4(address)) => address.fmt(f),
            Self::Ip(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// Splits a Host header or `:authority` into host and port.
///
/// Addresses are accepted in their usual notation alone (dotted decimal, bracketed IPv6 without a
/// zone); any other number is refused, as is a user part.
pub fn authority(text: &str) -> Result<(HostOrIp, Option<u16>), InvalidHost> {
    if text.contains('@') {
        return Err(InvalidHost::UserInfo);
    }
    if let Some(rest) = text.strip_prefix('[') {
        let (inside, after) = rest.split_once(']').ok_or(InvalidHost::Character('['))?;
        let address = inside
            .parse::<Ipv6Addr>()
            .map_err(|_| InvalidHost::Address)?;
        let port = match after.strip_prefix(':') {
            Some(port) => Some(parse_port(port)?),
            None if after.is_empty() => None,
            None => return Err(InvalidHost::Character(']')),
        };
        return Ok((HostOrIp::Ip(address.into()), port));
    }
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(parse_port(port)?)),
        None => (text, None),
    };
    match host.parse::<Ipv4Addr>() {
        Ok(address) => Ok((HostOrIp::Ip(address.into()), port)),
        Err(_) => Ok((HostOrIp::Name(HostName::parse(host)?), port)),
    }
}

fn parse_port(text: &str) -> Result<u16, InvalidHost> {
    if text.starts_with('0') || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(InvalidHost::Port);
    }
    text.parse().map_err(|_| InvalidHost::Port)
}

fn check_name(name: &str) -> Result<(), InvalidHost> {
    if name.is_empty() {
        return Err(InvalidHost::Empty);
    }
    if name.len() > HostName::MAX {
        return Err(InvalidHost::TooLong);
    }
    for c in name.chars() {
        match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' | '.' => {}
            '@' => return Err(InvalidHost::UserInfo),
            ':' | '[' | ']' => return Err(InvalidHost::Address),
            c if c.is_ascii() => return Err(InvalidHost::Character(c)),
            _ => return Err(InvalidHost::NotAscii),
        }
    }
    let mut last = "";
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 {
            return Err(InvalidHost::Label);
        }
        last = label;
    }
    if is_number(last) {
        Err(InvalidHost::Address)
    } else {
        Ok(())
    }
}

/// Decimal, octal or hexadecimal, as `inet_aton` reads them.
fn is_number(label: &str) -> bool {
    match label
        .strip_prefix("0x")
        .or_else(|| label.strip_prefix("0X"))
    {
        Some(hex) => hex.bytes().all(|b| b.is_ascii_hexdigit()),
        None => label.bytes().all(|b| b.is_ascii_digit()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_have_one_form() {
        for text in ["api.Stripe.com", "API.STRIPE.COM.", "api.stripe.com"] {
            assert_eq!(HostName::parse(text).unwrap().as_str(), "api.stripe.com");
        }
        for text in [
            "localhost",
            "_dmarc.example.com",
            "xn--bcher-kva.example",
            "3com.com",
            "a.1b",
        ] {
            assert!(HostName::parse(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused_with_its_reason() {
        let long_label = "a".repeat(64);
        let long_name = "a.".repeat(127);
        for (text, why) in [
            ("", InvalidHost::Empty),
            (".", InvalidHost::Empty),
            ("a..b", InvalidHost::Label),
            (".a", InvalidHost::Label),
            ("a..", InvalidHost::Label),
            (long_label.as_str(), InvalidHost::Label),
            (&format!("{long_name}ab"), InvalidHost::TooLong),
            ("a b", InvalidHost::Character(' ')),
            ("a\0b.com", InvalidHost::Character('\0')),
            ("a/b", InvalidHost::Character('/')),
            ("bücher.example", InvalidHost::NotAscii),
            ("user@host", InvalidHost::UserInfo),
            ("host:80", InvalidHost::Address),
            ("127.0.0.1", InvalidHost::Address),
            ("127.1", InvalidHost::Address),
            ("2130706433", InvalidHost::Address),
            ("0x7f000001", InvalidHost::Address),
            ("0x7f.0.0.0x1", InvalidHost::Address),
            ("0X", InvalidHost::Address),
            ("017700000001", InvalidHost::Address),
            ("foo.0x1.", InvalidHost::Address),
            ("[::1]", InvalidHost::Address),
            ("::1", InvalidHost::Address),
            ("*.example.com", InvalidHost::Character('*')),
        ] {
            assert_eq!(HostName::parse(text), Err(why), "{text:?}");
        }
    }

    #[test]
    fn wildcards_stand_for_one_label_or_more() {
        let pattern = HostPattern::parse("*.S3.amazonaws.com").unwrap();
        for (name, hit) in [
            ("b.s3.amazonaws.com", true),
            ("a.b.s3.amazonaws.com", true),
            ("s3.amazonaws.com", false),
            ("xs3.amazonaws.com", false),
            ("s3.amazonaws.com.evil.example", false),
        ] {
            assert_eq!(
                pattern.matches(&HostName::parse(name).unwrap()),
                hit,
                "{name}"
            );
        }
        assert_eq!(pattern.to_string(), "*.s3.amazonaws.com");
        for text in ["*", "*.*", "a.*.b", "*a.b", "*.*.b", "a*"] {
            assert_eq!(
                HostPattern::parse(text),
                Err(InvalidHost::Wildcard),
                "{text}"
            );
        }
        assert_eq!(HostPattern::parse("*."), Err(InvalidHost::Empty));
        assert_eq!(HostPattern::parse("*.1.2.3"), Err(InvalidHost::Address));
    }

    #[test]
    fn authorities_split_into_host_and_port() {
        let name = |text| HostOrIp::Name(HostName::parse(text).unwrap());
        let ip = |text: &str| HostOrIp::Ip(text.parse().unwrap());
        for (text, expected) in [
            ("Example.com", Ok((name("example.com"), None))),
            ("example.com.:8080", Ok((name("example.com"), Some(8080)))),
            ("10.0.0.1:80", Ok((ip("10.0.0.1"), Some(80)))),
            ("[2001:DB8::1]:443", Ok((ip("2001:db8::1"), Some(443)))),
            ("[::1]", Ok((ip("::1"), None))),
            ("example.com:", Err(InvalidHost::Port)),
            ("example.com:0", Err(InvalidHost::Port)),
            ("example.com:080", Err(InvalidHost::Port)),
            ("example.com:+80", Err(InvalidHost::Port)),
            ("example.com:65536", Err(InvalidHost::Port)),
            ("example.com:80:80", Err(InvalidHost::Port)),
            ("good@evil.example", Err(InvalidHost::UserInfo)),
            ("[fe80::1%eth0]", Err(InvalidHost::Address)),
            ("[::1", Err(InvalidHost::Character('['))),
            ("[::1]x", Err(InvalidHost::Character(']'))),
            ("010.0.0.1", Err(InvalidHost::Address)),
            ("0x0a000001:80", Err(InvalidHost::Address)),
            ("", Err(InvalidHost::Empty)),
            (":80", Err(InvalidHost::Empty)),
        ] {
            assert_eq!(authority(text), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn the_normal_form_is_its_own(text in "[A-Za-z0-9._-]{0,80}") {
            if let Ok(name) = HostName::parse(&text) {
                prop_assert_eq!(HostName::parse(name.as_str()).unwrap(), name.clone());
                prop_assert_eq!(HostName::parse(&format!("{}.", name)).unwrap(), name.clone());
                prop_assert!(name.as_str().parse::<IpAddr>().is_err());
            }
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = HostName::parse(&text);
            let _ = HostPattern::parse(&text);
            let _ = authority(&text);
        }

        #[test]
        fn an_authority_prints_to_itself(text in "\\PC{0,40}") {
            if let Ok((host, port)) = authority(&text) {
                let printed = match port {
                    Some(port) => format!("{host}:{port}"),
                    None => host.to_string(),
                };
                prop_assert_eq!(authority(&printed).unwrap(), (host, port));
            }
        }
    }
}
