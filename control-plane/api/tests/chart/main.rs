//! The chart `charts/turnpike`: what it says of itself, and what it renders.
//!
//! - [`values`]: the README's table and the schema name every value of values.yaml, and no other;
//! - [`rendered`]: every object that `helm template` gives is what its kind allows, and all of them
//!   together are the golden file. It needs helm, which `cargo verify kubernetes` builds, so these
//!   tests are ignored otherwise. After a change of the templates:
//!   `TURNPIKE_WRITE_CHART=1 cargo test -p turnpike-api --test chart -- --include-ignored`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rendered;
mod values;

use std::path::PathBuf;

use serde_json::Value;

fn chart() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../charts/turnpike")
}

fn read(name: &str) -> String {
    let path = chart().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn writes() -> bool {
    std::env::var_os("TURNPIKE_WRITE_CHART").is_some()
}

/// Every path that leads to a value, with the value. An empty map is one.
fn leaves(value: &Value) -> Vec<(String, Value)> {
    fn walk(path: &str, value: &Value, found: &mut Vec<(String, Value)>) {
        match value {
            Value::Object(fields) if !fields.is_empty() => {
                for (name, inner) in fields {
                    let dot = if path.is_empty() { "" } else { "." };
                    walk(&format!("{path}{dot}{name}"), inner, found);
                }
            }
            leaf => found.push((path.to_owned(), leaf.clone())),
        }
    }
    let mut found = Vec::new();
    walk("", value, &mut found);
    found
}
