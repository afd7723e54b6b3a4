//! The source: everything there is, every change, and what cannot be read.

use super::{
    apiserver::ApiServer,
    controller::{self, Controller},
};
use crate::common::eventually;

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: turnpike.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, \
         namespace: shop}}\nspec: {{targetRefs: [{{kind: Service, name: web}}], {spec}}}\n"
    )
}

/// The objects that the model has a status of.
fn judged(controller: &Controller) -> Vec<String> {
    let status = controller.json("/debug/status");
    let policies = status["policies"].as_array().unwrap().iter();
    policies
        .map(|policy| policy["object"].as_str().unwrap().to_owned())
        .collect()
}

fn wait_judged(controller: &Controller, expected: &[&str]) {
    eventually(&format!("{expected:?}"), || {
        (judged(controller) == expected).then_some(())
    });
}

#[test]
#[ignore = "needs a real kube-apiserver: cargo verify kubernetes"]
fn what_changes_in_the_api_changes_in_the_model() {
    let mut api = ApiServer::start();
    controller::install(&api);
    api.namespace("shop", "");
    // No CRD of ours, no Gateway API: said, and no reason to wait.
    let controller = Controller::start(&api);
    let absent = controller.rejections("trafficpolicies.turnpike.dev");
    assert!(
        absent[0].contains("does not exist in this cluster; install the chart's CRDs"),
        "{absent:?}"
    );
    let routes = controller.rejections("httproutes.gateway.networking.k8s.io");
    assert!(
        routes[0].contains("install the Gateway API's CRDs"),
        "{routes:?}"
    );

    api.install_crds();
    api.apply(&policy("one", "retry: {attempts: 2}"));
    wait_judged(&controller, &["TrafficPolicy shop/one"]);
    assert!(
        controller
            .rejections("trafficpolicies.turnpike.dev does not")
            .is_empty()
    );
    eventually("nothing more to say of the kind", || {
        controller
            .rejections("does not exist")
            .iter()
            .all(|text| !text.contains("turnpike.dev`"))
            .then_some(())
    });

    // What CEL lets pass and we refuse is quarantined alone; what was good of it stays.
    api.apply(&policy("two", "retry: {attempts: 2}"));
    wait_judged(
        &controller,
        &["TrafficPolicy shop/one", "TrafficPolicy shop/two"],
    );
    let egress = "apiVersion: turnpike.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: e, \
                  namespace: shop}\nspec: {allow: [{hosts: ['a..b'], ports: [{port: 443, \
                  protocol: TLS}]}]}\n";
    api.apply(egress);
    let refused = eventually("the refusal", || {
        controller.rejections("egresspolicies/e").pop()
    });
    assert!(
        refused.contains("spec.allow[0].hosts[0]") && refused.contains("nothing of it is in force"),
        "{refused}"
    );
    api.apply(&egress.replace("a..b", "a.example"));
    eventually("it is mended", || {
        controller
            .rejections("egresspolicies/e")
            .is_empty()
            .then_some(())
    });
    api.apply(egress);
    let refused = eventually("the refusal", || {
        controller.rejections("egresspolicies/e").pop()
    });
    assert!(
        refused.contains("its last good version stays in force"),
        "{refused}"
    );

    a_gap_is_closed_by_a_new_list(&mut api, &controller);
    lost_rights_are_named(&mut api, &controller);
}

fn a_gap_is_closed_by_a_new_list(api: &mut ApiServer, controller: &Controller) {
    api.stop_server();
    let said = eventually("the outage is said", || {
        controller.rejections("cannot be reached").pop()
    });
    assert!(
        said.contains("what was read before stays in force"),
        "{said}"
    );
    assert_eq!(
        controller.get("/healthz/ready").0,
        200,
        "it serves what it has"
    );
    assert!(judged(controller).contains(&"TrafficPolicy shop/two".to_owned()));
    api.start_server();
    eventually("it is over", || {
        controller
            .rejections("cannot be reached")
            .is_empty()
            .then_some(())
    });
    api.kubectl(&["delete", "trafficpolicy", "--namespace=shop", "two"]);
    eventually("the deletion", || {
        (!judged(controller).contains(&"TrafficPolicy shop/two".to_owned())).then_some(())
    });
}

fn lost_rights_are_named(api: &mut ApiServer, controller: &Controller) {
    api.apply(&policy("three", "retry: {attempts: 2}"));
    eventually("three", || {
        judged(controller)
            .contains(&"TrafficPolicy shop/three".to_owned())
            .then_some(())
    });
    api.kubectl(&["delete", "clusterrolebinding", "turnpike-controller"]);
    // A watch that stands is not ended by a lost right; the controller asks anew twice a minute.
    let said = eventually("the lost right", || {
        controller
            .rejections("trafficpolicies.turnpike.dev  it cannot be read")
            .pop()
    });
    assert!(
        said.contains("User \"system:serviceaccount:turnpike-system:turnpike-controller\" cannot"),
        "{said}"
    );
    assert!(said.contains("grant verbs get, list and watch on resource `trafficpolicies` of apiGroup `turnpike.dev`"), "{said}");
    assert!(
        judged(controller).contains(&"TrafficPolicy shop/three".to_owned()),
        "it stays in force"
    );
    // Deleted while nothing can be seen: only a new list can tell.
    api.kubectl(&["delete", "trafficpolicy", "--namespace=shop", "three"]);

    let mut other = Controller::launch(api);
    other.ready_is_refused(&["pods", "cannot list resource"]);
    drop(other);

    api.apply(&api.chart(&["rbac.yaml"]));
    eventually("the deletion", || {
        (!judged(controller).contains(&"TrafficPolicy shop/three".to_owned())).then_some(())
    });
    eventually("nothing is forbidden", || {
        controller.rejections("forbidden").is_empty().then_some(())
    });
}

impl Controller {
    /// It is up, never ready, and says why.
    fn ready_is_refused(&mut self, expected: &[&str]) {
        self.up();
        eventually("the reason", || {
            let (status, body) = self.get("/healthz/ready");
            assert_eq!(status, 503, "{body}");
            expected
                .iter()
                .all(|text| body.contains(text))
                .then_some(())
        });
    }
}
