//! What is reported back on a policy: whether it was accepted, and how many proxies have it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The policy is valid, and what it names exists.
pub const ACCEPTED: &str = "Accepted";
/// Every proxy that it concerns has acknowledged it.
pub const PROGRAMMED: &str = "Programmed";

/// The status of each of our kinds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyStatus {
    /// The generation of the object that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Accepted` and `Programmed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["type"]
    ))]
    pub conditions: Vec<Condition>,
    /// Proxies that acknowledged it, of those it concerns: `3/4`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxies: Option<String>,
}
