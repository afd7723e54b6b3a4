//! The mesh as a whole.

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use super::{Mtls, TelemetrySpec};
use crate::status::PolicyStatus;

/// What holds for the whole mesh. There is one, named `default`.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "turnpike.dev",
    version = "v1alpha1",
    kind = "MeshConfig",
    root = "MeshConfig",
    plural = "meshconfigs",
    status = "PolicyStatus",
    category = "turnpike",
    derive = "PartialEq",
    derive = "Default",
    validation = Rule::new("self.metadata.name == 'default'")
        .message("there is one MeshConfig, named `default`")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshConfigSpec {
    /// Ranges in which pods and Services of the mesh have their addresses. Proxies never ask the
    /// control plane about addresses outside of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mesh_prefixes: Vec<String>,
    /// Ranges of Service addresses: for egress they belong to the cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub service_cidrs: Vec<String>,
    /// Further single addresses that belong to the cluster, such as the API server's and the
    /// control plane's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cluster_addresses: Vec<String>,
    /// For workloads that no PeerAuthentication selects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtls: Option<Mtls>,
    /// For workloads that no Telemetry selects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub telemetry: Option<MeshTelemetry>,
}

/// Defaults of traces and logs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshTelemetry {
    /// Share of new traces that are sampled, from 0 to 1. A caller's own decision is kept.
    /// MeshConfig's own default is `1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub sampling: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_log: Option<bool>,
}

impl From<MeshTelemetry> for TelemetrySpec {
    fn from(
        MeshTelemetry {
            sampling,
            access_log,
        }: MeshTelemetry,
    ) -> Self {
        Self {
            selector: None,
            sampling,
            access_log,
        }
    }
}
