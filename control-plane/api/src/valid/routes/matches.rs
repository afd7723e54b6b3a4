//! What a rule of an HTTPRoute matches.

use gateway_api::experimental::httproutes::{
    HttpRouteRules, HttpRouteRulesMatches, HttpRouteRulesMatchesHeadersType,
    HttpRouteRulesMatchesPath, HttpRouteRulesMatchesPathType, HttpRouteRulesMatchesQueryParamsType,
};
use turnpike_rules::route::{PathMatch, RouteMatch, ValueMatch};

use crate::valid::problems::{self, Problems};

const NO_REGEX: &str =
    "regular expressions are not supported (reason UnsupportedValue); allowed is";

/// One for each match; a rule without any matches every request.
pub(super) fn all(problems: &mut Problems, field: &str, typed: &HttpRouteRules) -> Vec<RouteMatch> {
    let Some(matches) = typed
        .matches
        .as_deref()
        .filter(|matches| !matches.is_empty())
    else {
        return vec![RouteMatch::default()];
    };
    let valid = matches
        .iter()
        .enumerate()
        .map(|(i, typed)| one(problems, &format!("{field}.matches[{i}]"), typed));
    valid.collect()
}

/// Whether a prefix can be replaced, whichever of the matches it was.
pub(super) fn only_prefixes(typed: &HttpRouteRules) -> bool {
    use HttpRouteRulesMatchesPathType::PathPrefix;
    let kind = |m: &HttpRouteRulesMatches| m.path.as_ref().and_then(|path| path.r#type.clone());
    typed
        .matches
        .iter()
        .flatten()
        .all(|m| matches!(kind(m), None | Some(PathPrefix)))
}

fn one(problems: &mut Problems, field: &str, typed: &HttpRouteRulesMatches) -> RouteMatch {
    let HttpRouteRulesMatches {
        headers,
        method,
        path,
        query_params,
    } = typed;
    let mut valid = RouteMatch::default();
    if let Some(path) = path {
        valid.path = self::path(problems, &format!("{field}.path"), path);
    }
    // The enum's own names are the methods.
    if let Some(Ok(serde_json::Value::String(method))) = method.as_ref().map(serde_json::to_value) {
        valid.method = Some(method.into());
    }
    for (i, header) in headers.iter().flatten().enumerate() {
        let field = format!("{field}.headers[{i}]");
        if header.r#type == Some(HttpRouteRulesMatchesHeadersType::RegularExpression) {
            let allowed = format!("{NO_REGEX} Exact");
            problems.add(format!("{field}.type"), "RegularExpression", allowed);
        }
        let name = http::HeaderName::from_bytes(header.name.as_bytes())
            .map_err(|_| "it is no header name");
        if let Some(name) = problems.take(format!("{field}.name"), &header.name, name) {
            push_once(&mut valid.headers, name.as_str(), &header.value);
        }
    }
    for (i, param) in query_params.iter().flatten().enumerate() {
        if param.r#type == Some(HttpRouteRulesMatchesQueryParamsType::RegularExpression) {
            let field = format!("{field}.queryParams[{i}].type");
            problems.add(field, "RegularExpression", format!("{NO_REGEX} Exact"));
        }
        push_once(&mut valid.query, &param.name, &param.value);
    }
    valid
}

/// Of several entries with one name the first counts, as Gateway API says.
fn push_once(list: &mut Vec<ValueMatch>, name: &str, value: &str) {
    if !list.iter().any(|known| &*known.name == name) {
        list.push(ValueMatch {
            name: name.into(),
            value: value.into(),
        });
    }
}

fn path(problems: &mut Problems, field: &str, typed: &HttpRouteRulesMatchesPath) -> PathMatch {
    use HttpRouteRulesMatchesPathType::{Exact, PathPrefix, RegularExpression};
    let value = typed.value.as_deref().unwrap_or("/");
    if typed.r#type == Some(RegularExpression) {
        let allowed = format!("{NO_REGEX} Exact or PathPrefix");
        problems.add(format!("{field}.type"), "RegularExpression", allowed);
        return PathMatch::default();
    }
    let Some(path) = problems.take(format!("{field}.value"), value, problems::path(value)) else {
        return PathMatch::default();
    };
    match typed.r#type {
        Some(Exact) => PathMatch::Exact(path.into()),
        None | Some(PathPrefix | RegularExpression) => PathMatch::prefix(path),
    }
}
