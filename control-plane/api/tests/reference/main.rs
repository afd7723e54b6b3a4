//! The reference of our resources is what their types, and the validation of them, say.
//!
//! After a change of the types: `TURNPIKE_WRITE_CRDS=1 cargo test -p turnpike-api`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod judge;
mod table;

use std::{
    fs,
    path::{Path, PathBuf},
};

use judge::judge;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::Value;

const HEAD: &str = "\
<!-- Generated from the types of turnpike-api; see control-plane/api/tests/reference. -->
# Reference: turnpike.dev/v1alpha1

Every example here is read and accepted, and every refusal quoted, by the same code that reads the
controller's folder. A field that is not listed is refused, with its name and those that are
allowed.

In the tables, *required* fields must be given wherever the object that holds them is. A `[]` in a
path is any item of a list, `{}` any key of a map. A *duration* is up to four numbers with `h`, `m`,
`s` or `ms`, as in `1m30s`. A *LabelSelector* is Kubernetes' own, with `matchLabels` and
`matchExpressions`, and a *Condition* its `metav1.Condition`.
";

/// What a user may well type and is refused, by the field at fault: a JSON pointer and a value.
type Mistake = (&'static str, &'static str);

fn mistakes(kind: &str) -> &'static [Mistake] {
    match kind {
        "AuthorizationPolicy" => &[
            ("/spec/action", r#""AUDIT""#),
            ("/spec/rules/0/from/0/source", "{}"),
            (
                "/spec/rules/0/from/0/source/principals/0",
                r#""shop/client""#,
            ),
            ("/spec/rules/0/to/0/operation/paths/0", r#""/a/*/b""#),
        ],
        "EgressPolicy" => &[
            ("/spec/allow/0/hosts/0", r#""203.0.113.7""#),
            ("/spec/allow/0/hosts/0", r#""*""#),
            ("/spec/allow/0/ports/0/protocol", r#""TCP""#),
            ("/spec/allow/0/cidrs", r#"["203.0.113.0/24"]"#),
            ("/spec/allow/2/cidrs/0", r#""169.254.0.0/16""#),
            ("/spec/allow/2/ports/0/endPort", "80"),
            (
                "/spec/allow/1/http/paths/0",
                r#"{"exact": "/a", "prefix": "/b"}"#,
            ),
        ],
        "MeshConfig" => &[
            ("/metadata/name", r#""mesh""#),
            ("/spec/meshPrefixes/0", r#""10.0.0.1/16""#),
            ("/spec/telemetry/sampling", "10"),
        ],
        "PeerAuthentication" => &[
            ("/spec/mtls/mode", r#""DISABLE""#),
            ("/spec/portLevelMtls", r#"{"http": {"mode": "STRICT"}}"#),
            ("/spec/selector", "{}"),
        ],
        "Telemetry" => &[("/spec/sampling", "10")],
        "TrafficPolicy" => &[
            ("/spec/targetRefs/0/kind", r#""Deployment""#),
            ("/spec/retry/attempts", "11"),
            ("/spec/retry/codes/0", "200"),
            ("/spec/retryConstraint/budget/interval", r#""1m""#),
            ("/spec/timeouts/connect", r#""0s""#),
            ("/spec/timeouts/backendRequest", r#""20s""#),
            ("/spec/circuitBreaker/maxRequests", "0"),
            ("/spec/outlierEjection/baseEjection", r#""10m""#),
        ],
        // It is refused whole.
        "ClusterEgressPolicy" => &[],
        other => panic!("name some mistakes that can be made in a {other}"),
    }
}

fn page() -> String {
    let crds = turnpike_api::crds();
    let mut page = HEAD.to_owned();
    page += "\n| Kind | Scope | Purpose |\n|---|---|---|\n";
    for crd in &crds {
        let kind = &crd.spec.names.kind;
        page += &format!(
            "| [{kind}](#{}) | {} | {} |\n",
            kind.to_lowercase(),
            crd.spec.scope.to_lowercase(),
            purpose(crd)
        );
    }
    for crd in &crds {
        page += &section(crd);
    }
    page += "\n## Status\n\nThe same for every kind. A folder of YAML has no room for it; \
             `/debug/status` of the controller says what holds there.\n\n";
    page + &table::rows("", "status", &schema(&crds[0])["properties"]["status"])
}

fn section(crd: &CustomResourceDefinition) -> String {
    let kind = &crd.spec.names.kind;
    let schema = schema(crd);
    let text = example(crd);
    let mut section = format!("\n## {kind}\n\n{}\n\n", purpose(crd));
    match &judge(&text)[..] {
        [] => {}
        [refusal] if kind == "ClusterEgressPolicy" => {
            section += &format!("**Not in force yet.** The controller answers:\n\n> {refusal}\n\n");
        }
        refusals => panic!("the example of {kind} is refused: {refusals:#?}"),
    }
    section += &table::rows(kind, "spec", &schema["properties"]["spec"]);
    let rules = table::rules(&schema);
    if !rules.is_empty() {
        section += "\nAlso checked by the API server:\n\n";
        section += &rules;
    }
    section += &format!("\n```yaml\n{text}```\n");
    let refused = refused(kind, &text);
    if !refused.is_empty() {
        section += &format!("\nRefused in it would be, for instance:\n\n{refused}");
    }
    section
}

fn refused(kind: &str, text: &str) -> String {
    let line = |(pointer, value): &Mistake| {
        let mut object: Value = serde_saphyr::from_str(text).unwrap();
        let value: Value = serde_json::from_str(value).unwrap();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        let parent = object.pointer_mut(parent).expect(pointer);
        match parent {
            Value::Array(items) => items[field.parse::<usize>().unwrap()] = value.clone(),
            other => other[field] = value.clone(),
        }
        let refusals = judge(&serde_json::to_string_pretty(&object).unwrap());
        assert!(
            !refusals.is_empty(),
            "{kind} {pointer}: {value} is accepted"
        );
        let refusals = refusals.iter().map(|text| format!("- {text}\n"));
        refusals.collect::<String>()
    };
    mistakes(kind).iter().map(line).collect()
}

fn purpose(crd: &CustomResourceDefinition) -> String {
    let text = schema(crd)["description"].as_str().unwrap().to_owned();
    text.replace('\n', " ")
}

fn schema(crd: &CustomResourceDefinition) -> Value {
    let schema = crd.spec.versions[0].schema.as_ref().unwrap();
    serde_json::to_value(schema.open_api_v3_schema.as_ref().unwrap()).unwrap()
}

fn example(crd: &CustomResourceDefinition) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/examples");
    let path = folder.join(format!("{}.yaml", crd.spec.names.plural));
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn nothing_is_explained_twice() {
    let schemas: Vec<_> = turnpike_api::crds()
        .iter()
        .map(|crd| (crd.spec.names.kind.clone(), schema(crd)))
        .collect();
    let needless = table::needless(&schemas);
    assert!(needless.is_empty(), "the types say it now: {needless:?}");
}

#[test]
fn the_reference_is_current() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../charts/turnpike/reference.md");
    let page = page();
    if std::env::var_os("TURNPIKE_WRITE_CRDS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let stored = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        stored == page,
        "{} is not what the types say; run `TURNPIKE_WRITE_CRDS=1 cargo test -p turnpike-api`",
        path.display()
    );
}
