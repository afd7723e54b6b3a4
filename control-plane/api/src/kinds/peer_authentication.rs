//! Whether plaintext from outside the mesh is let in.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::status::PolicyStatus;

/// The mTLS mode of the selected workloads. One with a selector goes before one without.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "turnpike.dev",
    version = "v1alpha1",
    kind = "PeerAuthentication",
    root = "PeerAuthentication",
    plural = "peerauthentications",
    namespaced,
    status = "PolicyStatus",
    category = "turnpike",
    derive = "PartialEq",
    derive = "Default"
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new(
    "!has(self.portLevelMtls) || size(self.portLevelMtls) == 0 || (has(self.selector) && (\
     (has(self.selector.matchLabels) && size(self.selector.matchLabels) > 0) || \
     (has(self.selector.matchExpressions) && size(self.selector.matchExpressions) > 0)))"
)
.message("portLevelMtls needs a selector"))]
pub struct PeerAuthenticationSpec {
    /// Left out: every pod of the namespace; in `turnpike-system`, of the whole mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtls: Option<Mtls>,
    /// By the pod's port, before `mtls`. Only with a selector that asks for something.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub port_level_mtls: BTreeMap<String, Mtls>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mtls {
    #[serde(default)]
    pub mode: MtlsMode,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum MtlsMode {
    /// Plaintext is accepted too.
    #[default]
    Permissive,
    /// Only mutual TLS from the mesh.
    Strict,
}
