//! What may leave: EgressPolicy and its verdicts.
//!
//! The gate asks in three places, each with what it knows by then: when a pod asks for a name,
//! when it opens a connection (destination, name claimed in SNI or Host, names this pod asked for
//! that led to the address) and, for plaintext HTTP, at each request.

use std::sync::Arc;

use ipnet::IpNet;

use crate::host::HostPattern;

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
    /// Allow, and record what would have been denied.
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
