//! What was typed becomes an object that is valid by itself, or a list of what is wrong with it.
//! Every source asks here, so that a folder and an API server are held to the same rules.

use serde_json::Value;
use serde_path_to_error::{Segment, Track};
use turnpike_api::{Kind, Object, Part, valid};

use crate::path::{Step, steps};

/// Who wrote the fields of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A person wrote all of it: an unknown field is a mistake.
    Person,
    /// The API server let it pass. What it knows and we do not, in metadata, in a status or in
    /// Kubernetes' own kinds, says nothing that we act on. An unknown field in the spec of a route
    /// or of our kinds may restrict something, and is refused as a person's is.
    ApiServer,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) path: Vec<Step>,
    /// What is wrong, and what is allowed.
    pub(crate) text: String,
}

/// Never an empty list of problems.
pub(crate) fn read(kind: Kind, value: &Value, origin: Origin) -> Result<Object, Vec<Problem>> {
    let object = typed(kind, value, origin)?;
    valid::check(&object).map_err(|invalid| {
        let problems = invalid.problems().iter().map(|problem| Problem {
            path: steps(&problem.field),
            text: format!("`{}` is refused: {}", problem.value, problem.problem),
        });
        problems.collect::<Vec<_>>()
    })?;
    Ok(object)
}

fn typed(kind: Kind, value: &Value, origin: Origin) -> Result<Object, Vec<Problem>> {
    let mut track = Track::new();
    let mut ignored = Vec::new();
    let mut on_ignored = |path: serde_ignored::Path<'_>| ignored.push(ignored_steps(&path));
    let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
    let deserializer = serde_ignored::Deserializer::new(deserializer, &mut on_ignored);
    let result = Object::deserialize(kind, deserializer);

    let unknown: Vec<Problem> = ignored
        .into_iter()
        .filter(|path| !harmless(kind, path, origin))
        .map(|path| Problem {
            text: unknown_field(kind, &path),
            path,
        })
        .collect();
    match result {
        _ if !unknown.is_empty() => Err(unknown),
        Ok(object) => Ok(object),
        Err(error) => {
            let mut path = track_steps(&track.path());
            let mut text = error.to_string();
            if let Some(field) = quoted(&text, "unknown field `") {
                if path.last() != Some(&Step::Key(field.to_owned())) {
                    path.push(Step::Key(field.to_owned()));
                }
                text = unknown_field(kind, &path);
            }
            Err(vec![Problem { path, text }])
        }
    }
}

/// Whether a field that nothing reads may stand there.
fn harmless(kind: Kind, path: &[Step], origin: Origin) -> bool {
    let Some(Step::Key(first)) = path.first() else {
        return false;
    };
    // Kinds of our own leave these two to their reader, which this is.
    let own = path.len() == 1 && (first == "apiVersion" || first == "kind");
    own || (origin == Origin::ApiServer && (kind.is_kubernetes() || first != "spec"))
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
    use serde_json::json;

    use super::*;

    fn problems(kind: Kind, value: &Value, origin: Origin) -> Vec<String> {
        let found = read(kind, value, origin).err().unwrap_or_default();
        let text = |Problem { path, text }: &Problem| {
            let text = text.split(';').next().unwrap_or_default();
            format!("{}: {text}", crate::path::field(path))
        };
        found.iter().map(text).collect()
    }

    #[test]
    fn what_a_newer_server_knows_is_harmless_where_nothing_acts_on_it() {
        let pod = json!({
            "metadata": {"name": "a", "shiny": 1},
            "spec": {"containers": [{"name": "a", "shiny": 1}]}, "status": {"shiny": 1},
        });
        assert!(problems(Kind::Pod, &pod, Origin::ApiServer).is_empty());
        assert_eq!(problems(Kind::Pod, &pod, Origin::Person).len(), 3);

        let route = |rule: Value| {
            json!({
                "metadata": {"name": "a"}, "status": {"parents": [], "shiny": 1},
                "spec": {"rules": [rule]},
            })
        };
        let served = |value: &Value| problems(Kind::HttpRoute, value, Origin::ApiServer);
        assert!(served(&route(json!({}))).is_empty());
        assert_eq!(
            served(&route(json!({"shiny": {}}))),
            ["spec.rules[0].shiny: unknown field"],
            "it may restrict the rule"
        );
        let egress = json!({"metadata": {"name": "a"}, "spec": {"shiny": 1}});
        assert_eq!(
            problems(Kind::EgressPolicy, &egress, Origin::ApiServer),
            ["spec.shiny: unknown field"]
        );
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
