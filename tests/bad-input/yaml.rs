//! Files that a person gets wrong.

use serde_json::Value;
use turnpike_rig::{World, wait_for};

use super::{SOON, served, world};

#[test]
fn a_bad_object_is_reported_with_its_place_and_changes_nothing() {
    let world = world("bad-yaml");
    let policy = |spec: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: t, namespace: shop}}\nspec:\n{spec}"
        )
    };
    let cases = [
        ("syntax", "kind: [unclosed".to_owned(), "line"),
        ("kind", "apiVersion: turnpike.dev/v1alpha1\nkind: TraficPolicy\nmetadata: {name: t}\n".into(), "TrafficPolicy"),
        ("field", policy("  targetRefs: [{kind: Service, name: web}]\n  timeuots: {request: 1s}\n"), "timeouts"),
        (
            "route",
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}\nspec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n  rules:\n  - timeouts: {requst: 1s}\n    backendRefs: [{name: web, port: 80}]\n".into(),
            "requst",
        ),
        ("value", policy("  targetRefs: [{kind: Service, name: web}]\n  timeouts: {request: soon}\n"), "request"),
        (
            "egress",
            "apiVersion: turnpike.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: e, namespace: shop}\nspec:\n  selector: {}\n  allow:\n  - hosts: [\"*\"]\n    ports: [{port: 443, protocol: TLS}]\n".into(),
            "hosts",
        ),
    ];
    for (name, yaml, told) in cases {
        let file = format!("bad-{name}");
        world.directory.write(&file, &yaml).unwrap();
        let reported = wait_for(SOON, || {
            let rejections = world.ask_controller("/debug/rejections").ok()?.body;
            let all: Value = serde_json::from_str(&rejections).ok()?;
            let list = all.get("rejections").unwrap_or(&all).as_array()?.clone();
            list.into_iter()
                .find(|rejection| rejection.to_string().contains(&file))
        });
        let reported = reported.unwrap_or_else(|| panic!("{name} was not reported"));
        assert!(
            reported["line"].as_u64().is_some_and(|line| line > 0),
            "{name}: {reported}"
        );
        assert!(
            reported.to_string().contains(told),
            "{name} should mention {told}: {reported}"
        );
        assert!(served(&world), "{name} changed something");
        world.directory.remove(&file).unwrap();
    }
    conflict(&world, &policy);
    let clear = wait_for(SOON, || {
        let body = world.ask_controller("/debug/rejections").ok()?.body;
        (!body.contains("bad-")).then_some(())
    });
    assert!(clear.is_some(), "a file that is gone is reported no more");
}

/// Two policies for one Service: the one that does not hold is named with its place, and what holds
/// goes on.
#[test]
fn a_conflicting_policy_is_reported_with_its_place_and_changes_nothing() {
    let world = world("bad-pair");
    let policy = |name: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec:\n  targetRefs: [{{kind: Service, name: web}}]\n  timeouts: {{request: 5s}}\n"
        )
    };
    let conflict = |name: &str| -> Option<Value> {
        let status = world.ask_controller("/debug/status").ok()?.body;
        let status: Value = serde_json::from_str(&status).ok()?;
        let object = format!("TrafficPolicy shop/{name}");
        let policies = status["policies"].as_array()?.clone();
        let policy = policies.into_iter().find(|p| p["object"] == object)?;
        let conditions = policy["conditions"].as_array()?.clone();
        conditions
            .into_iter()
            .find(|c| c["type"] == "Conflicted" || c["reason"] == "Conflicted")
    };
    world.directory.write("first", &policy("first")).unwrap();
    world.directory.write("second", &policy("second")).unwrap();
    let told = wait_for(SOON, || conflict("second"))
        .unwrap_or_else(|| panic!("{}", world.ask_controller("/debug/status").unwrap().body));
    let text = told.to_string();
    for part in ["shop/first", "Service", "web"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(conflict("first").is_none(), "the one that holds is told of");
    assert!(served(&world), "a conflict changed something");
    world.directory.remove("first").unwrap();
    let settled = wait_for(SOON, || conflict("second").is_none().then_some(()));
    assert!(settled.is_some(), "alone it still conflicts");
}

/// Each of two policies for one Service is good by itself: the second is told where it stands.
fn conflict(world: &World, policy: &dyn Fn(&str) -> String) {
    let first = policy("  targetRefs: [{kind: Service, name: web}]\n  timeouts: {request: 9s}\n");
    let second = policy("  timeouts: {request: 1s}\n  targetRefs: [{kind: Service, name: web}]\n")
        .replace("name: t,", "name: u,");
    world.directory.write("a-first", &first).unwrap();
    world.directory.write("b-second", &second).unwrap();
    let told = wait_for(SOON, || {
        let status = world.ask_controller("/debug/status").ok()?.body;
        let status: Value = serde_json::from_str(&status).ok()?;
        let policies = status["policies"].as_array()?;
        let second = |policy: &&Value| policy["object"] == "TrafficPolicy shop/u";
        let conflicted = policies.iter().find(second)?.clone();
        // The place follows when changes have settled.
        let told = conflicted.to_string().contains("Conflicted") && conflicted["place"].is_object();
        told.then_some(conflicted)
    });
    let told = told.expect("the conflict was not reported");
    let place = serde_json::json!({"file": "b-second.yaml", "line": 6, "field": "spec.targetRefs"});
    assert_eq!(told["place"], place, "{told}");
    for name in ["`shop/t`", "Service `shop/web`"] {
        assert!(told.to_string().contains(name), "{told}");
    }
    world.directory.remove("a-first").unwrap();
    world.directory.remove("b-second").unwrap();
}
