//! HTTPRoute, for Services.
//!
//! A rule with several matches becomes as many routes. What is not supported refuses the route
//! whole: half of a route could send requests where its author never meant them to go.

mod filters;
mod matches;

use std::{cell::RefCell, sync::Arc, time::Duration};

use gateway_api::experimental::httproutes::{
    HttpRoute, HttpRouteParentRefs, HttpRouteRules, HttpRouteRulesBackendRefs, HttpRouteRulesRetry,
    HttpRouteRulesTimeouts,
};
use turnpike_rules::{
    ServiceKey,
    host::HostPattern,
    route::{Backend, Route, RouteRetry, RouteTimeouts},
    traffic::{Backoff, RetryConditions},
};

use super::{Invalid, egress::qualified, problems::Problems};

/// The routes of one HTTPRoute, and the Services they are attached to.
#[derive(Clone, Debug, PartialEq)]
pub struct Routes {
    /// Empty: it is for gateways only, and none of ours.
    pub parents: Vec<Parent>,
    pub routes: Vec<Arc<Route>>,
    /// Whether it has `hostnames`. They are for gateways: as Gateway API asks, nothing follows from
    /// them for calls inside the mesh, which are for the Service that they are addressed to.
    pub names_hosts: bool,
    /// Where it names backends that are no Services, and what they are:
    /// `spec.rules[0].backendRefs[1]: Bucket.x.dev logs`. Their share of the requests is answered 500.
    pub unknown: Vec<String>,
}

/// A Service to which a route is attached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Parent {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// `None`: every port.
    pub port: Option<u16>,
    /// The Service port's name.
    pub section: Option<Arc<str>>,
    /// Set where the route is not in the Service's namespace: it then holds for callers of its own
    /// namespace alone.
    pub consumer: Option<Arc<str>>,
}

/// `cluster` is the one whose Services the route names.
pub fn http_route(object: &HttpRoute, cluster: &str) -> Result<Routes, Invalid> {
    let spec = &object.spec;
    let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
    let mut problems = Problems::default();
    let parents = parents(
        &mut problems,
        spec.parent_refs.as_deref().unwrap_or_default(),
        namespace,
    );
    if parents.is_empty() {
        return problems.finish(Routes {
            parents,
            routes: Vec::new(),
            names_hosts: false,
            unknown: Vec::new(),
        });
    }
    let hostnames = spec.hostnames.as_deref().unwrap_or_default();
    for (i, text) in hostnames.iter().enumerate() {
        let field = format!("spec.hostnames[{i}]");
        problems.take(field, text, HostPattern::parse(text));
    }
    let context = Context {
        cluster,
        namespace,
        unknown: RefCell::default(),
    };
    let mut routes = Vec::new();
    for (i, typed) in spec.rules.iter().flatten().enumerate() {
        let field = format!("spec.rules[{i}]");
        let shared = rule(&mut problems, &context, &field, typed);
        for matches in matches::all(&mut problems, &field, typed) {
            routes.push(Arc::new(Route {
                name: format!("HTTPRoute {} rule {i}", qualified(&object.metadata)).into(),
                matches,
                ..shared.clone()
            }));
        }
    }
    problems.finish(Routes {
        parents,
        routes,
        names_hosts: !hostnames.is_empty(),
        unknown: context.unknown.into_inner(),
    })
}

/// What the parts of a route need to know of it.
struct Context<'a> {
    cluster: &'a str,
    namespace: &'a str,
    /// As in [`Routes`], while they are found.
    unknown: RefCell<Vec<String>>,
}

fn parents(problems: &mut Problems, typed: &[HttpRouteParentRefs], namespace: &str) -> Vec<Parent> {
    let mut parents = Vec::new();
    for (i, parent) in typed.iter().enumerate() {
        let field = format!("spec.parentRefs[{i}]");
        let HttpRouteParentRefs {
            group,
            kind,
            name,
            namespace: typed,
            port,
            section_name,
        } = parent;
        let group = group.as_deref().unwrap_or("gateway.networking.k8s.io");
        let kind = kind.as_deref().unwrap_or("Gateway");
        match (group, kind) {
            ("" | "core", "Service") => {}
            ("gateway.networking.k8s.io", _) => continue,
            _ => {
                let allowed = "allowed is group \"\", kind Service";
                problems.add(format!("{field}.kind"), format!("{group}/{kind}"), allowed);
                continue;
            }
        }
        let of_service = typed.as_deref().unwrap_or(namespace);
        parents.push(Parent {
            namespace: of_service.into(),
            name: name.as_str().into(),
            port: port.and_then(|port| self::port(problems, &format!("{field}.port"), port)),
            section: section_name.as_deref().map(Into::into),
            consumer: (of_service != namespace).then(|| namespace.into()),
        });
    }
    parents
}

/// All of a rule but its matches.
fn rule(
    problems: &mut Problems,
    context: &Context<'_>,
    field: &str,
    typed: &HttpRouteRules,
) -> Route {
    let HttpRouteRules {
        backend_refs,
        filters: typed_filters,
        matches: _,
        name: _,
        retry,
        session_persistence,
        timeouts,
    } = typed;
    if session_persistence.is_some() {
        let field = format!("{field}.sessionPersistence");
        problems.add(field, "set", "session persistence is not supported");
    }
    let only_prefixes = matches::only_prefixes(typed);
    let filters = filters::all(
        problems,
        context,
        &format!("{field}.filters"),
        typed_filters.as_deref().unwrap_or_default(),
        only_prefixes,
    );
    let backends = backend_refs
        .iter()
        .flatten()
        .enumerate()
        .filter_map(|(i, typed)| {
            backend(
                problems,
                context,
                &format!("{field}.backendRefs[{i}]"),
                typed,
                only_prefixes,
            )
        });
    let backends: Vec<Backend> = backends.collect();
    if filters::redirects(&filters) && !backends.is_empty() {
        let allowed = "a rule that redirects has no backends";
        problems.add(format!("{field}.backendRefs"), backends.len(), allowed);
    }
    Route {
        name: "".into(),
        matches: turnpike_rules::route::RouteMatch::default(),
        filters,
        backends,
        timeouts: self::timeouts(problems, &format!("{field}.timeouts"), timeouts.as_ref()),
        retry: retry
            .as_ref()
            .map(|typed| self::retry(problems, &format!("{field}.retry"), typed)),
    }
}

fn backend(
    problems: &mut Problems,
    context: &Context<'_>,
    field: &str,
    typed: &HttpRouteRulesBackendRefs,
    only_prefixes: bool,
) -> Option<Backend> {
    let HttpRouteRulesBackendRefs {
        filters: typed_filters,
        group,
        kind,
        name,
        namespace,
        port,
        weight,
    } = typed;
    let to = context.target(
        problems,
        field,
        BackendRef {
            group: group.as_deref(),
            kind: kind.as_deref(),
            namespace: namespace.as_deref(),
            name,
            port: *port,
        },
    )?;
    let weight = u32::try_from(weight.unwrap_or(1))
        .ok()
        .filter(|weight| *weight <= 1_000_000)
        .ok_or("allowed are 0 to 1000000");
    let weight = problems.take(format!("{field}.weight"), typed.weight.unwrap_or(1), weight)?;
    let typed_filters = filters::of_backend(typed_filters.as_deref().unwrap_or_default());
    let field = format!("{field}.filters");
    let filters = filters::all(problems, context, &field, &typed_filters, only_prefixes);
    if filters::redirects(&filters) {
        problems.add(
            field,
            "RequestRedirect",
            "a backend cannot redirect; the rule can",
        );
    }
    Some(Backend {
        to,
        weight,
        filters,
    })
}

/// Where requests are sent or mirrored to, as typed.
struct BackendRef<'a> {
    group: Option<&'a str>,
    kind: Option<&'a str>,
    namespace: Option<&'a str>,
    name: &'a str,
    port: Option<i32>,
}

impl Context<'_> {
    /// The Service and its port; the inner `None` where it is none of our kinds. It may be of any
    /// namespace: who calls it says who may, not who routes to it.
    fn target(
        &self,
        problems: &mut Problems,
        field: &str,
        typed: BackendRef<'_>,
    ) -> Option<Option<(ServiceKey, u16)>> {
        let BackendRef {
            group,
            kind,
            namespace,
            name,
            port,
        } = typed;
        let (group, kind) = (group.unwrap_or_default(), kind.unwrap_or("Service"));
        if !matches!((group, kind), ("" | "core", "Service")) {
            let kind = [kind, group].join(if group.is_empty() { "" } else { "." });
            let what = format!("{field}: {kind} {name}");
            self.unknown.borrow_mut().push(what);
            return Some(None);
        }
        let Some(port) = port else {
            problems.add(format!("{field}.port"), "", "name the Service's port");
            return None;
        };
        let port = self::port(problems, &format!("{field}.port"), port)?;
        let namespace = namespace.unwrap_or(self.namespace);
        Some(Some((ServiceKey::new(self.cluster, namespace, name), port)))
    }
}

fn port(problems: &mut Problems, field: &str, typed: i32) -> Option<u16> {
    let valid = u16::try_from(typed).ok().filter(|port| *port != 0);
    problems.take(
        field,
        typed,
        valid.ok_or("allowed are ports from 1 to 65535"),
    )
}

fn timeouts(
    problems: &mut Problems,
    field: &str,
    typed: Option<&HttpRouteRulesTimeouts>,
) -> RouteTimeouts {
    let Some(HttpRouteRulesTimeouts {
        backend_request,
        request,
    }) = typed
    else {
        return RouteTimeouts::default();
    };
    let valid = RouteTimeouts {
        request: request
            .as_ref()
            .and_then(|text| duration(problems, &format!("{field}.request"), text)),
        backend_request: backend_request
            .as_ref()
            .and_then(|text| duration(problems, &format!("{field}.backendRequest"), text)),
    };
    if let (Some(whole), Some(one)) = (valid.request, valid.backend_request)
        && !whole.is_zero()
        && one > whole
    {
        let allowed = format!("one try may not take longer than the whole request, {whole:?}");
        problems.add(
            format!("{field}.backendRequest"),
            format!("{one:?}"),
            allowed,
        );
    }
    valid
}

/// With `retry` set, Gateway API also asks for a retry where the connection failed.
fn retry(problems: &mut Problems, field: &str, typed: &HttpRouteRulesRetry) -> RouteRetry {
    let HttpRouteRulesRetry {
        attempts,
        backoff,
        codes,
    } = typed;
    let allowed_attempts = u32::try_from(attempts.unwrap_or(2))
        .ok()
        .filter(|n| *n <= 10);
    let attempts = problems.take(
        format!("{field}.attempts"),
        attempts.unwrap_or(2),
        allowed_attempts.ok_or("allowed are 0 to 10"),
    );
    let codes = codes.iter().flatten().enumerate().filter_map(|(i, code)| {
        let valid = u16::try_from(*code)
            .ok()
            .filter(|code| (400..=599).contains(code));
        let valid = valid.ok_or("allowed are response statuses from 400 to 599");
        problems.take(format!("{field}.codes[{i}]"), code, valid)
    });
    let statuses = codes.collect();
    let base = backoff
        .as_ref()
        .and_then(|text| duration(problems, &format!("{field}.backoff"), text));
    RouteRetry {
        attempts: attempts.unwrap_or_default(),
        conditions: RetryConditions {
            statuses,
            reset: true,
            ..RetryConditions::default()
        },
        backoff: base.map(|base| Backoff {
            base,
            max: base * 10,
        }),
    }
}

fn duration(problems: &mut Problems, field: &str, text: &str) -> Option<Duration> {
    problems
        .take(field, text, text.parse::<crate::Duration>())
        .map(crate::Duration::std)
}

#[cfg(test)]
mod tests;
