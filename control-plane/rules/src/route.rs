//! HTTP routes: Gateway API's HTTPRoute for mesh, compiled.
//!
//! Matching follows the specification's precedence: the most specific host, then the longest
//! exact or prefix path, then a method match, then the most headers, then the most query
//! parameters, then the older route. [`RouteTable::new`] sorts once, [`RouteTable::find`] takes
//! the first that matches.
//! Source: <https://gateway-api.sigs.k8s.io/reference/spec/#httprouterule>.

use std::{sync::Arc, time::Duration};

use crate::{host::HostPattern, service::ServiceKey, traffic::{Backoff, RetryConditions}};

/// The routes of one Service port, most specific first.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct RouteTable {
    pub routes: Vec<Arc<Route>>,
}

/// One rule with one of its matches.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// `HTTPRoute namespace/name rule 0`, for logs, metrics and `explain`.
    pub name: Arc<str>,
    /// Empty: any host.
    pub hosts: Vec<HostPattern>,
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

/// A header (name in lower case) or query parameter with exactly this value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueMatch {
    pub name: Arc<str>,
    pub value: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filter {
    RequestHeaders(HeaderEdit),
    ResponseHeaders(HeaderEdit),
    Redirect(Redirect),
    Rewrite(Rewrite),
    Mirror { service: ServiceKey, port: u16, percent: u32 },
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
    pub service: ServiceKey,
    pub port: u16,
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
