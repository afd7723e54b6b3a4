//! What may leave the cluster.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::status::PolicyStatus;

/// The selected pods reach nothing outside the cluster but what is allowed here. What one of
/// several policies allows is allowed.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "turnpike.dev",
    version = "v1alpha1",
    kind = "EgressPolicy",
    root = "EgressPolicy",
    plural = "egresspolicies",
    namespaced,
    status = "PolicyStatus",
    category = "turnpike",
    derive = "PartialEq",
    derive = "Default"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressPolicySpec {
    /// Left out: every pod of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    /// `Enforce` denies what no policy of the pod allows. `Audit` lets TCP and names pass, and records
    /// what would have been denied, where every policy of the pod is `Audit`: one that enforces holds
    /// beside any number that observe. UDP, other protocols, special addresses and ports that are not
    /// listed under `inbound` are refused in both.
    #[serde(default)]
    pub mode: Mode,
    /// Empty: nothing may leave.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub allow: Vec<AllowRule>,
    /// Ports that callers from outside the cluster, such as a load balancer, may reach.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub inbound: Vec<InboundRule>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    #[default]
    Enforce,
    /// Allow, and record what would have been denied.
    Audit,
}

/// Hosts or addresses, and the ports on which they may be reached.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("has(self.hosts) != has(self.cidrs)")
        .message("a rule has either hosts or cidrs"),
    validation = Rule::new(
        "!has(self.hosts) || self.ports.all(p, p.protocol in ['TLS', 'HTTP'])"
    )
    .message("with hosts the protocol is TLS or HTTP: nothing in TCP or UDP names a host"),
    validation = Rule::new("!has(self.http) || self.ports.all(p, p.protocol == 'HTTP')")
        .message("http rules need protocol HTTP: what is inside TLS is not seen"),
    validation = Rule::new(
        "!has(self.tls) || (has(self.hosts) && self.ports.all(p, p.protocol == 'HTTP'))"
    )
    .message("tls.originate needs hosts and protocol HTTP: the pod speaks HTTP, the gate TLS")
)]
pub struct AllowRule {
    /// Exact names, or `*.` and a suffix: one label or more in its place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 255)))]
    pub hosts: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 64)))]
    pub cidrs: Vec<String>,
    #[schemars(length(min = 1, max = 32))]
    pub ports: Vec<AllowPort>,
    /// For plaintext HTTP, each request is held to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpRule>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsRule>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("!has(self.endPort) || self.endPort >= self.port")
    .message("endPort is the last port of a range, not below port"))]
pub struct AllowPort {
    #[schemars(range(min = 1))]
    pub port: u16,
    /// Last port of a range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_port: Option<u16>,
    pub protocol: Protocol,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TLS whose SNI is an allowed host.
    #[default]
    Tls,
    /// Plaintext HTTP whose every request is for an allowed host.
    Http,
    /// Anything over TCP, by address alone.
    Tcp,
    /// By address alone. Not in force: the node refuses UDP to outside the cluster.
    Udp,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpRule {
    /// Empty: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub methods: Vec<String>,
    /// Empty: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub paths: Vec<PathRule>,
}

/// Either a whole path or a prefix by whole elements: `/v1/` has `/v1` and `/v1/x`, not `/v10`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.exact) != has(self.prefix)")
    .message("a path is either exact or a prefix"))]
pub struct PathRule {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TlsRule {
    /// The pod speaks HTTP, the gate TLS to the host, whose certificate it verifies.
    pub originate: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InboundRule {
    #[schemars(length(min = 1, max = 32))]
    pub ports: Vec<InboundPort>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InboundPort {
    #[schemars(range(min = 1))]
    pub port: u16,
    #[serde(default)]
    pub protocol: InboundProtocol,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum InboundProtocol {
    #[default]
    Tcp,
    Udp,
}

/// The platform's own egress rules: the default for namespaces, and the ceiling that no
/// EgressPolicy in them exceeds.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "turnpike.dev",
    version = "v1alpha1",
    kind = "ClusterEgressPolicy",
    root = "ClusterEgressPolicy",
    plural = "clusteregresspolicies",
    status = "PolicyStatus",
    category = "turnpike",
    derive = "PartialEq",
    derive = "Default"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterEgressPolicySpec {
    /// Left out: every namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelector>,
    #[serde(default)]
    pub mode: Mode,
    /// For pods that no EgressPolicy selects. Empty: nothing may leave.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub default: Vec<AllowRule>,
    /// What an EgressPolicy may allow at most. Left out: no ceiling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub ceiling: Option<Vec<AllowRule>>,
}
