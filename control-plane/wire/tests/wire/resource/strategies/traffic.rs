//! Routes, and how what they lead to is called.

use std::{sync::Arc, time::Duration};

use proptest::{collection::vec, option, prelude::*};
use turnpike_rules::{
    host::HostPattern,
    route::{
        Backend, Filter, HeaderEdit, PathEdit, PathMatch, Redirect, Rewrite, Route, RouteMatch,
        RouteRetry, RouteTimeouts, ValueMatch,
    },
    traffic::{
        Backoff, CircuitBreaker, OutlierEjection, Retry, RetryBudget, RetryConditions, Timeouts,
        TrafficPolicy,
    },
};

use super::{any_text, key, ms, port, text};

pub(super) fn host() -> impl Strategy<Value = HostPattern> {
    "(\\*\\.)?[a-z]{1,5}\\.[a-z]{2,4}".prop_map(|text| HostPattern::parse(&text).unwrap())
}

pub(super) fn header() -> impl Strategy<Value = Arc<str>> {
    "[a-z][a-z0-9-]{0,8}".prop_map(Into::into)
}

pub(super) fn header_value() -> impl Strategy<Value = Arc<str>> {
    "[ -~]{0,8}".prop_map(Into::into)
}

pub(super) fn method() -> impl Strategy<Value = Arc<str>> {
    "[A-Z]{1,7}".prop_map(Into::into)
}

pub(super) fn path_match() -> impl Strategy<Value = PathMatch> {
    prop_oneof![
        "/[a-z/]{0,8}".prop_map(|path| PathMatch::Exact(path.into())),
        "/[a-z]{1,4}(/[a-z]{1,3})?".prop_map(|path| PathMatch::Prefix(path.into())),
        Just(PathMatch::default()),
    ]
}

pub(super) fn value_match() -> impl Strategy<Value = ValueMatch> {
    (header(), any_text()).prop_map(|(name, value)| ValueMatch { name, value })
}

pub(super) fn header_edit() -> impl Strategy<Value = HeaderEdit> {
    let pairs = || vec((header(), header_value()), 0..3);
    (pairs(), pairs(), vec(header(), 0..3)).prop_map(|(set, add, remove)| HeaderEdit {
        set,
        add,
        remove,
    })
}

pub(super) fn path_edit() -> impl Strategy<Value = PathEdit> {
    prop_oneof![
        any_text().prop_map(PathEdit::ReplaceFull),
        any_text().prop_map(PathEdit::ReplacePrefix)
    ]
}

pub(super) fn filter() -> impl Strategy<Value = Filter> {
    let scheme = prop_oneof![Just("http".into()), Just("https".into())];
    let status = prop_oneof![Just(301u16), Just(302), Just(303), Just(307), Just(308)];
    prop_oneof![
        header_edit().prop_map(Filter::RequestHeaders),
        header_edit().prop_map(Filter::ResponseHeaders),
        (
            option::of(scheme),
            option::of(text()),
            option::of(port()),
            option::of(path_edit()),
            status
        )
            .prop_map(|(scheme, host, port, path, status)| {
                Filter::Redirect(Redirect {
                    scheme,
                    host,
                    port,
                    path,
                    status,
                })
            }),
        (option::of(text()), option::of(path_edit()))
            .prop_map(|(host, path)| Filter::Rewrite(Rewrite { host, path })),
        (key(), port(), 0u32..=1_000_000).prop_map(|(service, port, per_million)| {
            Filter::Mirror {
                service,
                port,
                per_million,
            }
        }),
    ]
}

pub(super) fn conditions() -> impl Strategy<Value = RetryConditions> {
    (
        vec(100u16..600, 0..3),
        any::<bool>(),
        vec(any::<u32>(), 0..3),
        any::<bool>(),
    )
        .prop_map(|(statuses, reset, grpc, non_idempotent)| RetryConditions {
            statuses,
            reset,
            grpc,
            non_idempotent,
        })
}

pub(super) fn backoff() -> impl Strategy<Value = Backoff> {
    (ms(), ms()).prop_map(|(a, b)| Backoff {
        base: a.min(b),
        max: a.max(b),
    })
}

pub(super) fn backend() -> impl Strategy<Value = Backend> {
    let to = option::of((key(), port()));
    (to, any::<u32>(), vec(filter(), 0..2)).prop_map(|(to, weight, filters)| Backend {
        to,
        weight,
        filters,
    })
}

pub(super) fn route() -> impl Strategy<Value = Arc<Route>> {
    let matches = (
        path_match(),
        option::of(method()),
        vec(value_match(), 0..2),
        vec(
            (text(), any_text()).prop_map(|(name, value)| ValueMatch { name, value }),
            0..2,
        ),
    )
        .prop_map(|(path, method, headers, query)| RouteMatch {
            path,
            method,
            headers,
            query,
        });
    let retry = (any::<u32>(), conditions(), option::of(backoff())).prop_map(
        |(attempts, conditions, backoff)| RouteRetry {
            attempts,
            conditions,
            backoff,
        },
    );
    (
        (text(), matches, vec(filter(), 0..3), vec(backend(), 0..3)),
        (option::of(ms()), option::of(ms()), option::of(retry)),
    )
        .prop_map(
            |((name, matches, filters, backends), (request, backend_request, retry))| {
                let timeouts = RouteTimeouts {
                    request,
                    backend_request,
                };
                Arc::new(Route {
                    name,
                    matches,
                    filters,
                    backends,
                    timeouts,
                    retry,
                })
            },
        )
}

pub(super) fn traffic() -> impl Strategy<Value = TrafficPolicy> {
    let retry = (
        any::<u32>(),
        conditions(),
        0.0f64..=1000.0,
        any::<u32>(),
        backoff(),
    )
        .prop_map(
            |(attempts, conditions, percent, min_per_second, backoff)| Retry {
                attempts,
                conditions,
                budget: RetryBudget {
                    percent,
                    min_per_second,
                },
                backoff,
            },
        );
    let connect = (1u64..100_000).prop_map(Duration::from_millis);
    let timeouts = (
        connect,
        option::of(ms()),
        option::of(ms()),
        option::of(ms()),
    )
        .prop_map(|(connect, request, per_try, idle)| Timeouts {
            connect,
            request,
            per_try,
            idle,
        });
    let circuit =
        any::<[u32; 3]>().prop_map(
            |[max_connections, max_pending, max_requests]| CircuitBreaker {
                max_connections,
                max_pending,
                max_requests,
            },
        );
    let outlier = (1u32.., backoff(), 0u32..=100).prop_map(|(consecutive_failures, times, max)| {
        OutlierEjection {
            consecutive_failures,
            base_ejection: times.base,
            max_ejection: times.max,
            max_percent: max,
        }
    });
    (retry, timeouts, circuit, option::of(outlier)).prop_map(
        |(retry, timeouts, circuit, outlier)| TrafficPolicy {
            retry,
            timeouts,
            circuit,
            outlier,
        },
    )
}
