//! values.yaml, its schema, and the table in the README.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{chart, leaves, read, writes};

const BEGIN: &str = "<!-- values: written by control-plane/api/tests/chart -->\n";
const END: &str = "<!-- end of values -->\n";
/// Requests and limits are read as one value: they are passed on as they are.
const WHOLE: [&str; 1] = ["resources"];

/// A value with its comment, in the order of the file.
struct Documented {
    path: String,
    default: String,
    about: String,
}

/// Reads what is written above each value. The file keeps to a form that allows it: two spaces a
/// level, comments on lines of their own above what they are about.
fn documented() -> Vec<Documented> {
    let text = read("values.yaml");
    let values: Value = serde_saphyr::from_str(&text).unwrap();
    let mut found = Vec::new();
    let (mut parents, mut comment) = (Vec::<(usize, String)>::new(), Vec::new());
    for line in text.lines() {
        let (indent, trimmed) = (line.len() - line.trim_start().len(), line.trim());
        if let Some(said) = trimmed.strip_prefix('#') {
            comment.push(said.trim().to_owned());
            continue;
        }
        let Some((name, _)) = trimmed.split_once(':') else {
            comment.clear();
            continue;
        };
        parents.retain(|(depth, _)| *depth < indent);
        let mut path: Vec<_> = parents.iter().map(|(_, name)| name.as_str()).collect();
        path.push(name);
        let pointer = format!("/{}", path.join("/"));
        let default = values.pointer(&pointer).unwrap();
        let inside_whole = parents.iter().any(|(_, parent)| is_whole(&pointer, parent));
        let is_leaf = default.as_object().is_none_or(serde_json::Map::is_empty)
            || trimmed.ends_with('}')
            || is_whole(&pointer, name);
        if is_leaf && !inside_whole {
            found.push(Documented {
                path: path.join("."),
                default: default.to_string(),
                about: comment.join(" "),
            });
        }
        comment.clear();
        parents.push((indent, name.to_owned()));
    }
    found
}

/// The sidecar's resources are three values of their own.
fn is_whole(pointer: &str, name: &str) -> bool {
    WHOLE.contains(&name) && !pointer.starts_with("/proxy/")
}

#[test]
fn the_readmes_table_is_that_of_the_values() {
    let readme = read("README.md");
    let mut table = "| Value | Default | |\n|---|---|---|\n".to_owned();
    for Documented {
        path,
        default,
        about,
    } in documented()
    {
        assert!(!about.is_empty(), "values.yaml does not say what {path} is");
        let about = about.replace('|', "\\|");
        table += &format!("| `{path}` | `{default}` | {about} |\n");
    }
    let (before, rest) = readme.split_once(BEGIN).expect("the README has the table");
    let (_, after) = rest.split_once(END).expect("the table has an end");
    let expected = format!("{before}{BEGIN}{table}{END}{after}");
    if writes() {
        std::fs::write(chart().join("README.md"), &expected).unwrap();
    }
    assert!(
        read("README.md") == expected,
        "charts/turnpike/README.md is not what values.yaml says; run `TURNPIKE_WRITE_CHART=1 cargo \
         test -p turnpike-api --test chart`"
    );
}

#[test]
fn the_schema_knows_every_value_and_no_other() {
    let values: Value = serde_saphyr::from_str(&read("values.yaml")).unwrap();
    let schema: Value = serde_json::from_str(&read("values.schema.json")).unwrap();
    let mut known = BTreeMap::new();
    properties("", &schema, &mut known);
    // Helm's own.
    known.remove("global");
    let known: Vec<_> = known.into_iter().collect();
    for (path, value) in leaves(&values) {
        let below = |path: &str, name: &str| {
            path.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('.'))
        };
        let covered = known.iter().any(|(name, open)| {
            let emptied = value.is_object() && below(name, &path);
            *name == path || *open && below(&path, name) || emptied
        });
        assert!(covered, "values.schema.json does not know `{path}`");
    }
    // Values whose default is not to be there are named in a comment.
    let text = read("values.yaml");
    for (name, _) in &known {
        let pointer = format!("/{}", name.replace('.', "/"));
        let last = name.rsplit('.').next().unwrap();
        let in_comment = text.lines().any(|line| {
            line.trim_start()
                .strip_prefix('#')
                .is_some_and(|said| said.contains(&format!("{last}:")))
        });
        assert!(
            values.pointer(&pointer).is_some() || in_comment,
            "values.yaml does not have `{name}`, which its schema knows"
        );
    }
}

/// Paths of all properties that are not objects of known properties; whether they take any name.
fn properties(path: &str, schema: &Value, found: &mut BTreeMap<String, bool>) {
    let Some(inner) = schema.get("properties").and_then(Value::as_object) else {
        let open = schema
            .get("additionalProperties")
            .is_some_and(Value::is_object);
        found.insert(path.to_owned(), open);
        return;
    };
    assert_eq!(
        schema.get("additionalProperties"),
        Some(&Value::Bool(false)),
        "`{path}` takes names that it does not know"
    );
    for (name, schema) in inner {
        let dot = if path.is_empty() { "" } else { "." };
        properties(&format!("{path}{dot}{name}"), schema, found);
    }
}

/// The policy in the README allows what the code calls, and nothing more.
#[test]
fn the_iam_policy_is_that_of_the_calls() {
    let readme = read("README.md");
    let policy = readme.split("```json\n").nth(1).expect("the policy");
    let policy: Value = serde_json::from_str(policy.split("```").next().unwrap()).unwrap();
    let statements = policy["Statement"].as_array().unwrap();
    let mut allowed: Vec<&str> = statements
        .iter()
        .flat_map(|statement| statement["Action"].as_array().unwrap())
        .map(|action| action.as_str().unwrap().strip_prefix("ec2:").unwrap())
        .collect();
    allowed.sort_unstable();
    let source = std::fs::read_to_string(chart().join("../../cni/cloud/src/ec2.rs")).unwrap();
    let production = source.split("#[cfg(test)]").next().unwrap();
    let verbs = [
        "Describe", "Create", "Attach", "Modify", "Assign", "Unassign", "Detach", "Delete",
    ];
    let mut called: Vec<&str> = production
        .split('"')
        .skip(1)
        .step_by(2)
        .filter(|text| {
            verbs
                .iter()
                .any(|verb| text.starts_with(verb) && text != verb)
        })
        .filter(|text| text.chars().all(char::is_alphabetic))
        .collect();
    called.sort_unstable();
    called.dedup();
    assert_eq!(allowed, called);
}
