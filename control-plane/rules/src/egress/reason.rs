//! Why: one reason for each verdict, with a text for whoever reads the record or the log.

use std::{fmt, net::IpAddr, sync::Arc};

use super::{EgressProtocol, Transport};
use crate::{address::Special, host::HostName};

/// Why an attempt was allowed or denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A rule allows it.
    Rule,
    /// No egress policy selects the pod.
    NotSelected,
    /// Never a destination, whatever a policy says.
    SpecialAddress {
        address: IpAddr,
        special: Special,
    },
    /// No rule has the name.
    NoRuleForHost {
        host: HostName,
    },
    /// Rules have the name, none for this port and protocol.
    PortNotAllowed {
        host: HostName,
        port: u16,
        protocol: EgressProtocol,
        allowed: Arc<str>,
    },
    /// The pod did not get this address for the name it claims.
    NotResolved {
        host: HostName,
        address: IpAddr,
        bound: Option<HostName>,
    },
    /// TLS without SNI: nothing names the host.
    NoSni {
        address: IpAddr,
        port: u16,
    },
    /// Plaintext HTTP without a host name.
    NoHost {
        address: IpAddr,
        port: u16,
    },
    /// Neither TLS nor HTTP, so that no name can be read, and no `cidrs` rule has the address.
    NoRuleForAddress {
        address: IpAddr,
        port: u16,
        protocol: EgressProtocol,
    },
    MethodNotAllowed {
        host: HostName,
        method: Arc<str>,
    },
    PathNotAllowed {
        host: HostName,
        path: Arc<str>,
    },
}

impl Reason {
    /// For metrics and records: one of a fixed few.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Rule => "rule",
            Self::NotSelected => "not-selected",
            Self::SpecialAddress { .. } => "special-address",
            Self::NoRuleForHost { .. } => "no-rule-for-host",
            Self::PortNotAllowed { .. } => "port-not-allowed",
            Self::NotResolved { .. } => "not-resolved",
            Self::NoSni { .. } => "no-sni",
            Self::NoHost { .. } => "no-host",
            Self::NoRuleForAddress { .. } => "no-rule-for-address",
            Self::MethodNotAllowed { .. } => "method-not-allowed",
            Self::PathNotAllowed { .. } => "path-not-allowed",
        }
    }
}

/// What is wrong, then what to do.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule => f.write_str("a rule allows it"),
            Self::NotSelected => f.write_str("no egress policy selects the pod"),
            Self::SpecialAddress { address, special } => write!(
                f,
                "{address} is {}, which no policy can open; if the pod asked for a name, its DNS \
                 answer is wrong or hostile",
                special.as_str()
            ),
            Self::NoRuleForHost { host } => write!(
                f,
                "no rule allows {host}; if the pod needs it, add it to `hosts` under \
                 `spec.allow` with the port and protocol"
            ),
            Self::PortNotAllowed {
                host,
                port,
                protocol,
                allowed,
            } => write!(
                f,
                "{host} is not allowed on {port}/{protocol}, only on {allowed}; use one of these, \
                 or add the port to the rule"
            ),
            Self::NotResolved {
                host,
                address,
                bound: None,
            } => write!(
                f,
                "the pod says it connects to {host}, but never got {address} from the cluster's \
                 DNS; let the client resolve the name itself, and not keep addresses beyond their \
                 TTL"
            ),
            Self::NotResolved {
                host,
                address,
                bound: Some(bound),
            } => write!(
                f,
                "the pod says it connects to {host}, but got {address} for {bound}; the name in \
                 SNI or Host must be the one that was resolved"
            ),
            Self::NoSni { address, port } => write!(
                f,
                "the TLS handshake with {address}:{port} names no host; send SNI, or allow the \
                 address under `cidrs` with protocol TCP"
            ),
            Self::NoHost { address, port } => write!(
                f,
                "the HTTP request to {address}:{port} names no host; send the name in Host, or \
                 allow the address under `cidrs` with protocol TCP"
            ),
            Self::NoRuleForAddress {
                address,
                port,
                protocol,
            } => write!(
                f,
                "no `cidrs` rule allows {address} on {port}/{protocol}, and nothing in the \
                 connection names a host; add the range to `cidrs`, or speak TLS to an allowed \
                 host"
            ),
            Self::MethodNotAllowed { host, method } => write!(
                f,
                "method {method} is not allowed for {host}; add it to the rule's `http.methods`"
            ),
            Self::PathNotAllowed { host, path } => write!(
                f,
                "path {path} is not allowed for {host}; add it to the rule's `http.paths`"
            ),
        }
    }
}

impl Transport<'_> {
    /// What a policy calls it.
    pub fn protocol(&self) -> EgressProtocol {
        match self {
            Self::Tls { .. } => EgressProtocol::Tls,
            Self::Http { .. } => EgressProtocol::Http,
            Self::Tcp => EgressProtocol::Tcp,
            Self::Udp => EgressProtocol::Udp,
        }
    }

    /// The name the client claims.
    pub fn claimed(&self) -> Option<&HostName> {
        match *self {
            Self::Tls { sni: name } | Self::Http { host: name } => name,
            Self::Tcp | Self::Udp => None,
        }
    }
}
