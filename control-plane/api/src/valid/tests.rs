use serde_json::Value;

use super::*;
use crate::Object;

/// An object from YAML without `apiVersion`.
fn read(kind: Kind, yaml: &str) -> Object {
    let mut value: Value = serde_saphyr::from_str(yaml).unwrap();
    value["apiVersion"] = kind.api_version().into();
    value["kind"] = kind.to_string().into();
    Object::deserialize(kind, value).unwrap()
}

/// The fields that are refused, with the reasons.
fn refused(kind: Kind, spec: &str) -> Vec<(String, String)> {
    let yaml = format!("metadata: {{name: default, namespace: shop}}\nspec: {spec}");
    match check(&read(kind, &yaml)) {
        Ok(()) => Vec::new(),
        Err(invalid) => invalid
            .problems()
            .iter()
            .map(|p| (p.field.clone(), p.problem.clone()))
            .collect(),
    }
}

#[track_caller]
fn assert_fields(kind: Kind, spec: &str, fields: &[&str]) {
    let found = refused(kind, spec);
    let names: Vec<_> = found.iter().map(|(field, _)| field.as_str()).collect();
    assert_eq!(names, fields, "{spec}: {found:?}");
}

mod egress_policies {
    use turnpike_rules::{
        egress::{EgressPort, EgressProtocol, Mode},
        pod::{InboundPort, Transport},
        route::PathMatch,
    };

    use super::*;

    /// The example of the design, as it stands there.
    const PAYMENTS: &str = r#"
metadata: {name: payments, namespace: shop}
spec:
  selector: {matchLabels: {app: payment-processor}}
  mode: Enforce            # or Audit: allow, and record what would have been denied
  allow:
  - hosts: ["api.stripe.com", "*.s3.eu-west-1.amazonaws.com"]
    ports: [{port: 443, protocol: TLS}]
  - hosts: ["partner.example"]
    ports: [{port: 80, protocol: HTTP}]
    http: {methods: [GET], paths: [{prefix: /v1/}]}
    tls: {originate: true}
  - cidrs: ["10.0.64.0/20"]
    ports: [{port: 5432, endPort: 5440, protocol: TCP}]
  inbound:
  - ports: [{port: 8080, protocol: TCP}]
"#;

    fn payments(yaml: &str) -> Egress {
        let Object::EgressPolicy(policy) = read(Kind::EgressPolicy, yaml) else {
            unreachable!()
        };
        egress_policy(&policy).unwrap()
    }

    #[test]
    fn the_example_compiles() {
        let Egress {
            selector,
            policy,
            inbound,
        } = payments(PAYMENTS);
        let labels = |app: &str| BTreeMap::from([("app".to_owned(), app.to_owned())]);
        assert!(selector.matches(&labels("payment-processor")));
        assert!(!selector.matches(&labels("web")) && !selector.selects_all());
        assert_eq!(&*policy.name, "shop/payments");
        assert_eq!(policy.mode, Mode::Enforce);
        let [stripe, partner, database] = &policy.rules[..] else {
            panic!("three rules")
        };
        assert_eq!(&*stripe.id, "allow[0]");
        assert_eq!(stripe.hosts[1].to_string(), "*.s3.eu-west-1.amazonaws.com");
        assert!(partner.originate_tls);
        let http = partner.http.as_ref().unwrap();
        assert_eq!(http.paths, [PathMatch::Prefix("/v1".into())]);
        let range = EgressPort {
            port: 5432,
            end_port: 5440,
            protocol: EgressProtocol::Tcp,
        };
        assert_eq!(database.ports, [range]);
        assert_eq!(
            inbound,
            [InboundPort {
                transport: Transport::Tcp,
                port: 8080
            }]
        );
    }

    #[test]
    fn the_version_is_that_of_the_content() {
        let version = payments(PAYMENTS).policy.version;
        assert_eq!(version.len(), 16);
        let commented = PAYMENTS.replace("mode: Enforce ", "mode: Enforce # same");
        assert_eq!(payments(&commented).policy.version, version);
        let changed = PAYMENTS.replace("443", "8443");
        assert_ne!(payments(&changed).policy.version, version);
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "one table, read from top to bottom")]
    fn what_cannot_be_held_to_is_refused() {
        let ports = "ports: [{port: 443, protocol: TLS}]";
        for (rule, fields) in [
            (format!("{{hosts: [a.example], {ports}}}"), &[][..]),
            (format!("{{{ports}}}"), &["spec.allow[0]"]),
            (
                format!("{{hosts: [a.example], cidrs: [10.0.0.0/8], {ports}}}"),
                &["spec.allow[0]"],
            ),
            (
                format!("{{hosts: ['*', 10.0.0.1, a b], {ports}}}"),
                &[
                    "spec.allow[0].hosts[0]",
                    "spec.allow[0].hosts[1]",
                    "spec.allow[0].hosts[2]",
                ],
            ),
            (
                format!("{{cidrs: [10.0.0.1/8, x, 169.254.0.0/16], {ports}}}"),
                &[
                    "spec.allow[0].cidrs[0]",
                    "spec.allow[0].cidrs[1]",
                    "spec.allow[0].cidrs[2]",
                ],
            ),
            (format!("{{cidrs: [0.0.0.0/0, '::/0'], {ports}}}"), &[]),
            (
                "{hosts: [a.example], ports: []}".to_owned(),
                &["spec.allow[0].ports"],
            ),
            (
                "{hosts: [a.example], ports: [{port: 0, protocol: TLS}]}".to_owned(),
                &["spec.allow[0].ports[0].port"],
            ),
            (
                "{cidrs: [10.0.0.0/8], ports: [{port: 9, endPort: 8, protocol: UDP}]}".to_owned(),
                &["spec.allow[0].ports[0].endPort"],
            ),
            (
                "{hosts: [a.example], ports: [{port: 53, protocol: UDP}]}".to_owned(),
                &["spec.allow[0].ports[0].protocol"],
            ),
            (
                format!("{{hosts: [a.example], {ports}, http: {{methods: [GET]}}}}"),
                &["spec.allow[0].ports[0].protocol"],
            ),
            (
                format!("{{hosts: [a.example], {ports}, tls: {{originate: true}}}}"),
                &["spec.allow[0].ports[0].protocol"],
            ),
            (
                "{cidrs: [10.0.0.0/8], ports: [{port: 80, protocol: HTTP}], tls: {originate: \
                 true}}"
                    .to_owned(),
                &["spec.allow[0].tls.originate"],
            ),
            (
                "{hosts: [a.example], ports: [{port: 80, protocol: HTTP}], http: {methods: [get], \
                 paths: [{}, {exact: /a, prefix: /b}, {exact: a}, {prefix: /a/../b}]}}"
                    .to_owned(),
                &[
                    "spec.allow[0].http.methods[0]",
                    "spec.allow[0].http.paths[0]",
                    "spec.allow[0].http.paths[1]",
                    "spec.allow[0].http.paths[2].exact",
                    "spec.allow[0].http.paths[3].prefix",
                ],
            ),
        ] {
            assert_fields(Kind::EgressPolicy, &format!("{{allow: [{rule}]}}"), fields);
        }
        assert_fields(
            Kind::EgressPolicy,
            "{inbound: [{ports: [{port: 0}]}, {ports: []}]}",
            &["spec.inbound[0].ports[0].port", "spec.inbound[1].ports"],
        );
        assert_fields(
            Kind::EgressPolicy,
            "{selector: {matchExpressions: [{key: a, operator: Is, values: [b]}, {key: a, \
             operator: In}]}}",
            &[
                "spec.selector.matchExpressions[0].operator",
                "spec.selector.matchExpressions[1].values",
            ],
        );
    }

    #[test]
    fn a_message_says_what_is_allowed() {
        let spec = "{allow: [{hosts: [db.example], ports: [{port: 5432, protocol: TCP}]}]}";
        let yaml = format!("metadata: {{name: a}}\nspec: {spec}");
        let error = check(&read(Kind::EgressPolicy, &yaml)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "spec.allow[0].ports[0].protocol: `TCP` is refused: with hosts, allowed are TLS and \
             HTTP: nothing in TCP or UDP names a host; use cidrs for them"
        );
    }

    #[test]
    fn unknown_fields_are_named_with_those_that_exist() {
        let error =
            serde_json::from_str::<crate::kinds::EgressPolicySpec>(r#"{"alow": []}"#).unwrap_err();
        assert!(error.to_string().starts_with(
            "unknown field `alow`, expected one of `selector`, `mode`, `allow`, `inbound`"
        ));
    }

    #[test]
    fn what_is_not_enforced_is_not_accepted() {
        assert_fields(Kind::ClusterEgressPolicy, "{}", &["kind"]);
    }
}

mod traffic_policies {
    use std::time::Duration;

    use turnpike_rules::traffic as rules;

    use super::*;

    fn valid(spec: &str) -> Traffic {
        let yaml = format!("metadata: {{name: web}}\nspec: {spec}");
        let Object::TrafficPolicy(policy) = read(Kind::TrafficPolicy, &yaml) else {
            unreachable!()
        };
        traffic_policy(&policy).unwrap()
    }

    #[test]
    fn what_is_left_out_is_as_without_a_policy() {
        let Traffic { targets, policy } = valid("{targetRefs: [{kind: Service, name: web}]}");
        assert_eq!(targets, ["web".into()]);
        assert_eq!(policy, rules::TrafficPolicy::default());
    }

    #[test]
    fn everything_can_be_set() {
        let Traffic { policy, .. } = valid(
            "
  targetRefs: [{group: '', kind: Service, name: web}]
  retry:
    attempts: 3
    codes: [502, 503]
    grpcCodes: [14]
    onReset: true
    nonIdempotent: true
    backoff: {base: 10ms, max: 1s}
  retryConstraint:
    budget: {percent: 30, interval: 10s}
    minRetryRate: {count: 30, interval: 4s}
  timeouts: {connect: 500ms, request: 2s, backendRequest: 300ms, idle: 0s}
  circuitBreaker: {maxConnections: 10, maxPendingRequests: 0, maxRequests: 20}
  outlierEjection: {consecutiveFailures: 3, baseEjection: 5s, maxEjection: 1m, maxPercent: 100}
",
        );
        assert_eq!(policy.retry.attempts, 3);
        assert_eq!(policy.retry.conditions.statuses, [502, 503]);
        assert!(policy.retry.conditions.reset && policy.retry.conditions.non_idempotent);
        assert_eq!(
            policy.retry.budget,
            rules::RetryBudget {
                percent: 30.0,
                min_per_second: 8
            }
        );
        assert_eq!(policy.retry.backoff.max, Duration::from_secs(1));
        assert_eq!(policy.timeouts.request, Some(Duration::from_secs(2)));
        assert_eq!(policy.timeouts.per_try, Some(Duration::from_millis(300)));
        assert_eq!(policy.timeouts.idle, None);
        assert_eq!(policy.circuit.max_pending, 0);
        assert_eq!(
            policy.outlier.unwrap().base_ejection,
            Duration::from_secs(5)
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let target = "targetRefs: [{kind: Service, name: web}]";
        for (spec, fields) in [
            ("{targetRefs: []}".to_owned(), &["spec.targetRefs"][..]),
            (
                "{targetRefs: [{kind: Pod, name: Web}]}".to_owned(),
                &["spec.targetRefs[0].kind", "spec.targetRefs[0].name"],
            ),
            (
                format!("{{{target}, retry: {{attempts: 11, codes: [200], grpcCodes: [0]}}}}"),
                &[
                    "spec.retry.attempts",
                    "spec.retry.codes[0]",
                    "spec.retry.grpcCodes[0]",
                ],
            ),
            (
                format!("{{{target}, retry: {{backoff: {{base: 1s, max: 10ms}}}}}}"),
                &["spec.retry.backoff"],
            ),
            (
                format!(
                    "{{{target}, retryConstraint: {{budget: {{percent: 101, interval: 5s}}, \
                     minRetryRate: {{interval: 0s}}}}}}"
                ),
                &[
                    "spec.retryConstraint.budget.percent",
                    "spec.retryConstraint.budget.interval",
                    "spec.retryConstraint.minRetryRate.interval",
                ],
            ),
            (
                format!("{{{target}, timeouts: {{connect: 0s, request: 1s, backendRequest: 2s}}}}"),
                &["spec.timeouts.connect", "spec.timeouts.backendRequest"],
            ),
            (
                format!("{{{target}, circuitBreaker: {{maxConnections: 0, maxRequests: 0}}}}"),
                &[
                    "spec.circuitBreaker.maxConnections",
                    "spec.circuitBreaker.maxRequests",
                ],
            ),
            (
                format!(
                    "{{{target}, outlierEjection: {{consecutiveFailures: 0, maxPercent: 101, \
                     baseEjection: 2m, maxEjection: 1m}}}}"
                ),
                &[
                    "spec.outlierEjection.consecutiveFailures",
                    "spec.outlierEjection.maxPercent",
                    "spec.outlierEjection.baseEjection",
                ],
            ),
        ] {
            assert_fields(Kind::TrafficPolicy, &spec, fields);
        }
    }
}

mod authorization_policies {
    use turnpike_rules::authz::TextPattern;

    use super::*;
    use crate::kinds::Action;

    #[test]
    fn istios_shape_compiles() {
        let object = read(
            Kind::AuthorizationPolicy,
            "
metadata: {name: api, namespace: shop}
spec:
  selector: {matchLabels: {app: api}}
  action: DENY
  rules:
  - from: [{source: {principals: ['cluster.local/ns/shop/sa/web'], notIpBlocks: [10.0.0.1]}}]
    to: [{operation: {methods: [GET], paths: ['/v1/*', '*.css'], ports: [8080]}}]
",
        );
        let Object::AuthorizationPolicy(policy) = object else {
            unreachable!()
        };
        let Authorization { action, policy, .. } = authorization_policy(&policy).unwrap();
        assert_eq!(action, Action::Deny);
        assert_eq!(&*policy.name, "shop/api");
        let rule = &policy.rules[0];
        assert_eq!(rule.from[0].not_ip_blocks, ["10.0.0.1/32".parse().unwrap()]);
        assert_eq!(rule.to[0].paths[0], TextPattern::Prefix("/v1/".into()));
        assert_eq!(rule.to[0].paths[1], TextPattern::Suffix(".css".into()));
    }

    #[test]
    fn patterns_that_can_never_match_are_refused() {
        assert_fields(Kind::AuthorizationPolicy, "{}", &[]);
        assert_fields(Kind::AuthorizationPolicy, "{rules: [{}]}", &[]);
        assert_fields(Kind::AuthorizationPolicy, "{action: DENY}", &["spec.rules"]);
        let rule = "{from: [{source: {principals: [web, 'a*b', ''], ipBlocks: [10.0.0.1/8]}}, \
                    {source: {}}], to: [{operation: {methods: [get], hosts: [A.b, 'a:80'], paths: \
                    [a, /a/../b, '/a/*', '/a/.*', '*/b'], ports: [0]}}, {operation: {}}]}";
        assert_fields(
            Kind::AuthorizationPolicy,
            &format!("{{rules: [{rule}]}}"),
            &[
                "spec.rules[0].from[0].source.principals[0]",
                "spec.rules[0].from[0].source.principals[1]",
                "spec.rules[0].from[0].source.principals[2]",
                "spec.rules[0].from[0].source.ipBlocks[0]",
                "spec.rules[0].from[1].source",
                "spec.rules[0].to[0].operation.ports[0]",
                "spec.rules[0].to[0].operation.hosts[0]",
                "spec.rules[0].to[0].operation.hosts[1]",
                "spec.rules[0].to[0].operation.methods[0]",
                "spec.rules[0].to[0].operation.paths[0]",
                "spec.rules[0].to[0].operation.paths[1]",
                "spec.rules[0].to[1].operation",
            ],
        );
    }
}

mod mesh_wide {
    use turnpike_rules::workload::MtlsMode;

    use super::*;

    #[test]
    fn the_mesh_config_compiles() {
        let object = read(
            Kind::MeshConfig,
            "
metadata: {name: default}
spec:
  meshPrefixes: [10.0.0.0/16, 10.96.0.0/16]
  serviceCidrs: [10.96.0.0/16]
  clusterAddresses: [10.0.0.10]
  mtls: {mode: STRICT}
  telemetry: {sampling: 0.5}
",
        );
        let Object::MeshConfig(config) = object else {
            unreachable!()
        };
        let settings = mesh_config(&config).unwrap();
        assert_eq!(settings.mesh_prefixes.len(), 2);
        assert_eq!(settings.mtls, MtlsMode::Strict);
        assert!(settings.telemetry.access_log && settings.telemetry.sampling == 0.5);
    }

    #[test]
    fn bad_values_are_refused() {
        assert_fields(
            Kind::MeshConfig,
            "{meshPrefixes: [10.0.0.1/16], clusterAddresses: [10.0.0.0/8], telemetry: {sampling: \
             50}}",
            &[
                "spec.meshPrefixes[0]",
                "spec.clusterAddresses[0]",
                "spec.telemetry.sampling",
            ],
        );
        assert_fields(Kind::PeerAuthentication, "{}", &["spec"]);
        assert_fields(
            Kind::PeerAuthentication,
            "{selector: {matchLabels: {app: web}}, portLevelMtls: {'0': {}, x: {}, '80': {}}}",
            &["spec.portLevelMtls.0", "spec.portLevelMtls.x"],
        );
        assert_fields(Kind::Telemetry, "{sampling: -1}", &["spec.sampling"]);
        let other = read(Kind::MeshConfig, "{metadata: {name: other}, spec: {}}");
        assert!(
            check(&other)
                .unwrap_err()
                .to_string()
                .contains("named `default`")
        );
    }

    #[test]
    fn modes_of_ports_are_those_of_pods_that_a_selector_names() {
        for (selector, fields) in [
            ("", &["spec.portLevelMtls"][..]),
            ("selector: {},", &["spec.portLevelMtls"]),
            ("selector: {matchLabels: {}},", &["spec.portLevelMtls"]),
            ("selector: {matchLabels: {app: web}},", &[]),
            (
                "selector: {matchExpressions: [{key: app, operator: Exists}]},",
                &[],
            ),
        ] {
            for mtls in ["", "mtls: {mode: STRICT},"] {
                let spec = format!("{{{selector} {mtls} portLevelMtls: {{'80': {{}}}}}}");
                assert_fields(Kind::PeerAuthentication, &spec, fields);
            }
        }
    }

    #[test]
    fn names_are_those_of_kubernetes() {
        let object = read(Kind::Pod, "{metadata: {name: A_b, namespace: ''}}");
        assert_eq!(
            check(&object).unwrap_err().problems()[0].field,
            "metadata.name"
        );
        let object = read(Kind::Pod, "{metadata: {name: a, namespace: B}}");
        assert_eq!(
            check(&object).unwrap_err().problems()[0].field,
            "metadata.namespace"
        );
    }
}
