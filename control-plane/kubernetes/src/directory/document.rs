//! A document becomes an object, or a list of what is wrong with it.

use serde_json::Value;
use serde_path_to_error::{Segment, Track};
use turnpike_api::{Kind, Object, ObjectKey, Part, valid};

use super::yaml::{self, Broken, Step, Yaml};

/// What a file holds, document by document; empty ones are left out.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Document {
    Good {
        object: Object,
        line: usize,
    },
    /// Never without a fault.
    Bad {
        key: Option<ObjectKey>,
        faults: Vec<Fault>,
    },
}

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
        field: Some(yaml::field(path)).filter(|field| !field.is_empty()),
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
                faults: vec![fault(&yaml::steps(field), problem)],
            };
        }
    };
    let key = key(kind, &value);
    let object = match typed(kind, &value) {
        Ok(object) => object,
        Err(faults) => {
            let faults = faults
                .iter()
                .map(|(path, problem)| fault(path, problem.clone()));
            return Document::Bad {
                key,
                faults: faults.collect(),
            };
        }
    };
    match valid::check(&object) {
        Ok(()) => Document::Good {
            object,
            line: document.line(&[]),
        },
        Err(invalid) => {
            let faults = invalid.problems().iter().map(|problem| {
                let text = format!("`{}` is refused: {}", problem.value, problem.problem);
                fault(&yaml::steps(&problem.field), text)
            });
            Document::Bad {
                key,
                faults: faults.collect(),
            }
        }
    }
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

type Fields = Vec<(Vec<Step>, String)>;

fn typed(kind: Kind, value: &Value) -> Result<Object, Fields> {
    let mut track = Track::new();
    let mut ignored = Vec::new();
    let mut on_ignored = |path: serde_ignored::Path<'_>| ignored.push(ignored_steps(&path));
    let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
    let deserializer = serde_ignored::Deserializer::new(deserializer, &mut on_ignored);
    let result = Object::deserialize(kind, deserializer);

    // Kinds of our own leave these two to their reader, which this is.
    let own = |path: &Vec<Step>| matches!(&path[..], [Step::Key(key)] if key == "apiVersion" || key == "kind");
    let unknown: Fields = ignored
        .into_iter()
        .filter(|path| !own(path))
        .map(|path| {
            let problem = unknown_field(kind, &path);
            (path, problem)
        })
        .collect();
    match result {
        _ if !unknown.is_empty() => Err(unknown),
        Ok(object) => Ok(object),
        Err(error) => {
            let mut path = track_steps(&track.path());
            let mut problem = error.to_string();
            if let Some(field) = quoted(&problem, "unknown field `") {
                if path.last() != Some(&Step::Key(field.to_owned())) {
                    path.push(Step::Key(field.to_owned()));
                }
                problem = unknown_field(kind, &path);
            }
            Err(vec![(path, problem)])
        }
    }
}

/// Names the fields that there are, and the one that may have been meant.
fn unknown_field(kind: Kind, path: &[Step]) -> String {
    let Some((Step::Key(field), parent)) = path.split_last() else {
        return "unknown field".to_owned();
    };
    let parts: Vec<Part<'_>> = parent
        .iter()
        .map(|step| match step {
            Step::Key(key) => Part::Field(key),
            Step::Index(_) => Part::Item,
        })
        .collect();
    match kind.fields(&parts) {
        Some(fields) => {
            let meant = fields.iter().find(|known| is_near(known, field)).cloned();
            let fields = fields.join(", ");
            match meant {
                Some(meant) => {
                    format!("unknown field; did you mean `{meant}`? Allowed are {fields}")
                }
                None => format!("unknown field; allowed are {fields}"),
            }
        }
        None => "unknown field".to_owned(),
    }
}

/// The same letters but for case, one missing, one more, one other, or two that changed places.
fn is_near(known: &str, typed: &str) -> bool {
    let known: Vec<char> = known.to_lowercase().chars().collect();
    let typed: Vec<char> = typed.to_lowercase().chars().collect();
    let same_start = known.iter().zip(&typed).take_while(|(a, b)| a == b).count();
    let (known, typed) = (&known[same_start..], &typed[same_start..]);
    match (known, typed) {
        ([], [] | [_]) | ([_], []) => true,
        ([a, b, known @ ..], [c, d, typed @ ..]) if a == d && b == c && known == typed => true,
        ([_, known @ ..], [_, typed @ ..]) if known == typed => true,
        ([_, known @ ..], typed) if known == typed => true,
        (known, [_, typed @ ..]) => known == typed,
        _ => false,
    }
}

fn quoted<'a>(text: &'a str, before: &str) -> Option<&'a str> {
    text.strip_prefix(before)?.split('`').next()
}

fn track_steps(path: &serde_path_to_error::Path) -> Vec<Step> {
    let steps = path.iter().filter_map(|segment| match segment {
        Segment::Seq { index } => Some(Step::Index(*index)),
        Segment::Map { key } => Some(Step::Key(key.clone())),
        Segment::Enum { .. } | Segment::Unknown => None,
    });
    steps.collect()
}

fn ignored_steps(path: &serde_ignored::Path<'_>) -> Vec<Step> {
    use serde_ignored::Path;
    let (parent, step) = match path {
        Path::Root => return Vec::new(),
        Path::Seq { parent, index } => (parent, Some(Step::Index(*index))),
        Path::Map { parent, key } => (parent, Some(Step::Key(key.clone()))),
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => (parent, None),
    };
    let mut steps = ignored_steps(parent);
    steps.extend(step);
    steps
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
                Document::Good { object, line } => format!("{line} {}", object.key()),
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

    #[test]
    fn near_names_are_found() {
        for (known, typed, near) in [
            ("hosts", "host", true),
            ("hosts", "hostss", true),
            ("hosts", "Hosts", true),
            ("ports", "prots", true),
            ("allow", "alow", true),
            ("allow", "slow", false),
            ("mode", "node", true),
            ("tls", "http", false),
        ] {
            assert_eq!(is_near(known, typed), near, "{known} {typed}");
        }
    }
}
