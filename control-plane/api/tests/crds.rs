//! The chart's CRDs are those of the types.
//!
//! After a change of the types: `TURNPIKE_WRITE_CRDS=1 cargo test -p turnpike-api --test crds`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, fs, path::PathBuf};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::Value;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../charts/turnpike/crds")
}

fn yaml(crd: &CustomResourceDefinition) -> String {
    // Through JSON, so that the order of fields is one for all.
    let value = serde_json::to_value(crd).unwrap();
    let text = serde_saphyr::to_string(&value).unwrap();
    format!(
        "# Generated from the types of turnpike-api; see control-plane/api/tests/crds.rs.\n{text}"
    )
}

#[test]
fn the_charts_crds_are_current() {
    let write = std::env::var_os("TURNPIKE_WRITE_CRDS").is_some();
    fs::create_dir_all(folder()).unwrap();
    let mut expected = BTreeSet::new();
    for crd in turnpike_api::crds() {
        let name = format!("{}.yaml", crd.spec.names.plural);
        let path = folder().join(&name);
        expected.insert(name);
        if write {
            fs::write(&path, yaml(&crd)).unwrap();
        }
        let stored = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            stored == yaml(&crd),
            "{} is not what the types say; run `TURNPIKE_WRITE_CRDS=1 cargo test -p turnpike-api \
             --test crds`",
            path.display()
        );
        let read: Value = serde_saphyr::from_str(&stored).unwrap();
        assert_eq!(
            read,
            serde_json::to_value(&crd).unwrap(),
            "{} reads back",
            path.display()
        );
    }
    let stored: BTreeSet<_> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(stored, expected, "no CRD of a kind that is gone");
}

#[test]
fn every_crd_has_what_the_api_server_asks_for() {
    for crd in turnpike_api::crds() {
        let name = &crd.spec.names.kind;
        assert_eq!(crd.spec.group, "turnpike.dev");
        assert_eq!(
            crd.spec.names.categories.as_deref(),
            Some(&["turnpike".to_owned()][..])
        );
        let version = &crd.spec.versions[0];
        assert_eq!(version.name, "v1alpha1");
        assert!(
            version.subresources.as_ref().unwrap().status.is_some(),
            "{name}"
        );
        let columns: Vec<_> = version
            .additional_printer_columns
            .iter()
            .flatten()
            .map(|c| &*c.name)
            .collect();
        assert_eq!(columns, ["Accepted", "Programmed", "Proxies", "Age"]);
        let schema = serde_json::to_value(version.schema.as_ref().unwrap()).unwrap();
        structural(&schema["openAPIV3Schema"], name);
    }
}

/// Every value has a type, and none of the keywords that structural schemas exclude.
fn structural(schema: &Value, at: &str) {
    let object = schema
        .as_object()
        .unwrap_or_else(|| panic!("{at}: no schema"));
    let typed = object.contains_key("type")
        || object.contains_key("x-kubernetes-preserve-unknown-fields")
        || object.contains_key("x-kubernetes-int-or-string");
    assert!(typed, "{at} has no type: {schema}");
    for keyword in [
        "$ref",
        "definitions",
        "additionalItems",
        "patternProperties",
        "const",
    ] {
        assert!(!object.contains_key(keyword), "{at} has {keyword}");
    }
    if object.contains_key("properties") {
        assert!(
            !object.contains_key("additionalProperties"),
            "{at} has both"
        );
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        structural(property, &format!("{at}.{name}"));
    }
    for inner in ["items", "additionalProperties"] {
        if let Some(inner_schema) = object.get(inner) {
            structural(inner_schema, &format!("{at}.{inner}"));
        }
    }
}
