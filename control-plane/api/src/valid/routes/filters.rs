//! What a rule of an HTTPRoute does to requests and responses.

use std::sync::Arc;

use gateway_api::experimental::httproutes::{
    HttpRouteRulesBackendRefsFilters, HttpRouteRulesFilters as Typed,
    HttpRouteRulesFiltersRequestHeaderModifier, HttpRouteRulesFiltersRequestMirror,
    HttpRouteRulesFiltersRequestMirrorFraction, HttpRouteRulesFiltersRequestRedirect,
    HttpRouteRulesFiltersRequestRedirectPath, HttpRouteRulesFiltersRequestRedirectScheme,
    HttpRouteRulesFiltersType as Type, HttpRouteRulesFiltersUrlRewrite,
};
use serde::{Serialize, de::DeserializeOwned};
use turnpike_rules::{
    host::HostName,
    route::{Filter, HeaderEdit, PathEdit, Redirect, Rewrite},
};

use super::{BackendRef, Context};
use crate::valid::problems::{self, Problems};

const MILLION: i64 = 1_000_000;

/// `only_prefixes`: the rule matches by prefix alone, so that a prefix can be replaced.
pub(super) fn all(
    problems: &mut Problems,
    context: &Context<'_>,
    field: &str,
    typed: &[Typed],
    only_prefixes: bool,
) -> Vec<Filter> {
    let filters: Vec<Filter> = typed
        .iter()
        .enumerate()
        .filter_map(|(i, typed)| {
            one(
                problems,
                context,
                &format!("{field}[{i}]"),
                typed,
                only_prefixes,
            )
        })
        .collect();
    if redirects(&filters) && filters.iter().any(|f| matches!(f, Filter::Rewrite(_))) {
        let allowed = "a request is either redirected or rewritten";
        problems.add(field, "RequestRedirect and URLRewrite", allowed);
    }
    filters
}

pub(super) fn redirects(filters: &[Filter]) -> bool {
    filters
        .iter()
        .any(|filter| matches!(filter, Filter::Redirect(_)))
}

/// A backend's filters are the rule's under another name.
pub(super) fn of_backend(typed: &[HttpRouteRulesBackendRefsFilters]) -> Vec<Typed> {
    typed.iter().filter_map(same_shape).collect()
}

/// Between types that are generated from the same schema.
fn same_shape<T: DeserializeOwned>(typed: &impl Serialize) -> Option<T> {
    serde_json::to_value(typed)
        .and_then(serde_json::from_value)
        .ok()
}

fn one(
    problems: &mut Problems,
    context: &Context<'_>,
    field: &str,
    typed: &Typed,
    only_prefixes: bool,
) -> Option<Filter> {
    let Typed {
        cors: _,
        extension_ref: _,
        external_auth: _,
        request_header_modifier,
        request_mirror,
        request_redirect,
        response_header_modifier,
        r#type,
        url_rewrite,
    } = typed;
    let filter = match r#type {
        Type::RequestHeaderModifier => request_header_modifier.as_ref().map(|typed| {
            let field = format!("{field}.requestHeaderModifier");
            Some(Filter::RequestHeaders(headers(problems, &field, typed)))
        }),
        Type::ResponseHeaderModifier => response_header_modifier.as_ref().map(|typed| {
            let field = format!("{field}.responseHeaderModifier");
            let typed = same_shape(typed)?;
            Some(Filter::ResponseHeaders(headers(problems, &field, &typed)))
        }),
        Type::RequestMirror => request_mirror
            .as_ref()
            .map(|typed| mirror(problems, context, &format!("{field}.requestMirror"), typed)),
        Type::RequestRedirect => request_redirect.as_ref().map(|typed| {
            let field = format!("{field}.requestRedirect");
            Some(Filter::Redirect(redirect(
                problems,
                &field,
                typed,
                only_prefixes,
            )))
        }),
        Type::UrlRewrite => url_rewrite.as_ref().map(|typed| {
            let field = format!("{field}.urlRewrite");
            Some(Filter::Rewrite(rewrite(
                problems,
                &field,
                typed,
                only_prefixes,
            )))
        }),
        Type::ExtensionRef | Type::Cors | Type::ExternalAuth => {
            let allowed = "not supported (reason UnsupportedValue); allowed are \
                           RequestHeaderModifier, ResponseHeaderModifier, RequestMirror, \
                           RequestRedirect and URLRewrite";
            problems.add(format!("{field}.type"), format!("{type:?}"), allowed);
            return None;
        }
    };
    if filter.is_none() {
        let value = format!("{type:?}");
        problems.add(field, value, "the part that goes with this type is missing");
    }
    filter.flatten()
}

fn headers(
    problems: &mut Problems,
    field: &str,
    typed: &HttpRouteRulesFiltersRequestHeaderModifier,
) -> HeaderEdit {
    let HttpRouteRulesFiltersRequestHeaderModifier { add, remove, set } = typed;
    let mut pair = |list: &str, i: usize, name: &str, value: &str| {
        let field = format!("{field}.{list}[{i}]");
        let name = header_name(problems, &format!("{field}.name"), name)?;
        let valid = http::HeaderValue::from_str(value)
            .map_err(|_| "a header value has no control characters");
        problems.take(format!("{field}.value"), value, valid)?;
        Some((name, Arc::from(value)))
    };
    let set = set.iter().flatten().enumerate();
    let set = set
        .filter_map(|(i, h)| pair("set", i, &h.name, &h.value))
        .collect();
    let add = add.iter().flatten().enumerate();
    let add = add
        .filter_map(|(i, h)| pair("add", i, &h.name, &h.value))
        .collect();
    let remove = remove.iter().flatten().enumerate();
    let remove = remove
        .filter_map(|(i, name)| header_name(problems, &format!("{field}.remove[{i}]"), name))
        .collect();
    HeaderEdit { set, add, remove }
}

/// In lower case; not one that says where a message ends or which connection it is for.
fn header_name(problems: &mut Problems, field: &str, name: &str) -> Option<Arc<str>> {
    const OURS: &[&str] = &[
        "connection",
        "content-length",
        "host",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    let valid = http::HeaderName::from_bytes(name.as_bytes())
        .map_err(|_| "it is no header name")
        .and_then(|name| match OURS.contains(&name.as_str()) {
            true => Err("it belongs to the connection, not the request; for host use URLRewrite"),
            false => Ok(name),
        });
    problems
        .take(field, name, valid)
        .map(|name| name.as_str().into())
}

fn mirror(
    problems: &mut Problems,
    context: &Context<'_>,
    field: &str,
    typed: &HttpRouteRulesFiltersRequestMirror,
) -> Option<Filter> {
    let HttpRouteRulesFiltersRequestMirror {
        backend_ref,
        fraction,
        percent,
    } = typed;
    let to = context.target(
        problems,
        &format!("{field}.backendRef"),
        BackendRef {
            group: backend_ref.group.as_deref(),
            kind: backend_ref.kind.as_deref(),
            namespace: backend_ref.namespace.as_deref(),
            name: &backend_ref.name,
            port: backend_ref.port,
        },
    )?;
    let per_million = match (percent, fraction) {
        (None, None) => Some(MILLION),
        (Some(percent), None) => Some(i64::from(*percent) * MILLION / 100),
        (
            None,
            Some(HttpRouteRulesFiltersRequestMirrorFraction {
                denominator,
                numerator,
            }),
        ) => {
            let parts = i64::from(denominator.unwrap_or(100)).max(1);
            // Rounded up, so that what is not nothing is not made nothing.
            let share = (i64::from(*numerator) * MILLION + parts - 1) / parts;
            (*numerator >= 0).then_some(share)
        }
        (Some(_), Some(_)) => None,
    };
    let per_million = per_million.filter(|share| *share <= MILLION);
    let per_million = per_million.and_then(|share| u32::try_from(share).ok());
    let allowed = "allowed is one of percent (0 to 100) and fraction (at most 1)";
    let value = format!("percent {percent:?}, fraction {fraction:?}");
    let per_million = problems.take(field, value, per_million.ok_or(allowed))?;
    let (service, port) = to?;
    Some(Filter::Mirror {
        service,
        port,
        per_million,
    })
}

fn redirect(
    problems: &mut Problems,
    field: &str,
    typed: &HttpRouteRulesFiltersRequestRedirect,
    only_prefixes: bool,
) -> Redirect {
    let HttpRouteRulesFiltersRequestRedirect {
        hostname,
        path,
        port,
        scheme,
        status_code,
    } = typed;
    let status = u16::try_from(status_code.unwrap_or(302))
        .ok()
        .filter(|status| [301, 302, 303, 307, 308].contains(status))
        .ok_or("allowed are 301, 302, 303, 307 and 308");
    let status = problems.take(
        format!("{field}.statusCode"),
        status_code.unwrap_or(302),
        status,
    );
    Redirect {
        scheme: scheme.as_ref().map(|scheme| match scheme {
            HttpRouteRulesFiltersRequestRedirectScheme::Http => "http".into(),
            HttpRouteRulesFiltersRequestRedirectScheme::Https => "https".into(),
        }),
        host: host(problems, field, hostname.as_deref()),
        port: port.and_then(|port| super::port(problems, &format!("{field}.port"), port)),
        path: path
            .as_ref()
            .and_then(|typed| path_edit(problems, field, typed, only_prefixes)),
        status: status.unwrap_or(302),
    }
}

fn rewrite(
    problems: &mut Problems,
    field: &str,
    typed: &HttpRouteRulesFiltersUrlRewrite,
    only_prefixes: bool,
) -> Rewrite {
    let HttpRouteRulesFiltersUrlRewrite { hostname, path } = typed;
    Rewrite {
        host: host(problems, field, hostname.as_deref()),
        path: path
            .as_ref()
            .and_then(same_shape)
            .and_then(|typed| path_edit(problems, field, &typed, only_prefixes)),
    }
}

fn host(problems: &mut Problems, field: &str, typed: Option<&str>) -> Option<Arc<str>> {
    let text = typed?;
    let name = problems.take(format!("{field}.hostname"), text, HostName::parse(text))?;
    Some(name.as_str().into())
}

fn path_edit(
    problems: &mut Problems,
    field: &str,
    typed: &HttpRouteRulesFiltersRequestRedirectPath,
    only_prefixes: bool,
) -> Option<PathEdit> {
    let field = format!("{field}.path");
    let HttpRouteRulesFiltersRequestRedirectPath {
        replace_full_path,
        replace_prefix_match,
        r#type: _,
    } = typed;
    match (replace_full_path, replace_prefix_match) {
        (Some(full), None) => {
            let field = format!("{field}.replaceFullPath");
            let full = problems.take(field, full, problems::path(full))?;
            Some(PathEdit::ReplaceFull(full.into()))
        }
        (None, Some(prefix)) => {
            let field = format!("{field}.replacePrefixMatch");
            if !only_prefixes {
                let allowed = "every match of the rule must then be a PathPrefix";
                problems.add(&field, prefix, allowed);
            }
            if prefix.is_empty() {
                return Some(PathEdit::ReplacePrefix("".into()));
            }
            let prefix = problems.take(field, prefix, problems::path(prefix))?;
            Some(PathEdit::ReplacePrefix(prefix.into()))
        }
        (both, _) => {
            let value = if both.is_some() { "both" } else { "neither" };
            problems.add(
                field,
                value,
                "give one of replaceFullPath and replacePrefixMatch",
            );
            None
        }
    }
}
