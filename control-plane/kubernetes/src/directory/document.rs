//! A document becomes an object, or a list of what is wrong with it.

use serde_json::Value;
use turnpike_api::{Kind, Object, ObjectKey};

use super::yaml::{self, Broken, Yaml};
use crate::{
    path::{self, Step},
    reading::{self, Origin},
};

/// What a file holds, document by document; empty ones are left out.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Document {
    Good {
        object: Object,
        line: usize,
        /// Where it says what it is about: a field of [`ATTACHMENTS`] and its line.
        attachment: Option<(&'static str, usize)>,
    },
    /// Never without a fault.
    Bad {
        key: Option<ObjectKey>,
        faults: Vec<Fault>,
    },
}

/// By which policies and routes say what they are about. A Service's selector is none of them.
const ATTACHMENTS: [(&str, &str); 3] = [
    ("spec.targetRefs", "turnpike.dev/"),
    ("spec.selector", "turnpike.dev/"),
    ("spec.parentRefs", "gateway.networking.k8s.io/"),
];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) line: usize,
    pub(super) field: Option<String>,
    pub(super) problem: String,
}

pub(super) fn read_all(content: &Result<String, String>) -> Vec<Document> {
    let bad = |Broken { line, problem }| Document::Bad {
        key: None,
        faults: vec![Fault {
            line,
            field: None,
            problem,
        }],
    };
    match content {
        Err(problem) => vec![bad(Broken {
            line: 1,
            problem: problem.clone(),
        })],
        Ok(text) => yaml::split(text)
            .into_iter()
            .flat_map(|(offset, part)| match Yaml::parse(offset, part) {
                Ok(documents) => documents.iter().map(read).collect(),
                Err(broken) => vec![bad(broken)],
            })
            .collect(),
    }
}

fn read(document: &Yaml<'_>) -> Document {
    let fault = |path: &[Step], problem: String| Fault {
        line: document.line(path),
        field: Some(path::field(path)).filter(|field| !field.is_empty()),
        problem,
    };
    let value = match document.json() {
        Ok(value) => value,
        Err(Broken { line, problem }) => {
            return Document::Bad {
                key: None,
                faults: vec![Fault {
                    line,
                    field: None,
                    problem,
                }],
            };
        }
    };
    let kind = match kind(&value) {
        Ok(kind) => kind,
        Err((field, problem)) => {
            return Document::Bad {
                key: None,
                faults: vec![fault(&path::steps(field), problem)],
            };
        }
    };
    let key = key(kind, &value);
    match reading::read(kind, &value, Origin::Person) {
        Ok(object) => Document::Good {
            object,
            line: document.line(&[]),
            attachment: attachment(document, kind, &value),
        },
        Err(problems) => {
            let faults = problems
                .into_iter()
                .map(|reading::Problem { path, text }| fault(&path, text));
            Document::Bad {
                key,
                faults: faults.collect(),
            }
        }
    }
}

fn attachment(document: &Yaml<'_>, kind: Kind, value: &Value) -> Option<(&'static str, usize)> {
    let version = kind.api_version();
    let (field, _) = ATTACHMENTS.iter().find(|(field, group)| {
        let pointer = format!("/{}", field.replace('.', "/"));
        version.starts_with(*group) && value.pointer(&pointer).is_some()
    })?;
    Some((*field, document.line(&path::steps(field))))
}

fn kind(value: &Value) -> Result<Kind, (&'static str, String)> {
    let text = |field: &str| value.get(field).and_then(Value::as_str);
    if !value.is_object() {
        let problem = "this is no object; it needs apiVersion, kind and metadata".to_owned();
        return Err(("", problem));
    }
    let name = text("kind").ok_or_else(|| ("kind", format!("`kind` is missing; {}", known())))?;
    let Some(version) = text("apiVersion") else {
        return Err(("apiVersion", "`apiVersion` is missing".to_owned()));
    };
    Kind::parse(version, name).ok_or_else(|| {
        match Kind::ALL.iter().find(|kind| kind.as_str() == name) {
            Some(kind) => {
                let allowed = kind.api_version();
                (
                    "apiVersion",
                    format!("`{version}` is not known for {name}; allowed is {allowed}"),
                )
            }
            None if name == "List" => (
                "kind",
                "a List is not read; write its items as documents".to_owned(),
            ),
            None => (
                "kind",
                format!("`{name}` is not a kind that is read; {}", known()),
            ),
        }
    })
}

fn known() -> String {
    let kinds: Vec<_> = Kind::ALL.iter().map(ToString::to_string).collect();
    format!("allowed are {}", kinds.join(", "))
}

/// Of a document that may be bad otherwise.
fn key(kind: Kind, value: &Value) -> Option<ObjectKey> {
    let metadata = value.get("metadata")?;
    let text = |field: &str| metadata.get(field).and_then(Value::as_str);
    let name = text("name").filter(|name| !name.is_empty())?;
    let namespace = match kind.namespaced() {
        true => text("namespace")
            .filter(|namespace| !namespace.is_empty())
            .unwrap_or("default"),
        false => "",
    };
    Some(ObjectKey::new(kind, namespace, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(text: &str) -> Vec<String> {
        read_all(&Ok(text.to_owned()))
            .iter()
            .flat_map(|document| match document {
                Document::Good { .. } => Vec::new(),
                Document::Bad { faults, .. } => faults.clone(),
            })
            .map(
                |Fault {
                     line,
                     field,
                     problem,
                 }| { format!("{line} {}: {problem}", field.unwrap_or_default()) },
            )
            .collect()
    }

    #[track_caller]
    fn assert_fault(text: &str, expected: &str) {
        let faults = faults(text);
        assert_eq!(faults.len(), 1, "{faults:#?}");
        assert!(
            faults[0].starts_with(expected),
            "{}\nis not\n{expected}",
            faults[0]
        );
    }

    const EGRESS: &str = "apiVersion: turnpike.dev/v1alpha1
kind: EgressPolicy
metadata: {name: payments, namespace: shop}
spec:
";

    #[test]
    fn good_documents_become_objects() {
        let text = format!(
            "# a comment\n---\n{EGRESS}  allow:\n  - hosts: [a.example]\n    ports: [{{port: 443, \
             protocol: TLS}}]\n---\n\n---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: \
             shop}}\n"
        );
        let documents = read_all(&Ok(text));
        let keys: Vec<_> = documents
            .iter()
            .map(|document| match document {
                Document::Good { object, line, .. } => format!("{line} {}", object.key()),
                Document::Bad { faults, .. } => panic!("{faults:?}"),
            })
            .collect();
        assert_eq!(keys, ["3 EgressPolicy shop/payments", "13 Namespace shop"]);
    }

    #[test]
    fn unknown_fields_are_named_with_line_and_what_is_allowed() {
        assert_fault(
            &format!("{EGRESS}  allow:\n  - host: [a.example]\n    ports: []\n"),
            "6 spec.allow[0].host: unknown field; did you mean `hosts`? Allowed are cidrs, hosts, \
             http, ports, tls",
        );
        assert_fault(
            "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  prots: []\n",
            "5 spec.prots: unknown field; did you mean `ports`? Allowed are allocateLoadBalancer",
        );
        assert_fault(
            "apiVersion: turnpike.dev/v1alpha1\nkind: Telemetry\nmetadata: {name: a}\nsepc: {}\n",
            "4 sepc: unknown field; did you mean `spec`? Allowed are apiVersion, kind, metadata, \
             spec, status",
        );
        assert_fault(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  lables: {}\n",
            "5 metadata.lables: unknown field; did you mean `labels`? Allowed are annotations",
        );
        assert_fault(
            "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {zzz: 1}\n",
            "4 spec.zzz: unknown field; allowed are allocateLoadBalancer",
        );
    }

    #[test]
    fn wrong_values_are_named_with_line_and_what_is_allowed() {
        assert_fault(
            &format!("{EGRESS}  mode: Enforced\n"),
            "5 spec.mode: unknown variant `Enforced`, expected `Enforce` or `Audit`",
        );
        assert_fault(
            &format!(
                "{EGRESS}  allow:\n  - hosts: [a.example]\n    ports:\n    - {{port: 70000, \
                      protocol: TLS}}\n"
            ),
            "8 spec.allow[0].ports[0].port: invalid value: integer `70000`, expected u16",
        );
        assert_fault(
            &format!(
                "{EGRESS}  allow:\n  - hosts: [a.example]\n    ports:\n    - {{port: 5432, \
                      protocol: TCP}}\n"
            ),
            "8 spec.allow[0].ports[0].protocol: `TCP` is refused: with hosts, allowed are TLS and \
             HTTP",
        );
        assert_fault(
            &format!("{EGRESS}  allow:\n  - hosts: [a.example]\n"),
            "6 spec.allow[0]: missing field `ports`",
        );
        assert_fault(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {x: 1}}\n",
            "3 metadata.labels.x: invalid type: integer `1`, expected a string",
        );
        assert_fault(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: a}\n\
             spec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n  rules:\n  - matches:\n\
             \x20   - path: {type: RegularExpression, value: /a.*}\n",
            "8 spec.rules[0].matches[0].path.type: `RegularExpression` is refused: regular \
             expressions are not supported",
        );
    }

    #[test]
    fn what_is_no_known_object_is_refused() {
        assert_fault("just text", "1 : this is no object");
        assert_fault(
            "metadata: {name: a}\n",
            "1 kind: `kind` is missing; allowed are Namespace",
        );
        assert_fault("kind: Pod\n", "1 apiVersion: `apiVersion` is missing");
        assert_fault(
            "apiVersion: v1\nkind: EgressPolicy\n",
            "1 apiVersion: `v1` is not known for EgressPolicy; allowed is turnpike.dev/v1alpha1",
        );
        assert_fault(
            "apiVersion: v1\nkind: Secret\n",
            "2 kind: `Secret` is not a kind that is read; allowed are Namespace, ServiceAccount",
        );
        assert_fault(
            "apiVersion: v1\nkind: List\nitems: []\n",
            "2 kind: a List is not read",
        );
        assert_fault("a: [\n", "1 : this is not YAML");
        assert_fault(
            "apiVersion: v1\nkind: Pod\nmetadata: {}\n",
            "3 metadata.name: `` is refused",
        );
    }

    #[test]
    fn one_bad_document_spoils_no_other() {
        let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
        let documents = read_all(&Ok(format!("{namespace}---\na: [\n---\n{namespace}")));
        let good = documents
            .iter()
            .filter(|d| matches!(d, Document::Good { .. }))
            .count();
        assert_eq!((documents.len(), good), (3, 2));
    }
}
