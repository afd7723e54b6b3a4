//! YAML with its positions kept, so that an error names a line.

use std::collections::HashMap;

use saphyr::{LoadableYamlNode, MarkedYaml, Scalar, YamlData};
use saphyr_parser::{Event, Parser};
use serde_json::{Map, Value};

use crate::path::Step;

/// How deep a document may nest; no object in Kubernetes comes near. What reads it calls itself for
/// each level, and a stack that overflows ends the process.
const MAX_DEPTH: usize = 100;

/// One document: the value, and where its parts stand.
#[derive(Debug)]
pub(super) struct Yaml<'a> {
    root: MarkedYaml<'a>,
    /// Lines of the file before this document's first.
    offset: usize,
}

/// What is no YAML, or no JSON as YAML.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) line: usize,
    pub(super) problem: String,
}

/// Cuts a file at its `---` lines, as kubectl does, so that what is wrong in one document does not
/// hide the others. With the number of lines before each.
pub(super) fn split(text: &str) -> Vec<(usize, &str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let marker = line.strip_prefix("---").is_some_and(|rest| {
            rest.is_empty() || rest.starts_with(|c: char| c.is_ascii_whitespace())
        });
        if marker && at > start {
            documents.push((start_line, &text[start..at]));
            (start, start_line) = (at, number);
        }
        at += line.len();
    }
    documents.push((start_line, &text[start..]));
    documents
}

impl<'a> Yaml<'a> {
    /// The documents of one part of [`split`]; empty ones are left out.
    pub(super) fn parse(offset: usize, text: &'a str) -> Result<Vec<Self>, Broken> {
        // What ends too early is said to be wrong behind its end.
        let last = text.lines().count().max(1);
        if let Some(line) = too_deep(text) {
            return Err(Broken {
                line: offset + line,
                problem: format!("it nests deeper than {MAX_DEPTH} levels"),
            });
        }
        let roots = MarkedYaml::load_from_str(text).map_err(|error| Broken {
            line: offset + error.marker().line().min(last),
            problem: format!("this is not YAML: {}", error.info()),
        })?;
        let empty = |root: &MarkedYaml<'_>| {
            matches!(
                root.data,
                YamlData::BadValue | YamlData::Value(Scalar::Null)
            )
        };
        let roots = roots.into_iter().filter(|root| !empty(root));
        Ok(roots.map(|root| Self { root, offset }).collect())
    }

    pub(super) fn json(&self) -> Result<Value, Broken> {
        json(&self.root).map_err(|(line, problem)| Broken {
            line: line + self.offset,
            problem,
        })
    }

    /// The line of what a path leads to, or of the last part of it that exists.
    pub(super) fn line(&self, path: &[Step]) -> usize {
        let mut node = &self.root;
        let mut line = node.span.start.line();
        for step in path {
            let next = match (step, &node.data) {
                (Step::Key(key), YamlData::Mapping(mapping)) => mapping
                    .iter()
                    .find(|(known, _)| key_text(known).as_deref() == Some(key))
                    .map(|(known, value)| (known.span.start.line(), value)),
                (Step::Index(index), YamlData::Sequence(items)) => {
                    items.get(*index).map(|item| (item.span.start.line(), item))
                }
                _ => None,
            };
            let Some((at, value)) = next else { break };
            (line, node) = (at, value);
        }
        line + self.offset
    }
}

/// The line on which a text nests too deep, what its aliases stand for included. Events are read
/// without recursion; where they end in an error, that is for the reader to report.
fn too_deep(text: &str) -> Option<usize> {
    /// A collection that is open: its anchor, and how deep what is in it nests so far.
    type Open = (usize, usize);
    let mut open: Vec<Open> = Vec::new();
    let mut anchored: HashMap<usize, usize> = HashMap::new();
    for event in Parser::new_from_str(text) {
        let (event, span) = event.ok()?;
        let inner = match event {
            Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) => {
                open.push((anchor, 0));
                0
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let (anchor, inner) = open.pop()?;
                anchored.insert(anchor, inner + 1);
                inner + 1
            }
            Event::Alias(anchor) => anchored.get(&anchor).copied().unwrap_or_default(),
            _ => 0,
        };
        if open.len() + inner > MAX_DEPTH {
            return Some(span.start.line());
        }
        if let Some((_, deepest)) = open.last_mut() {
            *deepest = (*deepest).max(inner);
        }
    }
    None
}

type Position = (usize, String);

fn json(node: &MarkedYaml<'_>) -> Result<Value, Position> {
    let refused = |problem: &str| Err((node.span.start.line(), problem.to_owned()));
    match &node.data {
        YamlData::Value(scalar) => match scalar {
            Scalar::Null => Ok(Value::Null),
            Scalar::Boolean(value) => Ok((*value).into()),
            Scalar::Integer(value) => Ok((*value).into()),
            Scalar::FloatingPoint(value) => match serde_json::Number::from_f64(value.0) {
                Some(number) => Ok(Value::Number(number)),
                None => refused("a number must be finite"),
            },
            Scalar::String(text) => Ok(text.as_ref().into()),
        },
        YamlData::Sequence(items) => items
            .iter()
            .map(json)
            .collect::<Result<_, _>>()
            .map(Value::Array),
        YamlData::Mapping(mapping) => {
            let mut object = Map::with_capacity(mapping.len());
            for (key, value) in mapping {
                let Some(name) = key_text(key) else {
                    let problem = "a field's name must be a text";
                    return Err((key.span.start.line(), problem.to_owned()));
                };
                if object.insert(name.clone(), json(value)?).is_some() {
                    let problem = format!("`{name}` stands twice here");
                    return Err((key.span.start.line(), problem));
                }
            }
            Ok(Value::Object(object))
        }
        YamlData::Tagged(..) => refused("a tag of its own (`!…`) has no meaning here"),
        YamlData::Representation(..) | YamlData::Alias(_) | YamlData::BadValue => {
            refused("this is not YAML")
        }
    }
}

/// Numbers as names are common: `portLevelMtls: {8080: …}`.
fn key_text(key: &MarkedYaml<'_>) -> Option<String> {
    match &key.data {
        YamlData::Value(Scalar::String(text)) => Some(text.clone().into_owned()),
        YamlData::Value(Scalar::Integer(value)) => Some(value.to_string()),
        YamlData::Value(Scalar::Boolean(value)) => Some(value.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::steps;

    #[test]
    fn files_are_cut_at_their_markers() {
        let text = "# head\n---\na: 1\n---\nb: |\n  --- not one\n--- # c\nc: 3\n";
        let parts = split(text);
        let starts: Vec<_> = parts.iter().map(|(line, _)| *line).collect();
        assert_eq!(starts, [0, 1, 3, 6]);
        assert_eq!(
            parts.iter().map(|(_, text)| *text).collect::<String>(),
            text
        );
        let values: Vec<_> = parts
            .iter()
            .flat_map(|(offset, text)| Yaml::parse(*offset, text).unwrap())
            .map(|yaml| yaml.json().unwrap().to_string())
            .collect();
        assert_eq!(
            values,
            [r#"{"a":1}"#, r#"{"b":"--- not one\n"}"#, r#"{"c":3}"#]
        );
    }

    #[test]
    fn lines_are_found_by_path() {
        let text = "x: 1\nspec:\n  allow:\n  - hosts:\n    - a\n    - b\n  8080: {}\n";
        let documents = Yaml::parse(10, text).unwrap();
        let line = |field: &str| documents[0].line(&steps(field));
        assert_eq!(line(""), 11);
        assert_eq!(line("spec.allow[0].hosts[1]"), 16);
        assert_eq!(line("spec.allow[0].ports"), 14, "the last that exists");
        assert_eq!(line("spec.8080"), 17);
    }

    #[test]
    fn what_has_two_meanings_is_refused() {
        for (text, line) in [
            ("a: 1\nb: 2\na: 3\n", 3),
            ("a: 1\n1: 2\n'1': 3\n", 3),
            ("a: !secret b\n", 1),
            ("a:\n  ? [b]\n  : c\n", 2),
            ("a: .inf\n", 1),
            ("a: [1,\n", 1),
            ("a: b: c\n", 1),
        ] {
            let broken = Yaml::parse(0, text)
                .and_then(|documents| {
                    documents
                        .iter()
                        .map(Yaml::json)
                        .collect::<Result<Vec<_>, _>>()
                })
                .expect_err(text);
            assert_eq!(broken.line, line, "{text:?}: {}", broken.problem);
        }
    }

    #[test]
    fn a_document_that_grows_without_end_is_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..12 {
            let previous = format!("*a{}, ", i - 1).repeat(10);
            text.push_str(&format!("a{i}: &a{i} [{previous}]\n"));
        }
        assert!(Yaml::parse(0, &text).is_err());
    }

    #[test]
    fn a_document_that_nests_without_end_is_refused() {
        for step in ["[", "{a: ", "- ", "? ", "- - [", "&a [", "a: ["] {
            let broken = Yaml::parse(0, &step.repeat(100_000)).expect_err(step);
            assert_eq!(broken.line, 1, "{step}: {}", broken.problem);
        }
        let mut chain = "a0: &a0 [x]\n".to_owned();
        for i in 1..=MAX_DEPTH {
            chain.push_str(&format!("a{i}: &a{i} [*a{}]\n", i - 1));
        }
        let broken = Yaml::parse(0, &chain).expect_err("deep by its aliases alone");
        assert_eq!(broken.line, MAX_DEPTH, "{}", broken.problem);
        let fine = format!("{}x{}", "[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH));
        assert!(Yaml::parse(0, &fine).unwrap()[0].json().is_ok());
    }
}
