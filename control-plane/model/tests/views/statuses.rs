//! Routes, and what the statuses of objects say.

use turnpike_api::Kind;
use turnpike_model::{Condition, ConditionKind, Model, ResourceType};

use super::{
    common::{key, load},
    web, world,
};

const ROUTES: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: split, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web, port: 80}]
  rules:
  - backendRefs: [{name: web, port: 80, weight: 9}, {name: canary, port: 80, weight: 1}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: own, namespace: bank}
spec:
  parentRefs: [{group: '', kind: Service, name: web, namespace: shop}]
  rules:
  - timeouts: {request: 1s}
    backendRefs: [{name: web, namespace: shop, port: 80}]
---
";

#[test]
fn routes_of_a_consumer_hold_for_it_alone() {
    let model = world(ROUTES);
    let routes = |name: &str, port: usize| {
        let service = model.service(name).unwrap();
        let table = &service.ports[port].routes.routes;
        table
            .iter()
            .map(|route| route.name.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        routes("cluster/shop/web", 0),
        ["HTTPRoute shop/split rule 0"]
    );
    assert!(
        routes("cluster/shop/web", 1).is_empty(),
        "attached to one port"
    );
    assert_eq!(
        routes("cluster/shop/web@shop", 0),
        ["HTTPRoute shop/split rule 0"]
    );
    assert_eq!(
        routes("cluster/shop/web@bank", 0),
        ["HTTPRoute bank/own rule 0"]
    );
    let plain = model.service("cluster/shop/web@elsewhere").unwrap();
    assert_eq!(plain, model.service("cluster/shop/web").unwrap());
    let weights: Vec<u32> = plain.ports[0].routes.routes[0]
        .backends
        .iter()
        .map(|backend| backend.weight)
        .collect();
    assert_eq!(weights, [9, 1]);
    assert!(
        model
            .names(ResourceType::Service)
            .contains(&"cluster/shop/web@bank".into())
    );
}

fn problems(model: &Model, object: &str) -> Vec<(&'static str, String)> {
    let statuses = model
        .statuses()
        .into_iter()
        .filter(|s| s.object.to_string() == object);
    let conditions = statuses.flat_map(|status| status.conditions);
    let failing = conditions.filter(|condition| !condition.holds);
    failing
        .map(
            |Condition {
                 reason, message, ..
             }| (reason, message),
        )
        .collect()
}

#[test]
fn statuses_say_what_does_not_hold_and_why() {
    let mut model = world(ROUTES);
    let found = problems(&model, "HTTPRoute shop/split");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, "BackendNotFound");
    assert!(found[0].1.contains("shop/canary"), "{found:?}");
    assert!(problems(&model, "HTTPRoute bank/own").is_empty());
    let lost = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: lost, namespace: shop}
spec:
  parentRefs:
  - {group: '', kind: Service, name: nowhere}
  - {group: '', kind: Service, name: web, port: 81}
  rules: [{backendRefs: [{name: web, port: 80}]}]
";
    load(&mut model, lost);
    let found = problems(&model, "HTTPRoute shop/lost");
    let reasons: Vec<_> = found.iter().map(|(reason, _)| *reason).collect();
    assert_eq!(reasons, ["NoMatchingParent", "NoMatchingParent"]);
    assert!(found[1].1.contains("it has: 80 http, 5432 db"), "{found:?}");
}

#[test]
fn of_two_traffic_policies_the_older_holds_and_the_other_is_told() {
    let policy = |name: &str, born: &str, target: &str, attempts: u32| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: TrafficPolicy\n\
             metadata: {{name: {name}, namespace: shop, creationTimestamp: {born}}}\n\
             spec: {{targetRefs: [{{kind: Service, name: {target}}}], \
             retry: {{attempts: {attempts}}}}}\n---\n"
        )
    };
    let newer = policy("a", "'2026-02-01T00:00:00Z'", "web", 1);
    let older = policy("b", "'2026-01-01T00:00:00Z'", "web", 7);
    let mut model = world(&format!("{newer}{older}"));
    assert_eq!(web(&model).traffic.retry.attempts, 7);
    let found = problems(&model, "TrafficPolicy shop/a");
    assert_eq!(found[0].0, "Conflicted");
    assert!(found[0].1.contains("`shop/b` is older"), "{found:?}");
    assert!(problems(&model, "TrafficPolicy shop/b").is_empty());
    model.delete(&key(Kind::TrafficPolicy, "shop", "b"));
    assert_eq!(web(&model).traffic.retry.attempts, 1);
    assert!(problems(&model, "TrafficPolicy shop/a").is_empty());
    load(&mut model, &policy("c", "null", "nowhere", 1));
    assert_eq!(
        problems(&model, "TrafficPolicy shop/c")[0].0,
        "TargetNotFound"
    );
}

#[test]
fn of_policies_that_exclude_each_other_those_overruled_are_told() {
    let peer = |name: &str, selector: &str, mode: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: PeerAuthentication\n\
             metadata: {{name: {name}, namespace: shop}}\n\
             spec: {{{selector} mtls: {{mode: {mode}}}}}\n---\n"
        )
    };
    let web = "selector: {matchLabels: {app: web}},";
    let all = [
        peer("a-wide", "", "STRICT"),
        peer("b-wide", "", "PERMISSIVE"),
        peer("c-web", web, "STRICT"),
        // Other words, the same pods.
        peer(
            "d-web",
            "selector: {matchExpressions: [{key: app, operator: In, values: [web, cart]}]},",
            "PERMISSIVE",
        ),
        peer(
            "e-none",
            "selector: {matchLabels: {app: nobody}},",
            "STRICT",
        ),
    ];
    let mut model = world(&all.concat());
    let conflict = |model: &Model, name: &str| {
        let found = problems(model, &format!("PeerAuthentication shop/{name}"));
        found.into_iter().next()
    };
    for holding in ["a-wide", "c-web", "e-none"] {
        assert_eq!(conflict(&model, holding), None, "{holding}");
    }
    for (overruled, holding) in [("b-wide", "shop/a-wide"), ("d-web", "shop/c-web")] {
        let (reason, message) = conflict(&model, overruled).unwrap();
        assert_eq!(reason, "Conflicted");
        assert!(message.contains(holding), "{message}");
        // Neither says when it was made.
        assert!(message.contains("comes first by its name"), "{message}");
    }
    model.delete(&key(Kind::PeerAuthentication, "shop", "c-web"));
    assert_eq!(conflict(&model, "d-web"), None);
}

#[test]
fn what_is_invalid_keeps_what_was_in_force() {
    let policy = |port: u16| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: EgressPolicy\n\
             metadata: {{name: web, namespace: shop}}\nspec: {{allow: [{{cidrs: [192.0.2.0/24], \
             ports: [{{port: {port}, protocol: TCP}}]}}]}}\n"
        )
    };
    let mut model = world(&policy(443));
    let before = model.pod_egress("cluster/shop/web-1");
    assert!(load(&mut model, &policy(0)).is_empty());
    assert_eq!(model.pod_egress("cluster/shop/web-1"), before);
    assert_eq!(problems(&model, "EgressPolicy shop/web")[0].0, "Invalid");
    load(&mut model, &policy(443));
    assert!(problems(&model, "EgressPolicy shop/web").is_empty());
}

/// `Accepted`, of the one place where it is said.
fn accepted(model: &Model, object: &str) -> Condition {
    let statuses = model.statuses().into_iter();
    let mut said = statuses
        .filter(|status| status.object.to_string() == object)
        .flat_map(|status| status.conditions)
        .filter(|condition| condition.kind == ConditionKind::Accepted);
    let condition = said.next().unwrap();
    assert_eq!(said.next(), None, "{object} is told once");
    condition
}

fn service(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{{spec}}}\n---\n"
    )
}

#[test]
fn what_is_overruled_for_some_and_in_force_for_others_is_accepted_and_says_so() {
    let traffic = |name: &str, targets: &[&str]| {
        let targets = targets
            .iter()
            .map(|name| format!("{{kind: Service, name: {name}}}"));
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: TrafficPolicy\n\
             metadata: {{name: {name}, namespace: shop}}\n\
             spec: {{targetRefs: [{}], retry: {{attempts: 1}}}}\n---\n",
            targets.collect::<Vec<_>>().join(", ")
        )
    };
    let api = service("api", "clusterIP: 10.96.0.2, ports: [{port: 80}]");
    let policies = [
        api,
        traffic("a", &["web"]),
        traffic("b", &["web", "api", "nowhere"]),
        traffic("c", &["web", "api"]),
    ];
    let model = world(&policies.concat());
    let partly = accepted(&model, "TrafficPolicy shop/b");
    assert_eq!((partly.holds, partly.reason), (true, "Accepted"));
    for part in ["`shop/a` comes first", "`shop/web`", "`shop/nowhere`"] {
        assert!(partly.message.contains(part), "{partly:?}");
    }
    let nowhere = accepted(&model, "TrafficPolicy shop/c");
    assert_eq!((nowhere.holds, nowhere.reason), (false, "Conflicted"));
    assert!(nowhere.message.contains("`shop/b`"), "{nowhere:?}");
}

#[test]
fn a_policy_that_others_overrule_on_some_pods_is_accepted_while_any_is_left() {
    let peer = |name: &str, labels: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: PeerAuthentication\n\
             metadata: {{name: {name}, namespace: shop}}\nspec: {{selector: {{{labels}}}, mtls: \
             {{mode: STRICT}}}}\n---\n"
        )
    };
    let pod = |name: &str, address: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: {name}, \
             labels: {{app: {name}}}}}\nspec: {{nodeName: node-a, containers: [{{name: app}}]}}\n\
             status: {{podIP: {address}}}\n---\n"
        )
    };
    let any = "matchExpressions: [{key: app, operator: Exists}]";
    let policies = [
        pod("cart", "10.0.0.11"),
        peer("a", "matchLabels: {app: web}"),
        peer("b", any),
    ];
    let mut model = world(&policies.concat());
    let partly = accepted(&model, "PeerAuthentication shop/b");
    assert!(partly.holds, "cart is left: {partly:?}");
    assert!(
        partly.message.contains("`shop/a` comes first"),
        "{partly:?}"
    );
    // Each of two others has a part, and together they have all.
    load(&mut model, &peer("aa", "matchLabels: {app: cart}"));
    let none = accepted(&model, "PeerAuthentication shop/b");
    assert_eq!((none.holds, none.reason), (false, "Conflicted"));
    load(&mut model, &pod("stock", "10.0.0.12"));
    assert!(accepted(&model, "PeerAuthentication shop/b").holds);
}

#[test]
fn a_route_that_no_request_can_come_to_is_not_accepted() {
    let services = [
        service(
            "headless",
            "clusterIP: None, ports: [{port: 80, name: http}]",
        ),
        service("db", "clusterIP: 10.96.0.3, ports: [{port: 5432}]"),
        service(
            "mixed",
            "clusterIP: 10.96.0.4, ports: [{port: 5432}, {port: 80}]",
        ),
        service(
            "said",
            "clusterIP: 10.96.0.5, ports: [{port: 5432, appProtocol: http}]",
        ),
    ];
    let mut model = world(&services.concat());
    for (parent, reason, part) in [
        ("name: headless", "UnsupportedParent", "headless"),
        ("name: db", "UnsupportedProtocol", "`appProtocol: http`"),
        ("name: web, port: 5432", "UnsupportedProtocol", "`shop/web`"),
        ("name: web, port: 80", "Accepted", ""),
        ("name: mixed", "Accepted", ""),
        ("name: said", "Accepted", ""),
    ] {
        let route = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n\
             metadata: {{name: r, namespace: shop}}\nspec:\n  parentRefs: [{{group: '', kind: \
             Service, {parent}}}]\n  rules: [{{backendRefs: [{{name: web, port: 80}}]}}]\n"
        );
        load(&mut model, &route);
        let found = accepted(&model, "HTTPRoute shop/r");
        assert_eq!(found.reason, reason, "{parent}: {found:?}");
        assert_eq!(found.holds, reason == "Accepted", "{parent}");
        assert!(found.message.contains(part), "{parent}: {found:?}");
    }
}

#[test]
fn a_routes_hostnames_are_ignored_and_it_is_said() {
    let route = |hostnames: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n\
             metadata: {{name: r, namespace: shop}}\nspec:\n  {hostnames}\n  parentRefs: [{{group: \
             '', kind: Service, name: web}}, {{name: gateway}}]\n  rules: [{{backendRefs: [{{name: \
             web, port: 80}}]}}]\n"
        )
    };
    let model = world(&route("hostnames: [shop.example]"));
    let said = accepted(&model, "HTTPRoute shop/r");
    assert!(
        said.holds && said.message.contains("`hostnames`"),
        "{said:?}"
    );
    let shared = web(&model).ports[0].routes.clone();
    let model = world(&route(""));
    assert_eq!(accepted(&model, "HTTPRoute shop/r").message, "");
    assert_eq!(shared, web(&model).ports[0].routes);
}

#[test]
fn a_route_whose_backend_is_no_service_is_in_force_for_the_others() {
    let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n\
                 metadata: {name: r, namespace: shop}\nspec:\n  parentRefs: [{group: '', kind: \
                 Service, name: web}]\n  rules: [{backendRefs: [{name: web, port: 80, weight: 3}, \
                 {group: x.dev, kind: Bucket, name: logs}]}]\n";
    let model = world(route);
    assert!(accepted(&model, "HTTPRoute shop/r").holds);
    let found = problems(&model, "HTTPRoute shop/r");
    assert_eq!(found[0].0, "InvalidKind");
    assert!(
        found[0].1.contains("Bucket.x.dev logs is no Service"),
        "{found:?}"
    );
    let backends = &web(&model).ports[0].routes.routes[0].backends;
    let (service, _) = backends[0].to.as_ref().unwrap();
    assert_eq!((&*service.name, &backends[1].to), ("web", &None));
}
