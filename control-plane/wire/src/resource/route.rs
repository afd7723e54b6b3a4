//! Routes.

use std::{sync::Arc, time::Duration};

use turnpike_rules::route::{
    Backend, Filter, HeaderEdit, PathEdit, PathMatch, Redirect, Rewrite, Route, RouteMatch,
    RouteRetry, RouteTimeouts, ValueMatch,
};

use super::{
    field::{
        FieldError, Read, bad, each, header_name, header_value, key, messages, method, millis,
        optional, port, required, strings, text, within,
    },
    traffic::{backoff, conditions},
};
use crate::mesh as pb;

pub(super) fn route(message: pb::Route) -> Read<Route> {
    let pb::Route {
        name,
        path,
        method: verb,
        headers,
        query,
        filters,
        backends,
        request_timeout_ms,
        backend_timeout_ms,
        retry,
    } = message;
    Ok(Route {
        name: text("name", name)?,
        matches: RouteMatch {
            path: optional("path", path, path_match)?.unwrap_or_default(),
            method: optional("method", (!verb.is_empty()).then_some(verb), |verb| {
                method(&verb)
            })?,
            headers: each("headers", headers, header_match)?,
            query: each("query", query, query_match)?,
        },
        filters: each("filters", filters, filter)?,
        backends: each("backends", backends, backend)?,
        timeouts: RouteTimeouts {
            request: request_timeout_ms.map(Duration::from_millis),
            backend_request: backend_timeout_ms.map(Duration::from_millis),
        },
        retry: optional("retry", retry, self::retry)?,
    })
}

pub(super) fn path_match(message: pb::PathMatch) -> Read<PathMatch> {
    use pb::path_match::Kind;
    match message.kind {
        Some(Kind::Exact(path)) if path.starts_with('/') => Ok(PathMatch::Exact(path.into())),
        Some(Kind::Prefix(path)) if path == "/" || is_prefix(&path) => {
            Ok(PathMatch::Prefix(path.into()))
        }
        Some(Kind::Exact(path)) => bad(format!("`{path}` does not begin with `/`")),
        Some(Kind::Prefix(path)) => bad(format!(
            "`{path}` must begin with `/` and, unless it is `/`, not end with it"
        )),
        None => bad("this kind of path match is not known"),
    }
}

fn is_prefix(path: &str) -> bool {
    path.starts_with('/') && !path.ends_with('/')
}

fn header_match(pair: pb::Pair) -> Read<ValueMatch> {
    let name = within("name", header_name(&pair.name))?;
    Ok(ValueMatch {
        name,
        value: pair.value.into(),
    })
}

fn query_match(pair: pb::Pair) -> Read<ValueMatch> {
    Ok(ValueMatch {
        name: text("name", pair.name)?,
        value: pair.value.into(),
    })
}

fn filter(message: pb::Filter) -> Read<Filter> {
    use pb::filter::Kind;
    Ok(match message.kind {
        Some(Kind::RequestHeaders(edit)) => {
            Filter::RequestHeaders(within("request_headers", header_edit(edit))?)
        }
        Some(Kind::ResponseHeaders(edit)) => {
            Filter::ResponseHeaders(within("response_headers", header_edit(edit))?)
        }
        Some(Kind::Redirect(redirect)) => {
            Filter::Redirect(within("redirect", self::redirect(redirect))?)
        }
        Some(Kind::Rewrite(rewrite)) => Filter::Rewrite(within("rewrite", self::rewrite(rewrite))?),
        Some(Kind::Mirror(mirror)) => within("mirror", self::mirror(mirror))?,
        None => return bad("this kind of filter is not known, and a route without it is another"),
    })
}

fn header_edit(message: pb::HeaderEdit) -> Read<HeaderEdit> {
    let pair = |pair: pb::Pair| {
        let name = within("name", header_name(&pair.name))?;
        Ok((name, within("value", header_value(&pair.value))?))
    };
    Ok(HeaderEdit {
        set: each("set", message.set, pair)?,
        add: each("add", message.add, pair)?,
        remove: each("remove", message.remove, |name| header_name(&name))?,
    })
}

fn redirect(message: pb::Redirect) -> Read<Redirect> {
    let pb::Redirect {
        scheme,
        host,
        port: to_port,
        path,
        status,
    } = message;
    let status = match status {
        301 | 302 | 303 | 307 | 308 => status.try_into().unwrap_or(302),
        _ => {
            return Err(FieldError::new(
                "status",
                format!("{status} is no redirect"),
            ));
        }
    };
    Ok(Redirect {
        scheme: optional("scheme", scheme, |scheme| match scheme.as_str() {
            "http" | "https" => Ok(scheme.into()),
            _ => bad(format!("`{scheme}` is neither http nor https")),
        })?,
        host: optional("host", host, |host| text("", host))?,
        port: optional("port", to_port, port)?,
        path: optional("path", path, path_edit)?,
        status,
    })
}

fn rewrite(message: pb::Rewrite) -> Read<Rewrite> {
    Ok(Rewrite {
        host: optional("host", message.host, |host| text("", host))?,
        path: optional("path", message.path, path_edit)?,
    })
}

fn path_edit(message: pb::PathEdit) -> Read<PathEdit> {
    use pb::path_edit::Kind;
    match message.kind {
        Some(Kind::ReplaceFull(path)) => Ok(PathEdit::ReplaceFull(path.into())),
        Some(Kind::ReplacePrefix(path)) => Ok(PathEdit::ReplacePrefix(path.into())),
        None => bad("this kind of path edit is not known"),
    }
}

fn mirror(message: pb::Mirror) -> Read<Filter> {
    let pb::Mirror {
        service,
        port: to_port,
        percent,
        per_million,
    } = message;
    // An older controller counts in percent.
    let per_million = per_million.unwrap_or(percent.saturating_mul(10_000));
    if per_million > 1_000_000 {
        return Err(FieldError::new(
            "per_million",
            format!("{per_million} is more than a million"),
        ));
    }
    Ok(Filter::Mirror {
        service: required("service", service, key)?,
        port: within("port", port(to_port))?,
        per_million,
    })
}

fn backend(message: pb::Backend) -> Read<Backend> {
    let pb::Backend {
        service,
        port: to_port,
        weight,
        filters,
    } = message;
    Ok(Backend {
        to: match optional("service", service, key)? {
            Some(service) => Some((service, within("port", port(to_port))?)),
            None => None,
        },
        weight,
        filters: each("filters", filters, filter)?,
    })
}

fn retry(message: pb::RouteRetry) -> Read<RouteRetry> {
    Ok(RouteRetry {
        attempts: message.attempts,
        conditions: optional("conditions", message.conditions, conditions)?.unwrap_or_default(),
        backoff: optional("backoff", message.backoff, backoff)?,
    })
}

impl From<&Arc<Route>> for pb::Route {
    fn from(route: &Arc<Route>) -> Self {
        let Route {
            name,
            matches,
            filters,
            backends,
            timeouts,
            retry,
        } = &**route;
        let RouteMatch {
            path,
            method,
            headers,
            query,
        } = matches;
        Self {
            name: name.to_string(),
            path: Some(path.into()),
            method: method.as_deref().unwrap_or_default().to_owned(),
            headers: headers.iter().map(|m| pair(&m.name, &m.value)).collect(),
            query: query.iter().map(|m| pair(&m.name, &m.value)).collect(),
            filters: messages(filters),
            backends: messages(backends),
            request_timeout_ms: timeouts.request.map(millis),
            backend_timeout_ms: timeouts.backend_request.map(millis),
            retry: retry.as_ref().map(Into::into),
        }
    }
}

impl From<&PathMatch> for pb::PathMatch {
    fn from(path: &PathMatch) -> Self {
        use pb::path_match::Kind;
        let kind = match path {
            PathMatch::Exact(path) => Kind::Exact(path.to_string()),
            PathMatch::Prefix(path) => Kind::Prefix(path.to_string()),
        };
        Self { kind: Some(kind) }
    }
}

impl From<&Filter> for pb::Filter {
    fn from(filter: &Filter) -> Self {
        use pb::filter::Kind;
        let kind = match filter {
            Filter::RequestHeaders(edit) => Kind::RequestHeaders(edit.into()),
            Filter::ResponseHeaders(edit) => Kind::ResponseHeaders(edit.into()),
            Filter::Redirect(Redirect {
                scheme,
                host,
                port,
                path,
                status,
            }) => Kind::Redirect(pb::Redirect {
                scheme: scheme.as_deref().map(str::to_owned),
                host: host.as_deref().map(str::to_owned),
                port: port.map(Into::into),
                path: path.as_ref().map(Into::into),
                status: (*status).into(),
            }),
            Filter::Rewrite(Rewrite { host, path }) => Kind::Rewrite(pb::Rewrite {
                host: host.as_deref().map(str::to_owned),
                path: path.as_ref().map(Into::into),
            }),
            Filter::Mirror {
                service,
                port,
                per_million,
            } => Kind::Mirror(pb::Mirror {
                service: Some(service.into()),
                port: (*port).into(),
                percent: *per_million / 10_000,
                per_million: Some(*per_million),
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl From<&HeaderEdit> for pb::HeaderEdit {
    fn from(edit: &HeaderEdit) -> Self {
        let HeaderEdit { set, add, remove } = edit;
        Self {
            set: set.iter().map(|(name, value)| pair(name, value)).collect(),
            add: add.iter().map(|(name, value)| pair(name, value)).collect(),
            remove: strings(remove),
        }
    }
}

impl From<&PathEdit> for pb::PathEdit {
    fn from(edit: &PathEdit) -> Self {
        use pb::path_edit::Kind;
        let kind = match edit {
            PathEdit::ReplaceFull(path) => Kind::ReplaceFull(path.to_string()),
            PathEdit::ReplacePrefix(path) => Kind::ReplacePrefix(path.to_string()),
        };
        Self { kind: Some(kind) }
    }
}

impl From<&Backend> for pb::Backend {
    fn from(backend: &Backend) -> Self {
        let Backend {
            to,
            weight,
            filters,
        } = backend;
        Self {
            service: to.as_ref().map(|(service, _)| service.into()),
            port: to.as_ref().map_or(0, |(_, port)| (*port).into()),
            weight: *weight,
            filters: messages(filters),
        }
    }
}

impl From<&RouteRetry> for pb::RouteRetry {
    fn from(retry: &RouteRetry) -> Self {
        let RouteRetry {
            attempts,
            conditions,
            backoff,
        } = retry;
        Self {
            attempts: *attempts,
            conditions: Some(conditions.into()),
            backoff: backoff.as_ref().map(Into::into),
        }
    }
}

fn pair(name: &str, value: &str) -> pb::Pair {
    pb::Pair {
        name: name.to_owned(),
        value: value.to_owned(),
    }
}
