//! What may leave: EgressPolicy and its verdicts.
//!
//! The gate asks in three places, each with what it knows by then: when a pod asks for a name,
//! when it opens a connection (destination, name claimed in SNI or Host, names this pod asked for
//! that led to the address) and, for plaintext HTTP, at each request.

mod judge;
mod reason;

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::host::{HostName, HostPattern};

pub use reason::Reason;

/// One policy that selects a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct EgressPolicy {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// Changes whenever the policy does; goes into every record.
    pub version: Arc<str>,
    pub mode: Mode,
    pub rules: Vec<EgressRule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Mode {
    #[default]
    Enforce,
    /// Allow, and record what would have been denied, where no other policy of the pod enforces.
    Audit,
}

/// One entry of `allow`.
#[derive(Clone, Debug, PartialEq)]
pub struct EgressRule {
    /// `allow[0]`: where in the policy it stands.
    pub id: Arc<str>,
    pub hosts: Vec<HostPattern>,
    pub cidrs: Vec<IpNet>,
    /// Never empty.
    pub ports: Vec<EgressPort>,
    /// Only for plaintext HTTP or originated TLS.
    pub http: Option<HttpRules>,
    /// The pod speaks HTTP, the gate TLS with the certificate verified.
    pub originate_tls: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EgressPort {
    pub port: u16,
    /// Last port of a range, `port` itself for a single one.
    pub end_port: u16,
    pub protocol: EgressProtocol,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EgressProtocol {
    /// TLS whose SNI is an allowed host.
    Tls,
    /// Plaintext HTTP whose every request is for an allowed host.
    Http,
    /// Opaque; with `cidrs` only, since nothing in it names a host.
    Tcp,
    /// With `cidrs` only.
    Udp,
}

#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HttpRules {
    /// Upper case. Empty: any.
    pub methods: Vec<Arc<str>>,
    /// Empty: any.
    pub paths: Vec<crate::route::PathMatch>,
}

/// A connection that a pod opens, with what the gate knows of it by itself.
#[derive(Clone, Copy, Debug)]
pub struct Connect<'a> {
    /// Where the pod wants to go: the destination after translation.
    pub address: IpAddr,
    pub port: u16,
    pub transport: Transport<'a>,
    /// Names that this pod asked for and that led to the address, from the DNS ledger; unexpired.
    pub bound: &'a [HostName],
}

/// What the first bytes of the connection say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport<'a> {
    Tls {
        sni: Option<&'a HostName>,
    },
    /// Plaintext HTTP; `None` where the host is missing or an address.
    Http {
        host: Option<&'a HostName>,
    },
    /// Anything else over TCP.
    Tcp,
    Udp,
}

/// One request of a plaintext HTTP connection.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub method: &'a str,
    /// In the normal form of [`crate::path`].
    pub path: &'a str,
}

/// What was decided, by which policy, and why; goes into the record as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub allowed: bool,
    /// Allowed only because all policies are in Audit mode; `reason` says what is missing.
    pub would_deny: bool,
    /// The policy that allows; where none does, the one that came closest.
    pub policy: Option<Arc<str>>,
    pub version: Option<Arc<str>>,
    /// The entry of the policy that allows, or that came closest.
    pub rule: Option<Arc<str>>,
    pub reason: Reason,
    /// How sure it is that the connection goes where its name says, if it goes on as allowed.
    pub grade: Grade,
    /// The gate speaks TLS to the destination for the pod, and verifies its certificate.
    pub originate_tls: bool,
}

/// How much is known of the other end. A later one includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Grade {
    /// An allowed address, no name.
    #[default]
    L3,
    /// An address that this pod got for an allowed name.
    DnsBound,
    /// And the client names the same host (SNI or Host).
    SniDns,
    /// And the server proved the name with a certificate.
    CertificateVerified,
    /// And each request was judged.
    HttpVerified,
}

impl Grade {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::L3 => "L3",
            Self::DnsBound => "DNS-bound",
            Self::SniDns => "SNI+DNS",
            Self::CertificateVerified => "certificate-verified",
            Self::HttpVerified => "HTTP-verified",
        }
    }
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl EgressProtocol {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tls => "TLS",
            Self::Http => "HTTP",
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }
}

impl fmt::Display for EgressProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for EgressPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            port,
            end_port,
            protocol,
        } = self;
        if port == end_port {
            write!(f, "{port}/{protocol}")
        } else {
            write!(f, "{port}-{end_port}/{protocol}")
        }
    }
}

#[cfg(test)]
mod tests;
