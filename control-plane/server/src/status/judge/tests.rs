use std::collections::BTreeSet;

use serde_json::json;
use turnpike_discovery::RefusedBy;
use turnpike_model::{Condition, ResourceType};

use super::*;

fn key(kind: Kind) -> ObjectKey {
    ObjectKey::new(kind, "shop", "a")
}

fn object(parents: Vec<Value>, status: Value) -> PolicyObject {
    PolicyObject {
        uid: "u".into(),
        generation: Some(3),
        resource_version: "7".into(),
        status,
        parents,
        refused: None,
    }
}

fn texts(conditions: &[Said]) -> Vec<String> {
    let text = |said: &Said| format!("{}={} {}", said.kind, said.holds, said.reason);
    conditions.iter().map(text).collect()
}

fn policy(adoption: &Adoption) -> (Vec<String>, String, String) {
    let object = object(vec![], Value::Null);
    let verdict = on_known(&key(Kind::EgressPolicy), &object, &[], adoption);
    let Verdict::Policy {
        conditions,
        proxies,
    } = verdict
    else {
        panic!("{verdict:?}")
    };
    (
        texts(&conditions),
        proxies,
        conditions.last().unwrap().message.clone(),
    )
}

#[test]
fn programmed_is_what_has_been_acknowledged() {
    let adoption = |subscribers, current, absent: &[&str]| Adoption {
        subscribers,
        current,
        absent: absent
            .iter()
            .map(|a| (*a).to_owned())
            .collect::<BTreeSet<_>>(),
        ..Adoption::default()
    };
    let (conditions, proxies, _) = policy(&adoption(2, 2, &[]));
    assert_eq!(
        conditions,
        ["Accepted=true Accepted", "Programmed=true Programmed"]
    );
    assert_eq!(proxies, "2/2");
    let (conditions, proxies, message) = policy(&adoption(3, 1, &[]));
    assert_eq!(conditions[1], "Programmed=false Pending");
    assert_eq!(
        (&*proxies, &*message),
        ("1/3", "2 of 3 have not acknowledged it yet")
    );
    let (conditions, proxies, message) = policy(&adoption(1, 1, &["gate of node-b"]));
    assert_eq!(conditions[1], "Programmed=false Pending");
    assert_eq!(proxies, "1/2");
    assert!(
        message.starts_with("waiting for the gate of node-b: not connected"),
        "{message}"
    );

    let mut refused = adoption(2, 1, &[]);
    refused.refused = 2;
    refused.refusals = vec![RefusedBy {
        subscriber: "pod web-1".into(),
        kind: ResourceType::SelfConfig,
        resource: "u1".into(),
        message: Some("no such thing".into()),
    }];
    let (conditions, _, message) = policy(&refused);
    assert_eq!(conditions[1], "Programmed=false Refused");
    let expected =
        "pod web-1 keeps what it had, since it refuses Self `u1`: no such thing (and 1 more)";
    assert_eq!(message, expected);
}

#[test]
fn what_is_refused_is_programmed_nowhere() {
    let object = object(vec![], Value::Null);
    let verdict = on_refused(
        &key(Kind::EgressPolicy),
        &object,
        "Invalid",
        "spec.x: unknown",
    );
    let Verdict::Policy { conditions, .. } = verdict else {
        panic!("{verdict:?}")
    };
    assert_eq!(
        texts(&conditions),
        ["Accepted=false Invalid", "Programmed=false NotAccepted"]
    );
    assert_eq!(conditions[0].message, "spec.x: unknown");
}

#[test]
fn each_parent_of_a_route_has_its_own_word() {
    let web = json!({"group": "", "kind": "Service", "name": "web", "port": 80});
    let web_admin = json!({"group": "", "kind": "Service", "name": "web", "port": 81});
    let gateway = json!({"name": "gateway"});
    let object = object(vec![web.clone(), gateway, web_admin.clone()], Value::Null);
    let condition = |kind, holds, reason| Condition {
        kind,
        holds,
        reason,
        message: String::new(),
    };
    let status = |accepted| ObjectStatus {
        object: key(Kind::HttpRoute),
        parent: Some("shop/web".into()),
        conditions: vec![
            condition(ConditionKind::Accepted, accepted, "NoMatchingParent"),
            condition(ConditionKind::ResolvedRefs, true, "ResolvedRefs"),
        ],
    };
    let statuses = [status(true), status(false)];
    let verdict = on_known(
        &key(Kind::HttpRoute),
        &object,
        &statuses,
        &Adoption::default(),
    );
    let Verdict::Route(parents) = verdict else {
        panic!("{verdict:?}")
    };
    assert_eq!(parents.len(), 2);
    assert_eq!((&parents[0].0, &parents[1].0), (&web, &web_admin));
    assert!(parents[0].1[0].holds && parents[0].1[2].holds);
    assert!(!parents[1].1[0].holds && !parents[1].1[2].holds);

    let why = "spec.rules[0].timeouts.request: `1x` is refused: allowed is …";
    let verdict = on_refused(&key(Kind::HttpRoute), &object, "Invalid", why);
    let Verdict::Route(parents) = verdict else {
        panic!("{verdict:?}")
    };
    assert_eq!(
        texts(&parents[1].1),
        [
            "Accepted=false UnsupportedValue",
            "ResolvedRefs=true ResolvedRefs",
            "Programmed=false NotAccepted"
        ]
    );
}

#[test]
fn a_setback_must_last_and_a_new_generation_need_not() {
    let pending = |holds: bool| Verdict::Policy {
        conditions: vec![
            said(ACCEPTED, true, ACCEPTED, ""),
            said(
                PROGRAMMED,
                holds,
                if holds { PROGRAMMED } else { PENDING },
                "",
            ),
        ],
        proxies: "0/1".into(),
    };
    let stands = |generation: i64| {
        let condition =
            |kind: &str| json!({"type": kind, "status": "True", "observedGeneration": generation});
        let conditions = [condition(ACCEPTED), condition(PROGRAMMED)];
        object(vec![], json!({ "conditions": conditions }))
    };
    let late = RETURN * 2;
    assert_eq!(patience(&pending(false), &stands(3), late), SETBACK);
    assert_eq!(
        patience(&pending(false), &stands(2), late),
        SOON,
        "it says nothing of this one"
    );
    assert_eq!(patience(&pending(true), &stands(3), late), NUMBERS);
    let new = object(vec![], Value::Null);
    assert_eq!(patience(&pending(false), &new, late), SOON);
    assert_eq!(patience(&pending(true), &new, late), SOON);
    assert_eq!(
        patience(&pending(true), &new, Duration::from_secs(1)),
        RETURN - Duration::from_secs(1),
        "those whom it concerns may not be back"
    );
}

#[test]
fn a_routes_setback_must_last_too() {
    let web = json!({"name": "web"});
    let said = |kind, holds, reason| said(kind, holds, reason, "");
    let pending = vec![
        said(ACCEPTED, true, ACCEPTED),
        said(PROGRAMMED, false, PENDING),
    ];
    let verdict = Verdict::Route(vec![(web.clone(), pending)]);
    let of = |controller: &str| {
        let condition = |kind| json!({"type": kind, "status": "True", "observedGeneration": 3});
        let conditions = [condition(ACCEPTED), condition(PROGRAMMED)];
        let parent = json!({
            "parentRef": web, "controllerName": controller, "conditions": conditions,
        });
        object(vec![web.clone()], json!({ "parents": [parent] }))
    };
    assert_eq!(
        patience(&verdict, &of("turnpike.dev/controller"), RETURN),
        SETBACK
    );
    assert_eq!(
        patience(&verdict, &of("example.com/another"), RETURN),
        SOON,
        "that is another's word"
    );
}
