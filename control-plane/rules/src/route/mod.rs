//! HTTP routes: Gateway API's HTTPRoute for mesh, compiled.
//!
//! Matching follows the specification's precedence: the longest exact or prefix path, then a
//! method match, then the most headers, then the most query parameters, then the older route. Hosts
//! say nothing: a call inside the mesh is for the Service that it was addressed to, whatever name it
//! bears. [`RouteTable::new`] sorts once, [`RouteTable::find`] takes the first that matches.
//! Source: <https://gateway-api.sigs.k8s.io/reference/spec/#httprouterule>,
//! <https://gateway-api.sigs.k8s.io/geps/gep-1294/>.

mod apply;

use std::{cmp::Reverse, sync::Arc, time::Duration};

use http::HeaderMap;

use crate::{
    service::ServiceKey,
    traffic::{Backoff, RetryConditions},
};

pub use apply::RedirectFrom;

/// The routes of one Service port, most specific first.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct RouteTable {
    pub routes: Vec<Arc<Route>>,
}

/// What of a request decides its route; nothing is copied.
#[derive(Clone, Copy, Debug)]
pub struct RequestView<'a> {
    pub method: &'a str,
    /// In the normal form of [`crate::path`].
    pub path: &'a str,
    pub headers: &'a HeaderMap,
    /// Without `?`.
    pub query: Option<&'a str>,
}

impl RouteTable {
    /// Sorts by precedence; among equals the order given stays, so the older route goes first.
    pub fn new(mut routes: Vec<Arc<Route>>) -> Self {
        routes.sort_by_cached_key(|route| {
            let m = &route.matches;
            let path = match &m.path {
                PathMatch::Exact(path) => (true, path.len()),
                PathMatch::Prefix(path) => (false, path.len()),
            };
            Reverse((path, m.method.is_some(), m.headers.len(), m.query.len()))
        });
        Self { routes }
    }

    /// The most specific route that matches.
    pub fn find(&self, request: &RequestView<'_>) -> Option<&Arc<Route>> {
        let matches = |route: &&Arc<Route>| route.matches.matches(request);
        self.routes.iter().find(matches)
    }
}

impl Route {
    /// The backend for a random number, evenly spread over all of `u32`, in proportion to the
    /// weights. `None`: there is none with a weight, answer 500.
    pub fn pick(&self, random: u32) -> Option<&Backend> {
        let total: u64 = self.backends.iter().map(|b| u64::from(b.weight)).sum();
        let mut point = (u128::from(random) * u128::from(total)) >> 32;
        self.backends.iter().find(|backend| {
            let weight = u128::from(backend.weight);
            let here = point < weight;
            point = point.saturating_sub(weight);
            here
        })
    }
}

/// One rule with one of its matches.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// `HTTPRoute namespace/name rule 0`, for logs, metrics and `explain`.
    pub name: Arc<str>,
    pub matches: RouteMatch,
    pub filters: Vec<Filter>,
    /// Empty or all of weight 0: answered 500, as Gateway API asks.
    pub backends: Vec<Backend>,
    pub timeouts: RouteTimeouts,
    pub retry: Option<RouteRetry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct RouteMatch {
    pub path: PathMatch,
    /// Upper case; `None`: any.
    pub method: Option<Arc<str>>,
    pub headers: Vec<ValueMatch>,
    pub query: Vec<ValueMatch>,
}

impl RouteMatch {
    /// The cheapest to check goes first.
    pub fn matches(&self, request: &RequestView<'_>) -> bool {
        self.path.matches(request.path)
            && self
                .method
                .as_deref()
                .is_none_or(|method| method == request.method)
            && self
                .headers
                .iter()
                .all(|m| m.matches_header(request.headers))
            && self
                .query
                .iter()
                .all(|m| m.matches_query(request.query.unwrap_or_default()))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathMatch {
    Exact(Arc<str>),
    /// By whole elements: `/v1` matches `/v1` and `/v1/x`, not `/v10`. Without a trailing slash.
    Prefix(Arc<str>),
}

impl Default for PathMatch {
    fn default() -> Self {
        Self::Prefix("/".into())
    }
}

impl PathMatch {
    /// A prefix typed with a trailing slash means the same as one without.
    pub fn prefix(path: &str) -> Self {
        let trimmed = path.trim_end_matches('/');
        Self::Prefix(if trimmed.is_empty() { "/" } else { trimmed }.into())
    }

    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *path,
            Self::Prefix(prefix) if &**prefix == "/" => path.starts_with('/'),
            Self::Prefix(prefix) => path
                .strip_prefix(&**prefix)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
        }
    }
}

/// A header (name in lower case) or query parameter with exactly this value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueMatch {
    pub name: Arc<str>,
    pub value: Arc<str>,
}

impl ValueMatch {
    /// Lines of one header count as one value joined by commas (RFC 9110 §5.3).
    fn matches_header(&self, headers: &HeaderMap) -> bool {
        let mut lines = headers.get_all(&*self.name).iter();
        let Some(first) = lines.next() else {
            return false;
        };
        let Some(mut rest) = self.value.as_bytes().strip_prefix(first.as_bytes()) else {
            return false;
        };
        for line in lines {
            let after_comma = rest
                .strip_prefix(b",")
                .map(|r| r.strip_prefix(b" ").unwrap_or(r));
            match after_comma.and_then(|r| r.strip_prefix(line.as_bytes())) {
                Some(r) => rest = r,
                None => return false,
            }
        }
        rest.is_empty()
    }

    /// The first parameter of that name counts.
    fn matches_query(&self, query: &str) -> bool {
        form_urlencoded::parse(query.as_bytes())
            .find(|(name, _)| *name == *self.name)
            .is_some_and(|(_, value)| *value == *self.value)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filter {
    RequestHeaders(HeaderEdit),
    ResponseHeaders(HeaderEdit),
    Redirect(Redirect),
    Rewrite(Rewrite),
    Mirror {
        service: ServiceKey,
        port: u16,
        /// Of a million requests, how many are copied.
        per_million: u32,
    },
}

/// Applied in this order: set, add, remove. Names in lower case.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HeaderEdit {
    pub set: Vec<(Arc<str>, Arc<str>)>,
    pub add: Vec<(Arc<str>, Arc<str>)>,
    pub remove: Vec<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    pub scheme: Option<Arc<str>>,
    pub host: Option<Arc<str>>,
    pub port: Option<u16>,
    pub path: Option<PathEdit>,
    pub status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    pub host: Option<Arc<str>>,
    pub path: Option<PathEdit>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathEdit {
    ReplaceFull(Arc<str>),
    /// Replaces what the route's prefix matched.
    ReplacePrefix(Arc<str>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// `None`: it names something that is no Service. Its share is answered 500, as that of a
    /// Service which does not exist.
    pub to: Option<(ServiceKey, u16)>,
    pub weight: u32,
    pub filters: Vec<Filter>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RouteTimeouts {
    /// Whole request. `Some(ZERO)` switches the Service's own off.
    pub request: Option<Duration>,
    /// One try.
    pub backend_request: Option<Duration>,
}

/// A route's own retries, in place of the Service's.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteRetry {
    pub attempts: u32,
    pub conditions: RetryConditions,
    pub backoff: Option<Backoff>,
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn route(name: &str, path: PathMatch) -> Route {
        Route {
            name: name.into(),
            matches: RouteMatch {
                path,
                ..RouteMatch::default()
            },
            filters: Vec::new(),
            backends: Vec::new(),
            timeouts: RouteTimeouts::default(),
            retry: None,
        }
    }

    fn value(name: &str, value: &str) -> ValueMatch {
        ValueMatch {
            name: name.into(),
            value: value.into(),
        }
    }

    fn found(table: &RouteTable, method: &str, path: &str, headers: &[(&str, &str)]) -> String {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(
                name.parse::<HeaderName>().unwrap(),
                HeaderValue::from_str(value).unwrap(),
            );
        }
        let (path, query) = path
            .split_once('?')
            .map_or((path, None), |(p, q)| (p, Some(q)));
        let view = RequestView {
            method,
            path,
            headers: &map,
            query,
        };
        table
            .find(&view)
            .map_or("none".to_owned(), |r| r.name.to_string())
    }

    #[test]
    fn the_most_specific_route_wins_in_any_order() {
        let mut method = route("method", PathMatch::prefix("/v1"));
        method.matches.method = Some("POST".into());
        let mut header = route("header", PathMatch::prefix("/v1"));
        header.matches.headers = vec![value("x-canary", "yes")];
        let mut two_headers = route("two headers", PathMatch::prefix("/v1"));
        two_headers.matches.headers = vec![value("x-canary", "yes"), value("x-user", "a")];
        let mut query = route("query", PathMatch::prefix("/v1"));
        query.matches.query = vec![value("v", "a b")];
        let mut routes: Vec<Arc<Route>> = [
            route("root", PathMatch::default()),
            route("v1", PathMatch::prefix("/v1/")),
            route("v1 again", PathMatch::prefix("/v1")),
            route("longer", PathMatch::prefix("/v1/things")),
            route("exact", PathMatch::Exact("/v1".into())),
            method,
            header,
            two_headers,
            query,
        ]
        .map(Arc::new)
        .into();
        for _ in 0..routes.len() {
            let table = RouteTable::new(routes.clone());
            let canary = ("x-canary", "yes");
            for (method, path, headers, expected) in [
                ("GET", "/", &[][..], "root"),
                ("GET", "/v10", &[], "root"),
                ("GET", "/v1", &[], "exact"),
                ("POST", "/v1", &[], "exact"),
                ("POST", "/v1/x", &[canary], "method"),
                ("GET", "/v1/x", &[canary], "header"),
                ("GET", "/v1/x", &[canary, ("X-User", "a")], "two headers"),
                ("GET", "/v1/x", &[canary, canary], "v1"),
                ("GET", "/v1/things", &[], "longer"),
                ("GET", "/v1/things/1", &[], "longer"),
                ("GET", "/v1/x?v=a+b", &[], "query"),
                ("GET", "/v1/x?v=a%20b", &[], "query"),
                ("GET", "/v1/x?v=c&v=a+b", &[], "v1"),
                ("OPTIONS", "*", &[], "none"),
            ] {
                let name = found(&table, method, path, headers);
                let name = if name == "v1 again" {
                    "v1".to_owned()
                } else {
                    name
                };
                assert_eq!(name, expected, "{method} {path} {headers:?}");
            }
            routes.rotate_left(1);
        }
    }

    #[test]
    fn among_equals_the_first_given_wins() {
        let table = RouteTable::new(vec![
            Arc::new(route("older", PathMatch::prefix("/a"))),
            Arc::new(route("younger", PathMatch::prefix("/a/"))),
        ]);
        assert_eq!(found(&table, "GET", "/a", &[]), "older");
    }

    #[test]
    fn repeated_header_lines_are_one_value() {
        let mut headers = HeaderMap::new();
        headers.append("a", HeaderValue::from_static("1"));
        headers.append("a", HeaderValue::from_static("2"));
        for (text, hit) in [
            ("1,2", true),
            ("1, 2", true),
            ("1", false),
            ("2", false),
            ("1,2,", false),
        ] {
            assert_eq!(value("a", text).matches_header(&headers), hit, "{text}");
        }
    }

    #[test]
    fn weights_divide_the_random_numbers() {
        let backend = |name: &str, weight| Backend {
            to: Some((ServiceKey::new("c", "ns", name), 80)),
            weight,
            filters: Vec::new(),
        };
        fn picked(route: &Route, random: u32) -> &str {
            let (service, _) = route.pick(random).unwrap().to.as_ref().unwrap();
            &service.name
        }
        let mut route = route("r", PathMatch::default());
        assert!(route.pick(7).is_none());
        route.backends = vec![backend("none", 0)];
        assert!(route.pick(u32::MAX).is_none());
        route.backends = vec![backend("a", 1), backend("none", 0), backend("b", 3)];
        let share = (0..1000u32)
            .filter(|n| picked(&route, n * (u32::MAX / 1000)) == "a")
            .count();
        assert!((249..=251).contains(&share), "{share}");
        assert_eq!(picked(&route, u32::MAX), "b");
        route.backends = vec![backend("a", u32::MAX), backend("b", u32::MAX)];
        assert_eq!(picked(&route, 0), "a");
        assert_eq!(picked(&route, u32::MAX), "b");
    }
}
