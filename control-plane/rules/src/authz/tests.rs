use super::*;

fn patterns(texts: &[&str]) -> Vec<TextPattern> {
    texts.iter().map(|text| TextPattern::parse(text)).collect()
}

fn policy(name: &str, from: Vec<Source>, to: Vec<Operation>) -> Policy {
    Policy {
        name: name.into(),
        rules: vec![Rule { from, to }],
    }
}

fn to(paths: &[&str], methods: &[&str]) -> Operation {
    Operation {
        paths: patterns(paths),
        methods: patterns(methods),
        ..Operation::default()
    }
}

fn from(principals: &[&str]) -> Source {
    Source {
        principals: patterns(principals),
        ..Source::default()
    }
}

fn web() -> Identity {
    Identity::new("cluster.local", "shop", "web").unwrap()
}

fn http<'a>(identity: Option<&'a Identity>, method: &'a str, path: &'a str) -> Call<'a> {
    Call {
        identity,
        source: "10.0.0.7".parse().unwrap(),
        port: 8080,
        http: Some(HttpCall {
            method,
            host: "api.shop",
            path,
        }),
    }
}

fn tcp(identity: Option<&Identity>) -> Call<'_> {
    Call {
        identity,
        source: "10.0.0.7".parse().unwrap(),
        port: 8080,
        http: None,
    }
}

#[test]
fn deny_goes_before_allow_and_no_allow_means_all() {
    let web = web();
    let call = http(Some(&web), "GET", "/a");
    let none = Authorization::default();
    assert_eq!(
        none.check(&call),
        Verdict {
            allowed: true,
            policy: None
        }
    );

    let allow = policy("shop/allow", vec![from(&["*"])], vec![]);
    let deny = policy("shop/deny", vec![], vec![to(&["/admin*"], &[])]);
    let both = Authorization {
        deny: vec![deny.clone()],
        allow: vec![allow],
    };
    assert_eq!(
        both.check(&call),
        Verdict {
            allowed: true,
            policy: Some("shop/allow")
        }
    );
    let admin = http(Some(&web), "GET", "/admin/x");
    assert_eq!(
        both.check(&admin),
        Verdict {
            allowed: false,
            policy: Some("shop/deny")
        }
    );
    assert_eq!(
        both.check(&http(None, "GET", "/a")),
        Verdict {
            allowed: false,
            policy: None
        }
    );

    let only_deny = Authorization {
        deny: vec![deny],
        allow: vec![],
    };
    assert_eq!(
        only_deny.check(&call),
        Verdict {
            allowed: true,
            policy: None
        }
    );

    let nothing = Policy {
        name: "shop/nothing".into(),
        rules: vec![],
    };
    let allow_nothing = Authorization {
        deny: vec![],
        allow: vec![nothing.clone()],
    };
    assert!(!allow_nothing.check(&call).allowed);
    let deny_nothing = Authorization {
        deny: vec![nothing],
        allow: vec![],
    };
    assert!(deny_nothing.check(&call).allowed);
}

#[test]
fn identities_match_as_istio_writes_them() {
    let web = web();
    for (pattern, hit) in [
        ("cluster.local/ns/shop/sa/web", true),
        ("spiffe://cluster.local/ns/shop/sa/web", true),
        ("cluster.local/ns/shop/sa/web2", false),
        ("cluster.local/ns/shop/sa/we", false),
        ("cluster.local/ns/shop/*", true),
        ("spiffe://cluster.local/ns/shop/*", true),
        ("cluster.local/ns/sho*", true),
        ("cluster.local/ns/shopping/*", false),
        ("*/ns/shop/sa/web", true),
        ("*/sa/web", true),
        ("*eb", true),
        ("*/sa/xweb", false),
        ("cluster.local/ns/shop/sa/web*", true),
        ("cluster.local/ns/shop/sa/web-*", false),
        ("*", true),
    ] {
        assert_eq!(
            TextPattern::parse(pattern).matches_identity(&web),
            hit,
            "{pattern}"
        );
    }
}

#[test]
fn sources_need_each_list() {
    let web = web();
    let source = Source {
        namespaces: patterns(&["shop"]),
        ip_blocks: vec!["10.0.0.0/24".parse().unwrap()],
        not_ip_blocks: vec!["10.0.0.8/32".parse().unwrap()],
        ..Source::default()
    };
    let rules = Authorization {
        deny: vec![],
        allow: vec![policy("p", vec![source], vec![])],
    };
    let at = |address: &str| Call {
        source: address.parse().unwrap(),
        ..tcp(Some(&web))
    };
    assert!(rules.check(&at("10.0.0.7")).allowed);
    assert!(rules.check(&at("::ffff:10.0.0.7")).allowed);
    assert!(!rules.check(&at("10.0.0.8")).allowed);
    assert!(!rules.check(&at("10.0.1.7")).allowed);
    assert!(
        !rules.check(&tcp(None)).allowed,
        "without identity there is no namespace"
    );
}

#[test]
fn negated_sources_take_in_callers_without_identity() {
    let web = web();
    let others = Source {
        not_principals: patterns(&["*/sa/web"]),
        ..Source::default()
    };
    let deny = Authorization {
        deny: vec![policy("p", vec![others], vec![])],
        allow: vec![],
    };
    assert!(deny.check(&tcp(Some(&web))).allowed);
    assert!(!deny.check(&tcp(None)).allowed);
    // Istio's way to refuse plaintext.
    let anyone = Source {
        not_principals: patterns(&["*"]),
        ..Source::default()
    };
    let deny = Authorization {
        deny: vec![policy("p", vec![anyone], vec![])],
        allow: vec![],
    };
    assert!(deny.check(&tcp(Some(&web))).allowed);
    assert!(!deny.check(&tcp(None)).allowed);
}

#[test]
fn http_rules_fail_closed_on_opaque_tcp() {
    let rule = || policy("p", vec![], vec![to(&["/a"], &["GET"])]);
    let allow = Authorization {
        deny: vec![],
        allow: vec![rule()],
    };
    assert!(!allow.check(&tcp(None)).allowed);
    let deny = Authorization {
        deny: vec![rule()],
        allow: vec![],
    };
    assert!(!deny.check(&tcp(None)).allowed);
    let on_port = Operation {
        ports: vec![9090],
        ..to(&["/a"], &[])
    };
    let deny = Authorization {
        deny: vec![policy("p", vec![], vec![on_port])],
        allow: vec![],
    };
    assert!(deny.check(&tcp(None)).allowed, "another port");
}

#[test]
fn operations_need_each_list() {
    let operation = Operation {
        hosts: patterns(&["api.*"]),
        methods: patterns(&["GET", "HEAD"]),
        not_paths: patterns(&["/internal/*"]),
        ports: vec![8080],
        ..Operation::default()
    };
    let rules = Authorization {
        deny: vec![],
        allow: vec![policy("p", vec![], vec![operation])],
    };
    assert!(rules.check(&http(None, "GET", "/a")).allowed);
    assert!(!rules.check(&http(None, "POST", "/a")).allowed);
    assert!(!rules.check(&http(None, "GET", "/internal/x")).allowed);
    assert!(
        !rules
            .check(&Call {
                port: 8081,
                ..http(None, "GET", "/a")
            })
            .allowed
    );
}

#[test]
fn a_path_that_reads_two_ways_is_judged_by_both() {
    let deny = Authorization {
        deny: vec![policy(
            "p",
            vec![],
            vec![to(&["/admin", "/admin/*", "/a:b"], &[])],
        )],
        allow: vec![],
    };
    for path in [
        "/admin",
        "/admin;x",
        "/admin;x/y",
        "//admin",
        "/admin//y",
        "/a%3Ab",
    ] {
        assert!(!deny.check(&http(None, "GET", path)).allowed, "{path}");
    }
    let allow = Authorization {
        deny: vec![],
        allow: vec![policy(
            "p",
            vec![],
            vec![to(&["/public/*", "*.css", "/a%20b"], &[])],
        )],
    };
    for (path, allowed) in [
        ("/public/a", true),
        ("/public/a;v=1", true),
        ("/public//a", true),
        ("/public/a%20b", true),
        ("/a%20b", true),
        ("/a/site.css", true),
        ("/admin;x.css", false),
        ("/public;x/a", false),
    ] {
        assert_eq!(
            allow.check(&http(None, "GET", path)).allowed,
            allowed,
            "{path}"
        );
    }
    let except = Operation {
        not_paths: patterns(&["/admin*"]),
        ..Operation::default()
    };
    let allow = Authorization {
        deny: vec![],
        allow: vec![policy("p", vec![], vec![except])],
    };
    assert!(!allow.check(&http(None, "GET", "//admin")).allowed);
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The walk over the parts is the match on the whole text.
        #[test]
        fn identity_patterns_match_as_text(
            pattern in "\\*?[a-z./]{0,12}\\*?|cluster\\.local/ns/[a-z]{1,3}(/sa/)?[a-z]{0,3}\\*?",
            namespace in "[a-z]{1,3}",
            account in "[a-z]{1,3}",
        ) {
            let identity = Identity::new("cluster.local", &*namespace, &*account).unwrap();
            let text = format!("cluster.local/ns/{namespace}/sa/{account}");
            let pattern = TextPattern::parse(&pattern);
            prop_assert_eq!(pattern.matches_identity(&identity), pattern.matches(&text));
        }
    }
}
