//! The CRDs, as `kubectl apply` takes them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceColumnDefinition, CustomResourceDefinition, CustomResourceDefinitionVersion,
};
use kube::CustomResourceExt;

use crate::{
    kinds::{
        AuthorizationPolicy, ClusterEgressPolicy, EgressPolicy, MeshConfig, PeerAuthentication,
        Telemetry, TrafficPolicy,
    },
    status,
};

/// One for each of our kinds, by name.
pub fn crds() -> Vec<CustomResourceDefinition> {
    [
        AuthorizationPolicy::crd(),
        ClusterEgressPolicy::crd(),
        EgressPolicy::crd(),
        MeshConfig::crd(),
        PeerAuthentication::crd(),
        Telemetry::crd(),
        TrafficPolicy::crd(),
    ]
    .map(|mut crd| {
        for version in &mut crd.spec.versions {
            version.additional_printer_columns = Some(columns());
            describe(version);
        }
        crd
    })
    .into()
}

/// `kubectl explain` begins with what the kind is for.
fn describe(version: &mut CustomResourceDefinitionVersion) {
    let schema = version
        .schema
        .as_mut()
        .and_then(|schema| schema.open_api_v3_schema.as_mut());
    if let Some(schema) = schema {
        let spec = schema
            .properties
            .as_ref()
            .and_then(|properties| properties.get("spec"));
        schema.description = spec.and_then(|spec| spec.description.clone());
    }
}

/// What `kubectl get` shows, the same for each kind.
fn columns() -> Vec<CustomResourceColumnDefinition> {
    let condition = |name: &str| format!(".status.conditions[?(@.type==\"{name}\")].status");
    [
        (status::ACCEPTED, "string", condition(status::ACCEPTED)),
        (status::PROGRAMMED, "string", condition(status::PROGRAMMED)),
        ("Proxies", "string", ".status.proxies".to_owned()),
        ("Age", "date", ".metadata.creationTimestamp".to_owned()),
    ]
    .map(|(name, type_, json_path)| CustomResourceColumnDefinition {
        name: name.to_owned(),
        type_: type_.to_owned(),
        json_path,
        ..CustomResourceColumnDefinition::default()
    })
    .into()
}
