//! Traces and logs of some workloads.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::status::PolicyStatus;

/// How the selected workloads report; fields left out are as in MeshConfig.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "turnpike.dev",
    version = "v1alpha1",
    kind = "Telemetry",
    root = "Telemetry",
    plural = "telemetries",
    namespaced,
    status = "PolicyStatus",
    category = "turnpike",
    derive = "PartialEq",
    derive = "Default"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TelemetrySpec {
    /// Left out: every pod of the namespace; in `turnpike-system`, of the whole mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    /// Share of new traces that are sampled, from 0 to 1. A caller's own decision is kept.
    /// MeshConfig's own default is `1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub sampling: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_log: Option<bool>,
}
