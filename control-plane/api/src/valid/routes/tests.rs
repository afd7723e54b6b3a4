use serde_json::Value;
use turnpike_rules::route::{Filter, PathEdit, PathMatch};

use super::*;

fn compile(yaml: &str) -> Result<Routes, Invalid> {
    let value: Value = serde_saphyr::from_str(yaml).unwrap();
    let route: HttpRoute = serde_json::from_value(value).unwrap();
    http_route(&route, "cluster")
}

fn with_rule(rule: &str) -> String {
    format!(
        "{{metadata: {{name: r, namespace: shop}}, spec: {{parentRefs: [{{group: '', kind: \
         Service, name: web}}], rules: [{rule}]}}}}"
    )
}

#[track_caller]
fn assert_fields(rule: &str, fields: &[&str]) {
    let found = match compile(&with_rule(rule)) {
        Ok(_) => Vec::new(),
        Err(invalid) => invalid.problems().iter().map(ToString::to_string).collect(),
    };
    let names: Vec<_> = found
        .iter()
        .map(|p| p.split(": ").next().unwrap())
        .collect();
    assert_eq!(names, fields, "{rule}: {found:?}");
}

const SPLIT: &str = "
metadata: {name: split, namespace: shop}
spec:
  parentRefs:
  - {group: '', kind: Service, name: web, port: 80}
  - {name: some-gateway}
  rules:
  - matches:
    - {path: {type: PathPrefix, value: /v1/}, method: GET}
    - {path: {type: Exact, value: /health}, headers: [{name: X-Canary, value: 'yes'}]}
    backendRefs:
    - {name: web-v1, port: 80, weight: 90}
    - {name: web-v2, port: 8080, weight: 10}
    timeouts: {request: 2s, backendRequest: 500ms}
    retry: {attempts: 3, codes: [503], backoff: 100ms}
  - backendRefs:
    - {name: web, port: 80}
";

#[test]
fn a_rule_becomes_a_route_for_each_match() {
    let Routes {
        parents, routes, ..
    } = compile(SPLIT).unwrap();
    assert_eq!(parents.len(), 1, "the gateway is none of ours");
    assert_eq!(parents[0].port, Some(80));
    assert_eq!(parents[0].consumer, None);
    assert_eq!(routes.len(), 3);
    assert_eq!(&*routes[0].name, "HTTPRoute shop/split rule 0");
    assert_eq!(routes[0].matches.path, PathMatch::Prefix("/v1".into()));
    assert_eq!(routes[0].matches.method.as_deref(), Some("GET"));
    assert_eq!(&*routes[1].matches.headers[0].name, "x-canary");
    assert_eq!(routes[1].backends, routes[0].backends);
    assert_eq!(
        routes[0].backends[1].to,
        Some((ServiceKey::new("cluster", "shop", "web-v2"), 8080))
    );
    assert_eq!(routes[0].backends[1].weight, 10);
    assert_eq!(routes[0].timeouts.request, Some(Duration::from_secs(2)));
    let retry = routes[0].retry.as_ref().unwrap();
    assert_eq!(
        (retry.attempts, &retry.conditions.statuses[..]),
        (3, &[503][..])
    );
    assert!(retry.conditions.reset && !retry.conditions.non_idempotent);
    assert_eq!(routes[2].matches.path, PathMatch::Prefix("/".into()));
}

#[test]
fn a_route_from_another_namespace_is_its_consumers() {
    let Routes { parents, .. } = compile(
        "
metadata: {name: r, namespace: caller}
spec:
  parentRefs: [{group: '', kind: Service, name: web, namespace: shop}]
  rules:
  - backendRefs: [{name: web, namespace: shop, port: 80}, {name: own, port: 80}]
",
    )
    .unwrap();
    assert_eq!(&*parents[0].namespace, "shop");
    assert_eq!(parents[0].consumer.as_deref(), Some("caller"));
}

#[test]
fn backends_are_of_any_namespace_and_those_that_are_no_services_have_a_share_that_fails() {
    let rule = "{backendRefs: [{name: web, namespace: other, port: 80}, {group: '', kind: Service, \
                name: web, port: 80, weight: 3}, {group: x.dev, kind: Bucket, name: logs}, {group: \
                x.dev, kind: Service, name: web, port: 80}], filters: [{type: RequestMirror, \
                requestMirror: {backendRef: {group: x.dev, kind: Bucket, name: copy}}}]}";
    let Routes {
        routes, unknown, ..
    } = compile(&with_rule(rule)).unwrap();
    let web = |namespace| Some((ServiceKey::new("cluster", namespace, "web"), 80));
    let found: Vec<_> = routes[0]
        .backends
        .iter()
        .map(|b| (b.to.clone(), b.weight))
        .collect();
    let expected = [(web("other"), 1), (web("shop"), 3), (None, 1), (None, 1)];
    assert_eq!(found, expected);
    assert!(
        routes[0].filters.is_empty(),
        "nobody is there to be sent copies"
    );
    assert_eq!(
        unknown,
        [
            "spec.rules[0].filters[0].requestMirror.backendRef: Bucket.x.dev copy",
            "spec.rules[0].backendRefs[2]: Bucket.x.dev logs",
            "spec.rules[0].backendRefs[3]: Service.x.dev web",
        ]
    );
}

#[test]
fn a_share_of_copies_is_kept_to_the_millionth() {
    let compile = |share: &str| {
        compile(&with_rule(&format!(
            "{{filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: copy, port: \
             80}}{share}}}}}]}}"
        )))
    };
    for (share, expected) in [
        ("", 1_000_000),
        (", percent: 0", 0),
        (", percent: 7", 70_000),
        (", percent: 100", 1_000_000),
        (", fraction: {numerator: 1}", 10_000),
        (", fraction: {numerator: 0, denominator: 1000}", 0),
        (", fraction: {numerator: 1, denominator: 1000}", 1_000),
        (", fraction: {numerator: 2, denominator: 3}", 666_667),
        (", fraction: {numerator: 1, denominator: 2147483647}", 1),
        (
            ", fraction: {numerator: 2147483647, denominator: 2147483647}",
            1_000_000,
        ),
    ] {
        let Routes { routes, .. } = compile(share).unwrap();
        let [Filter::Mirror { per_million, .. }] = routes[0].filters[..] else {
            panic!("{share}: {:?}", routes[0].filters)
        };
        assert_eq!(per_million, expected, "{share}");
    }
    for share in [
        ", percent: 101",
        ", percent: -1",
        ", fraction: {numerator: -1, denominator: 1000}",
        ", fraction: {numerator: 1001, denominator: 1000}",
        ", percent: 1, fraction: {numerator: 1}",
    ] {
        assert!(compile(share).is_err(), "{share}");
    }
}

#[test]
fn hostnames_are_checked_and_decide_nothing() {
    let with = |hostnames: &str| {
        compile(&SPLIT.replace("  rules:", &format!("  hostnames: [{hostnames}]\n  rules:")))
    };
    let shared = with("shop.example, '*.shop.example'").unwrap();
    let plain = compile(SPLIT).unwrap();
    assert_eq!(shared.routes, plain.routes);
    assert!(shared.names_hosts && !plain.names_hosts);
    let refused = with("shop.example, 'a b'").unwrap_err();
    assert_eq!(refused.problems()[0].field, "spec.hostnames[1]");
}

#[test]
fn filters_compile() {
    let rule = "{filters: [
      {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-A, value: b}], remove: [x-c]}},
      {type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: X-D, value: e}]}},
      {type: RequestMirror, requestMirror: {backendRef: {name: copy, port: 80}, percent: 10}},
      {type: URLRewrite, urlRewrite: {hostname: other.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /z}}}],
      matches: [{path: {value: /a}}], backendRefs: [{name: web, port: 80}]}";
    let Routes { routes, .. } = compile(&with_rule(rule)).unwrap();
    let [
        Filter::RequestHeaders(request),
        Filter::ResponseHeaders(response),
        mirror,
        rewrite,
    ] = &routes[0].filters[..]
    else {
        panic!("{:?}", routes[0].filters)
    };
    assert_eq!(request.set, [("x-a".into(), "b".into())]);
    assert_eq!(response.add, [("x-d".into(), "e".into())]);
    assert!(matches!(
        mirror,
        Filter::Mirror {
            port: 80,
            per_million: 100_000,
            ..
        }
    ));
    let Filter::Rewrite(rewrite) = rewrite else {
        panic!("{rewrite:?}")
    };
    assert_eq!(rewrite.path, Some(PathEdit::ReplacePrefix("/z".into())));

    let rule =
        "{filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 301}}]}";
    let Routes { routes, .. } = compile(&with_rule(rule)).unwrap();
    assert!(filters::redirects(&routes[0].filters));
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table, read from top to bottom")]
fn what_is_not_supported_is_refused_by_name() {
    for (rule, fields) in [
        (
            "{matches: [{path: {type: RegularExpression, value: '/a.*'}}]}",
            &["spec.rules[0].matches[0].path.type"][..],
        ),
        (
            "{matches: [{headers: [{type: RegularExpression, name: a, value: b}]}]}",
            &["spec.rules[0].matches[0].headers[0].type"],
        ),
        (
            "{matches: [{queryParams: [{type: RegularExpression, name: a, value: b}]}]}",
            &["spec.rules[0].matches[0].queryParams[0].type"],
        ),
        (
            "{matches: [{path: {value: /a/../b}}]}",
            &["spec.rules[0].matches[0].path.value"],
        ),
        (
            "{sessionPersistence: {type: Cookie}}",
            &["spec.rules[0].sessionPersistence"],
        ),
        (
            "{filters: [{type: ExtensionRef, extensionRef: {group: a, kind: b, name: c}}]}",
            &["spec.rules[0].filters[0].type"],
        ),
        (
            "{filters: [{type: CORS, cors: {}}]}",
            &["spec.rules[0].filters[0].type"],
        ),
        (
            "{filters: [{type: URLRewrite}]}",
            &["spec.rules[0].filters[0]"],
        ),
        (
            "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Host, \
             value: b}, {name: 'a b', value: c}]}}]}",
            &[
                "spec.rules[0].filters[0].requestHeaderModifier.set[0].name",
                "spec.rules[0].filters[0].requestHeaderModifier.set[1].name",
            ],
        ),
        (
            "{filters: [{type: RequestRedirect, requestRedirect: {statusCode: 200}}], \
             backendRefs: [{name: web, port: 80}]}",
            &[
                "spec.rules[0].filters[0].requestRedirect.statusCode",
                "spec.rules[0].backendRefs",
            ],
        ),
        (
            "{matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, \
             urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /z}}}]}",
            &["spec.rules[0].filters[0].urlRewrite.path.replacePrefixMatch"],
        ),
        (
            "{backendRefs: [{name: web}, {name: web, port: 0}, {name: web, port: 80, weight: -1}, \
             {kind: Bucket, name: b, weight: -1}]}",
            &[
                "spec.rules[0].backendRefs[0].port",
                "spec.rules[0].backendRefs[1].port",
                "spec.rules[0].backendRefs[2].weight",
                "spec.rules[0].backendRefs[3].weight",
            ],
        ),
        (
            "{timeouts: {request: 1s, backendRequest: 2s}}",
            &["spec.rules[0].timeouts.backendRequest"],
        ),
        (
            "{timeouts: {request: 1x}, retry: {attempts: 99, codes: [200], backoff: soon}}",
            &[
                "spec.rules[0].timeouts.request",
                "spec.rules[0].retry.attempts",
                "spec.rules[0].retry.codes[0]",
                "spec.rules[0].retry.backoff",
            ],
        ),
    ] {
        assert_fields(rule, fields);
    }
    let service =
        "{metadata: {name: r}, spec: {parentRefs: [{group: x.dev, kind: Mesh, name: a}]}}";
    assert_eq!(
        compile(service).unwrap_err().problems()[0].field,
        "spec.parentRefs[0].kind"
    );
}
