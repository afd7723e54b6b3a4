mod properties;

use super::*;
use crate::{Identity, pod::PodEgress, route::PathMatch};

fn host(text: &str) -> HostName {
    HostName::parse(text).unwrap()
}

fn port(port: u16, protocol: EgressProtocol) -> EgressPort {
    EgressPort {
        port,
        end_port: port,
        protocol,
    }
}

fn rule(id: &str, hosts: &[&str], cidrs: &[&str], ports: &[EgressPort]) -> EgressRule {
    EgressRule {
        id: id.into(),
        hosts: hosts
            .iter()
            .map(|h| HostPattern::parse(h).unwrap())
            .collect(),
        cidrs: cidrs.iter().map(|c| c.parse().unwrap()).collect(),
        ports: ports.to_vec(),
        http: None,
        originate_tls: false,
    }
}

fn policy(name: &str, mode: Mode, rules: Vec<EgressRule>) -> EgressPolicy {
    EgressPolicy {
        name: name.into(),
        version: format!("{name} v1").into(),
        mode,
        rules,
    }
}

fn pod(policies: Vec<EgressPolicy>) -> PodEgress {
    PodEgress {
        uid: "uid".into(),
        namespace: "shop".into(),
        name: "payments-1".into(),
        identity: Identity::new("cluster.local", "shop", "payments").unwrap(),
        policies,
    }
}

/// The policy of the design's example, as a pod sees it.
fn payments() -> PodEgress {
    let partner = EgressRule {
        http: Some(HttpRules {
            methods: vec!["GET".into()],
            paths: vec![
                PathMatch::prefix("/v1/"),
                PathMatch::Exact("/health".into()),
            ],
        }),
        originate_tls: true,
        ..rule(
            "allow[1]",
            &["partner.example"],
            &[],
            &[port(80, EgressProtocol::Http)],
        )
    };
    let range = EgressPort {
        port: 5432,
        end_port: 5440,
        protocol: EgressProtocol::Tcp,
    };
    pod(vec![policy(
        "shop/payments",
        Mode::Enforce,
        vec![
            rule(
                "allow[0]",
                &["api.payments.example", "*.s3.amazonaws.com"],
                &[],
                &[port(443, EgressProtocol::Tls)],
            ),
            partner,
            rule(
                "allow[2]",
                &[],
                &["10.0.64.0/20", "2001:db8::/32"],
                &[range],
            ),
            rule(
                "allow[3]",
                &[],
                &["203.0.113.99/32"],
                &[port(123, EgressProtocol::Udp)],
            ),
        ],
    )])
}

/// `connect` with the texts that a test writes.
fn connect(
    pod: &PodEgress,
    address: &str,
    port: u16,
    transport: (&str, &str),
    bound: &[&str],
) -> Verdict {
    let bound: Vec<HostName> = bound.iter().map(|b| host(b)).collect();
    let name = (!transport.1.is_empty()).then(|| host(transport.1));
    let transport = match transport.0 {
        "tls" => Transport::Tls { sni: name.as_ref() },
        "http" => Transport::Http {
            host: name.as_ref(),
        },
        "tcp" => Transport::Tcp,
        _ => Transport::Udp,
    };
    pod.connect(&Connect {
        address: address.parse().unwrap(),
        port,
        transport,
        bound: &bound,
    })
}

fn request(pod: &PodEgress, name: &str, method: &str, path: &str) -> Verdict {
    let name = host(name);
    let connect = Connect {
        address: "203.0.113.20".parse().unwrap(),
        port: 80,
        transport: Transport::Http { host: Some(&name) },
        bound: &[host("partner.example")],
    };
    pod.request(&connect, &Request { method, path })
}

#[test]
fn names_resolve_where_a_rule_has_them() {
    let pod = payments();
    for (name, rule) in [
        ("api.payments.example", Some("allow[0]")),
        ("bucket.s3.amazonaws.com", Some("allow[0]")),
        ("partner.example", Some("allow[1]")),
        ("s3.amazonaws.com", None),
        ("attacker.example", None),
        ("api.payments.example.attacker.example", None),
    ] {
        let verdict = pod.resolve(&host(name));
        assert_eq!(verdict.allowed, rule.is_some(), "{name}");
        assert_eq!(verdict.rule.as_deref(), rule, "{name}");
        assert_eq!(verdict.policy.as_deref(), Some("shop/payments"));
        assert_eq!(verdict.version.as_deref(), Some("shop/payments v1"));
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table, read from top to bottom")]
fn connections_are_judged_by_what_is_known() {
    let pod = payments();
    let api = &["api.payments.example"][..];
    let tls_api = ("tls", "api.payments.example");
    for (address, port, transport, bound, code, grade) in [
        ("203.0.113.10", 443, tls_api, api, "rule", Grade::SniDns),
        // The lies: another address, another name, no name, no lookup.
        ("203.0.113.66", 443, tls_api, &[], "not-resolved", Grade::L3),
        (
            "203.0.113.66",
            443,
            tls_api,
            &["partner.example"],
            "not-resolved",
            Grade::L3,
        ),
        (
            "203.0.113.10",
            443,
            ("tls", "attacker.example"),
            api,
            "no-rule-for-host",
            Grade::L3,
        ),
        ("203.0.113.10", 443, ("tls", ""), api, "no-sni", Grade::L3),
        (
            "203.0.113.10",
            443,
            ("http", "api.payments.example"),
            api,
            "port-not-allowed",
            Grade::L3,
        ),
        (
            "203.0.113.10",
            8443,
            tls_api,
            api,
            "port-not-allowed",
            Grade::L3,
        ),
        (
            "203.0.113.10",
            443,
            ("tcp", ""),
            api,
            "no-rule-for-address",
            Grade::L3,
        ),
        (
            "203.0.113.10",
            443,
            ("udp", ""),
            api,
            "no-rule-for-address",
            Grade::L3,
        ),
        // Plaintext HTTP.
        (
            "203.0.113.20",
            80,
            ("http", "partner.example"),
            &["partner.example"],
            "rule",
            Grade::HttpVerified,
        ),
        (
            "203.0.113.20",
            80,
            ("http", ""),
            &["partner.example"],
            "no-host",
            Grade::L3,
        ),
        // By address alone: anything over TCP, nothing else.
        ("10.0.64.7", 5432, ("tcp", ""), &[], "rule", Grade::L3),
        ("10.0.64.7", 5440, ("tls", ""), &[], "rule", Grade::L3),
        (
            "10.0.64.7",
            5433,
            ("tls", "db.example"),
            &["db.example"],
            "rule",
            Grade::SniDns,
        ),
        ("2001:db8::7", 5432, ("tcp", ""), &[], "rule", Grade::L3),
        (
            "10.0.64.7",
            5441,
            ("tcp", ""),
            &[],
            "no-rule-for-address",
            Grade::L3,
        ),
        (
            "10.0.64.7",
            5432,
            ("udp", ""),
            &[],
            "no-rule-for-address",
            Grade::L3,
        ),
        (
            "10.0.80.1",
            5432,
            ("tcp", ""),
            &[],
            "no-rule-for-address",
            Grade::L3,
        ),
        ("203.0.113.99", 123, ("udp", ""), &[], "rule", Grade::L3),
        (
            "203.0.113.99",
            123,
            ("tcp", ""),
            &[],
            "no-rule-for-address",
            Grade::L3,
        ),
    ] {
        let verdict = connect(&pod, address, port, transport, bound);
        let case = format!(
            "{address}:{port} {transport:?} {bound:?}: {}",
            verdict.reason
        );
        assert_eq!(verdict.reason.code(), code, "{case}");
        assert_eq!(verdict.allowed, code == "rule", "{case}");
        if verdict.allowed {
            assert_eq!(verdict.grade, grade, "{case}");
        }
    }
}

#[test]
fn special_addresses_are_closed_to_every_rule_and_mode() {
    for mode in [Mode::Enforce, Mode::Audit] {
        let ports = [
            port(80, EgressProtocol::Http),
            port(443, EgressProtocol::Tls),
        ];
        let all = pod(vec![policy(
            "shop/all",
            mode,
            vec![
                rule("allow[0]", &["*.example"], &[], &ports),
                rule(
                    "allow[1]",
                    &[],
                    &["0.0.0.0/0", "::/0"],
                    &[port(80, EgressProtocol::Tcp)],
                ),
            ],
        )]);
        for address in [
            "169.254.169.254",
            "fd00:ec2::254",
            "127.0.0.1",
            "::1",
            "fe80::1",
            "224.0.0.1",
            "::ffff:203.0.113.1",
            "64:ff9b::cb00:7101",
            "2002:cb00:7101::1",
            "0.0.0.0",
        ] {
            let verdict = connect(&all, address, 80, ("http", "a.example"), &["a.example"]);
            assert_eq!(verdict.reason.code(), "special-address", "{address}");
            assert!(!verdict.allowed && !verdict.would_deny, "{address}");
        }
        assert!(
            connect(
                &all,
                "203.0.113.1",
                80,
                ("http", "a.example"),
                &["a.example"]
            )
            .allowed
        );
    }
}

#[test]
fn each_request_is_judged() {
    let pod = payments();
    for (name, method, path, code) in [
        ("partner.example", "GET", "/v1/orders", "rule"),
        ("partner.example", "GET", "/v1", "rule"),
        ("partner.example", "GET", "/health", "rule"),
        ("partner.example", "GET", "/v10", "path-not-allowed"),
        ("partner.example", "GET", "/", "path-not-allowed"),
        (
            "partner.example",
            "GET",
            "/health;x/admin",
            "path-not-allowed",
        ),
        ("partner.example", "GET", "/v1;x/orders", "path-not-allowed"),
        ("partner.example", "GET", "/v1/orders;x=1", "rule"),
        ("partner.example", "GET", "//v1/orders", "path-not-allowed"),
        (
            "partner.example",
            "POST",
            "/v1/orders",
            "method-not-allowed",
        ),
        ("partner.example", "get", "/v1/orders", "method-not-allowed"),
        ("attacker.example", "GET", "/v1/orders", "no-rule-for-host"),
    ] {
        let verdict = request(&pod, name, method, path);
        assert_eq!(verdict.reason.code(), code, "{name} {method} {path}");
        assert_eq!(verdict.allowed, code == "rule");
        assert_eq!(verdict.originate_tls, verdict.allowed);
    }
}

#[test]
fn the_policy_that_came_closest_gives_the_reason() {
    let near = rule(
        "allow[0]",
        &["a.example"],
        &[],
        &[port(443, EgressProtocol::Tls)],
    );
    let far = rule(
        "allow[0]",
        &["b.example"],
        &[],
        &[port(443, EgressProtocol::Tls)],
    );
    let pod = pod(vec![
        policy("shop/far", Mode::Enforce, vec![far]),
        policy("shop/near", Mode::Enforce, vec![near]),
    ]);
    let verdict = connect(
        &pod,
        "203.0.113.1",
        80,
        ("http", "a.example"),
        &["a.example"],
    );
    assert_eq!(verdict.policy.as_deref(), Some("shop/near"));
    assert_eq!(verdict.rule.as_deref(), Some("allow[0]"));
    assert_eq!(
        verdict.reason.to_string(),
        "a.example is not allowed on 80/HTTP, only on 443/TLS; use one of these, or add the port \
         to the rule"
    );
    let verdict = connect(
        &pod,
        "203.0.113.1",
        80,
        ("http", "c.example"),
        &["c.example"],
    );
    assert_eq!(verdict.policy.as_deref(), Some("shop/far"));
    assert_eq!(verdict.rule, None);
}

#[test]
fn what_one_policy_allows_passes_and_what_none_does_only_where_all_audit() {
    let tls = [port(443, EgressProtocol::Tls)];
    let allows = |name: &str, mode, host: &str| {
        policy(name, mode, vec![rule("allow[0]", &[host], &[], &tls)])
    };
    let c = host("c.example");
    for (a, b) in [
        (Mode::Audit, Mode::Audit),
        (Mode::Audit, Mode::Enforce),
        (Mode::Enforce, Mode::Audit),
        (Mode::Enforce, Mode::Enforce),
    ] {
        let both = pod(vec![
            allows("shop/a", a, "a.example"),
            allows("shop/b", b, "b.example"),
        ]);
        for name in ["a.example", "b.example"] {
            let verdict = connect(&both, "203.0.113.1", 443, ("tls", name), &[name]);
            assert!(verdict.allowed && !verdict.would_deny, "{a:?} {b:?} {name}");
        }
        let observed = (a, b) == (Mode::Audit, Mode::Audit);
        let bound = &["c.example"];
        let connected = connect(&both, "203.0.113.1", 443, ("tls", "c.example"), bound);
        for verdict in [connected, both.resolve(&c)] {
            assert_eq!(verdict.allowed, observed, "{a:?} {b:?}");
            assert_eq!(verdict.would_deny, observed, "{a:?} {b:?}");
            assert_eq!(verdict.policy.as_deref(), Some("shop/a"));
            assert_eq!(verdict.reason, Reason::NoRuleForHost { host: c.clone() });
        }
    }
    let audit = pod(vec![allows("shop/a", Mode::Audit, "a.example")]);
    let bound = &["c.example"];
    let verdict = connect(&audit, "203.0.113.1", 443, ("tls", "c.example"), bound);
    assert_eq!(
        verdict.grade,
        Grade::SniDns,
        "what is known of it all the same"
    );
}

#[test]
fn rules_that_cannot_be_held_to_allow_nothing() {
    // Refused when typed; should one arrive all the same, it must not open anything.
    let opaque = rule(
        "allow[0]",
        &["a.example"],
        &[],
        &[port(443, EgressProtocol::Tcp)],
    );
    let empty = rule("allow[1]", &[], &[], &[port(443, EgressProtocol::Tls)]);
    let http_in_tls = EgressRule {
        http: Some(HttpRules {
            methods: vec!["GET".into()],
            paths: Vec::new(),
        }),
        ..rule(
            "allow[2]",
            &["a.example"],
            &[],
            &[port(443, EgressProtocol::Tls)],
        )
    };
    let elsewhere = rule(
        "allow[3]",
        &["a.example"],
        &["10.0.0.0/8"],
        &[port(443, EgressProtocol::Tls)],
    );
    let pod = pod(vec![policy(
        "shop/odd",
        Mode::Enforce,
        vec![opaque, empty, http_in_tls, elsewhere],
    )]);
    for transport in [("tls", "a.example"), ("tls", ""), ("tcp", ""), ("udp", "")] {
        assert!(!connect(&pod, "203.0.113.1", 443, transport, &["a.example"]).allowed);
    }
    assert!(connect(&pod, "10.1.1.1", 443, ("tls", "a.example"), &["a.example"]).allowed);
}

#[test]
fn a_pod_without_policies_is_not_restricted() {
    let verdict = connect(&pod(Vec::new()), "203.0.113.1", 443, ("tcp", ""), &[]);
    assert!(verdict.allowed);
    assert_eq!(verdict.reason, Reason::NotSelected);
}
