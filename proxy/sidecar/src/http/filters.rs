//! What a route does to requests and responses: header edits, rewrites, redirects.

use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri, header, request::Parts};
use turnpike_rules::route::{Filter, PathEdit, Redirect, RedirectFrom, Rewrite, Route};

use super::{body::ResponseBody, headers};
use crate::error::ProxyError;

/// The answer, where a filter of `route` is a redirect.
pub(crate) fn redirected(
    route: &Route,
    uri: &Uri,
    path: &str,
    host: &str,
    port: u16,
) -> Option<Response<ResponseBody>> {
    let redirect = route.filters.iter().find_map(|filter| match filter {
        Filter::Redirect(redirect) => Some(redirect),
        _ => None,
    })?;
    let from = RedirectFrom {
        scheme: "http",
        host,
        port,
        path,
        query: uri.query(),
    };
    Some(redirect_response(redirect, route, &from))
}

fn redirect_response(
    redirect: &Redirect,
    route: &Route,
    from: &RedirectFrom<'_>,
) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::empty());
    *response.status_mut() = StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::FOUND);
    let location = redirect.location(&route.matches.path, from);
    if let Ok(location) = HeaderValue::try_from(location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// Applies what concerns the request.
pub(crate) fn on_request(
    filters: &[Filter],
    route: &Route,
    parts: &mut Parts,
) -> Result<(), ProxyError> {
    for filter in filters {
        match filter {
            Filter::RequestHeaders(edit) => edit.apply(&mut parts.headers),
            Filter::Rewrite(rewrite) => apply_rewrite(rewrite, route, parts)?,
            Filter::ResponseHeaders(_) | Filter::Redirect(_) => {}
            // Copies are made when the request is on its way: `mirror`.
            Filter::Mirror { .. } => {}
        }
    }
    Ok(())
}

fn apply_rewrite(rewrite: &Rewrite, route: &Route, parts: &mut Parts) -> Result<(), ProxyError> {
    let Rewrite { host, path } = rewrite;
    if let Some(edit) = path
        && parts.method != Method::CONNECT
    {
        let new = new_path(edit, route, parts.uri.path());
        headers::set_path(&mut parts.uri, &new)?;
    }
    if let Some(host) = host {
        headers::set_host(parts, host)?;
    }
    Ok(())
}

fn new_path(edit: &PathEdit, route: &Route, path: &str) -> String {
    edit.apply(&route.matches.path, path).into_owned()
}

/// Applies what concerns the response.
pub(crate) fn on_response(filters: &[Filter], response: &mut HeaderMap) {
    for filter in filters {
        if let Filter::ResponseHeaders(edit) = filter {
            edit.apply(response);
        }
    }
}
