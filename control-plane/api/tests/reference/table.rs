//! A schema as a table of fields.

use std::collections::BTreeSet;

use serde_json::Value;

/// What fields mean whose types leave it to their names, by the end of the path. An entry goes once
/// the type says it.
const MEANINGS: &[(&str, &str)] = &[
    (
        "AuthorizationPolicy.spec.action",
        "What happens to the calls that a rule matches.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].from",
        "Who calls: one must match. Empty: anybody.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].to",
        "What is called: one must match. Empty: anything.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].from[].source.namespaces",
        "Namespaces of callers with an identity.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].from[].source.notIpBlocks",
        "None of these may match.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].from[].source.notNamespaces",
        "None of these may match.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].from[].source.notPrincipals",
        "None of these may match.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].to[].operation.hosts",
        "The request's host, in lower case and without port.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].to[].operation.methods",
        "The request's method.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].to[].operation.paths",
        "The request's path in its normal form, without query.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].to[].operation.notHosts",
        "None of these may match.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].to[].operation.notMethods",
        "None of these may match.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].to[].operation.notPaths",
        "None of these may match.",
    ),
    (
        "AuthorizationPolicy.spec.rules[].to[].operation.notPorts",
        "None of these may match.",
    ),
    ("[].cidrs", "Ranges of addresses, in place of `hosts`."),
    ("[].http.paths[].exact", "The whole path."),
    ("[].http.paths[].prefix", "The first elements of the path."),
    ("allow[].ports", "One must match."),
    ("default[].ports", "One must match."),
    ("ceiling[].ports", "One must match."),
    ("inbound[].ports", "The pod's ports."),
    ("inbound[].ports[].port", "The port."),
    ("[].ports[].port", "The port, or the first of a range."),
    (
        "allow[].ports[].protocol",
        "`TLS`: the SNI must be an allowed host. `HTTP`: plaintext, each request for an allowed host. `TCP`: by address alone. `UDP`: not in force, the node refuses UDP to outside the cluster whatever a rule says.",
    ),
    ("default[].ports[].protocol", "As in EgressPolicy."),
    ("ceiling[].ports[].protocol", "As in EgressPolicy."),
    ("inbound[].ports[].protocol", "The transport."),
    ("[].tls", "How the gate speaks to the host."),
    ("ClusterEgressPolicy.spec.mode", "As in EgressPolicy."),
    (
        "mtls.mode",
        "`PERMISSIVE` accepts plaintext too; `STRICT` only mutual TLS from the mesh.",
    ),
    ("portLevelMtls{}.mode", "As `mtls.mode`."),
    (
        "PeerAuthentication.spec.mtls",
        "For all ports. Left out: as the next less specific policy, or MeshConfig, says.",
    ),
    (
        "accessLog",
        "Whether each request and connection is logged. MeshConfig's own default is `true`.",
    ),
    (
        "TrafficPolicy.spec.circuitBreaker.maxConnections",
        "Connections to the Service, from one proxy. 10000 where left out.",
    ),
    ("TrafficPolicy.spec.retry", "When a request is tried again."),
    (
        "TrafficPolicy.spec.retryConstraint.budget",
        "The share of requests that may be retries.",
    ),
    (
        "TrafficPolicy.spec.retryConstraint.minRetryRate.count",
        "Retries per `interval`.",
    ),
    (
        "TrafficPolicy.spec.retryConstraint.minRetryRate.interval",
        "1s where left out.",
    ),
    (
        "TrafficPolicy.spec.targetRefs[].name",
        "The Service's name.",
    ),
];

/// A table of all fields below `name`.
pub(crate) fn rows(kind: &str, name: &str, schema: &Value) -> String {
    let mut rows = Vec::new();
    fields(kind, name, schema, &mut rows);
    let mut table = "| Field | Type | Default, allowed | Meaning |\n|---|---|---|---|\n".to_owned();
    for cells in rows {
        let cells = cells.map(|cell| cell.replace('\n', " ").replace('|', "\\|"));
        table += &format!("| {} |\n", cells.join(" | "));
    }
    table
}

/// What CEL says of the whole and of its parts, each once.
pub(crate) fn rules(schema: &Value) -> String {
    let mut messages = BTreeSet::new();
    collect(schema, &mut messages);
    let lines = messages.iter().map(|message| format!("- {message}\n"));
    lines.collect()
}

fn collect(schema: &Value, messages: &mut BTreeSet<String>) {
    match schema {
        Value::Object(fields) => {
            let rules = fields.get("x-kubernetes-validations");
            for rule in rules.and_then(Value::as_array).into_iter().flatten() {
                messages.extend(rule["message"].as_str().map(str::to_owned));
            }
            fields.values().for_each(|inner| collect(inner, messages));
        }
        Value::Array(items) => items.iter().for_each(|inner| collect(inner, messages)),
        _ => {}
    }
}

fn fields(kind: &str, path: &str, schema: &Value, rows: &mut Vec<[String; 4]>) {
    let (path, schema) = inside(path, schema);
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        let required = schema["required"]
            .as_array()
            .is_some_and(|names| names.iter().any(|required| required == name));
        rows.push([
            format!("`{path}`"),
            type_of(field),
            allowed(field, required),
            meaning(kind, &path, field),
        ]);
        if !is_selector(field) && !is_conditions(field) {
            fields(kind, &path, field, rows);
        }
    }
}

/// Through lists and maps, to what they hold.
fn inside<'a>(path: &str, schema: &'a Value) -> (String, &'a Value) {
    if schema["items"].is_object() {
        inside(&format!("{path}[]"), &schema["items"])
    } else if schema["additionalProperties"].is_object() {
        inside(&format!("{path}{{}}"), &schema["additionalProperties"])
    } else {
        (path.to_owned(), schema)
    }
}

fn is_selector(schema: &Value) -> bool {
    schema["properties"]["matchLabels"].is_object()
}

/// Kubernetes' own.
fn is_conditions(schema: &Value) -> bool {
    schema["items"]["properties"]["lastTransitionTime"].is_object()
}

fn is_duration(schema: &Value) -> bool {
    let pattern = schema["pattern"].as_str();
    pattern.is_some_and(|pattern| pattern.contains("(h|m|s|ms)"))
}

fn type_of(schema: &Value) -> String {
    let name = schema["type"].as_str().unwrap_or("any");
    match name {
        "array" if is_conditions(schema) => "list of Condition".to_owned(),
        "array" => format!("list of {}", type_of(&schema["items"])),
        "object" if is_selector(schema) => "LabelSelector".to_owned(),
        "object" if schema["additionalProperties"].is_object() => {
            format!("map to {}", type_of(&schema["additionalProperties"]))
        }
        "string" if is_duration(schema) => "duration".to_owned(),
        "string" if schema["format"] == "date-time" => "time".to_owned(),
        other => other.to_owned(),
    }
}

fn allowed(schema: &Value, required: bool) -> String {
    let mut parts = Vec::new();
    if required {
        parts.push("required".to_owned());
    }
    if let Some(default) = schema.get("default").filter(|default| !default.is_null()) {
        parts.push(format!("default `{}`", text(default)));
    }
    let of_items = if schema["items"].is_object() {
        &schema["items"]
    } else {
        schema
    };
    if let Some(values) = of_items["enum"].as_array() {
        let values = values.iter().filter(|value| !value.is_null());
        let values: Vec<_> = values.map(|value| format!("`{}`", text(value))).collect();
        parts.push(values.join(", "));
    }
    // All that the type can hold is no limit.
    if of_items["format"] != "uint16" || of_items["minimum"].as_f64() > Some(0.0) {
        parts.extend(range(&of_items["minimum"], &of_items["maximum"], ""));
    }
    parts.extend(range(&schema["minItems"], &schema["maxItems"], " items"));
    let length = (&of_items["minLength"], &of_items["maxLength"]);
    parts.extend(range(length.0, length.1, " characters"));
    parts.join("; ")
}

fn text(value: &Value) -> String {
    let text = value.as_str().filter(|text| !text.is_empty());
    text.map_or_else(|| value.to_string(), str::to_owned)
}

fn range(least: &Value, most: &Value, unit: &str) -> Option<String> {
    match (least.as_f64(), most.as_f64()) {
        (Some(least), Some(most)) => Some(format!("{least} to {most}{unit}")),
        (None, Some(most)) => Some(format!("at most {most}{unit}")),
        (Some(1.0), None) if unit == " characters" => Some("not empty".to_owned()),
        (Some(least), None) if least > 0.0 => Some(format!("at least {least}{unit}")),
        _ => None,
    }
}

/// The field's own description.
fn meaning(kind: &str, path: &str, schema: &Value) -> String {
    let path = format!("{kind}.{path}");
    let own = schema["description"]
        .as_str()
        .filter(|text| !text.is_empty());
    let extra = MEANINGS.iter().find(|(end, _)| path.ends_with(end));
    own.or(extra.map(|(_, text)| *text))
        .unwrap_or_else(|| panic!("nothing says what {path} means: give it a doc comment"))
        .to_owned()
}

/// Entries that no field needs.
pub(crate) fn needless(schemas: &[(String, Value)]) -> Vec<&'static str> {
    let mut silent = Vec::new();
    for (kind, schema) in schemas {
        without_description(
            &format!("{kind}.spec"),
            &schema["properties"]["spec"],
            &mut silent,
        );
    }
    let needed = |end: &str| silent.iter().any(|path: &String| path.ends_with(end));
    let ends = MEANINGS.iter().map(|(end, _)| *end);
    ends.filter(|end| !needed(end)).collect()
}

fn without_description(path: &str, schema: &Value, silent: &mut Vec<String>) {
    let (path, schema) = inside(path, schema);
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        if field["description"].as_str().is_none_or(str::is_empty) {
            silent.push(path.clone());
        }
        without_description(&path, field, silent);
    }
}
