//! What policies make of a pod.

use std::net::IpAddr;

use turnpike_api::Kind;
use turnpike_model::{Model, ResourceType, Settings};
use turnpike_rules::{Identity, authz::Call, workload::MtlsMode};

use super::{
    WEB,
    common::{key, load, model},
    world,
};

#[test]
fn the_narrowest_peer_authentication_holds() {
    let policy = |namespace: &str, name: &str, spec: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: PeerAuthentication\n\
             metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n---\n"
        )
    };
    let mesh = policy("turnpike-system", "mesh", "{mtls: {mode: STRICT}}");
    let namespace = policy("shop", "all", "{mtls: {mode: PERMISSIVE}}");
    let workload = policy(
        "shop",
        "web",
        "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, \
         portLevelMtls: {'8080': {mode: PERMISSIVE}}}",
    );
    let ports_only = policy(
        "shop",
        "web",
        "{selector: {matchLabels: {app: web}}, portLevelMtls: {'8080': {mode: STRICT}}}",
    );
    let config = "apiVersion: turnpike.dev/v1alpha1\nkind: MeshConfig\n\
                  metadata: {name: default}\nspec: {mtls: {mode: STRICT}}\n---\n";
    let (strict, permissive) = (MtlsMode::Strict, MtlsMode::Permissive);
    for (yaml, mode, at_8080) in [
        (String::new(), permissive, permissive),
        (config.to_owned(), strict, strict),
        (mesh.clone(), strict, strict),
        (format!("{mesh}{namespace}"), permissive, permissive),
        (format!("{mesh}{namespace}{workload}"), strict, permissive),
        (format!("{mesh}{ports_only}"), strict, strict),
        (format!("{namespace}{ports_only}"), permissive, strict),
    ] {
        let own = world(&yaml).self_config("u1").unwrap();
        assert_eq!((own.mtls, own.mtls_for(8080)), (mode, at_8080), "{yaml}");
    }
}

#[test]
fn authorization_selects_by_label_namespace_and_mesh() {
    let policy = |namespace: &str, name: &str, action: &str, selector: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: AuthorizationPolicy\n\
             metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{action: {action}, \
             {selector} rules: [{{to: [{{operation: {{ports: [8080]}}}}]}}]}}\n---\n"
        )
    };
    let model = world(
        &[
            policy("shop", "all", "ALLOW", ""),
            policy(
                "shop",
                "web",
                "DENY",
                "selector: {matchLabels: {app: web}},",
            ),
            policy(
                "shop",
                "api",
                "DENY",
                "selector: {matchLabels: {app: api}},",
            ),
            policy("bank", "all", "DENY", ""),
            policy("turnpike-system", "mesh", "DENY", ""),
        ]
        .concat(),
    );
    let authorization = model.self_config("u1").unwrap().authorization;
    let names = |list: &[turnpike_rules::authz::Policy]| {
        list.iter()
            .map(|policy| policy.name.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&authorization.allow), ["shop/all"]);
    assert_eq!(
        names(&authorization.deny),
        ["shop/web", "turnpike-system/mesh"]
    );
}

#[test]
fn cluster_local_in_principals_is_the_meshs_own_trust_domain() {
    for trust_domain in ["cluster.local", "prod.example"] {
        let mut model = Model::new(Settings {
            cluster: "cluster".into(),
            trust_domain: trust_domain.into(),
            network: "default".into(),
        });
        load(&mut model, WEB);
        for (principal, denied) in [
            ("cluster.local/ns/bank/sa/api", true),
            ("spiffe://cluster.local/ns/bank/sa/api", true),
            ("cluster.local/ns/bank/*", true),
            ("cluster.local*", true),
            ("*/ns/bank/sa/api", true),
            ("cluster.local/ns/bank/sa/other", false),
            ("cluster.localhost/ns/bank/sa/api", false),
            ("other.example/ns/bank/sa/api", false),
            (&format!("{trust_domain}/ns/bank/sa/api"), true),
        ] {
            for (field, denied) in [("principals", denied), ("notPrincipals", !denied)] {
                let policy = format!(
                    "apiVersion: turnpike.dev/v1alpha1\nkind: AuthorizationPolicy\n\
                     metadata: {{name: web, namespace: shop}}\nspec: {{action: DENY, rules: \
                     [{{from: [{{source: {{{field}: ['{principal}']}}}}]}}]}}\n"
                );
                load(&mut model, &policy);
                let caller = Identity::new(trust_domain, "bank", "api").unwrap();
                let call = Call {
                    identity: Some(&caller),
                    source: "10.0.0.7".parse().unwrap(),
                    port: 8080,
                    http: None,
                };
                let authorization = model.self_config("u1").unwrap().authorization;
                let allowed = authorization.check(&call).allowed;
                assert_eq!(allowed, !denied, "{trust_domain} {field} {principal}");
            }
        }
    }
}

#[test]
fn an_egress_policy_selects_for_the_gate_and_the_agent() {
    let model = world(
        "
apiVersion: turnpike.dev/v1alpha1
kind: EgressPolicy
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  allow: [{hosts: [api.payments.example], ports: [{port: 443, protocol: TLS}]}]
  inbound: [{ports: [{port: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: free, namespace: shop, uid: u3}
spec: {nodeName: node-a, containers: [{name: app}]}
status: {podIP: 10.0.0.3}
---
apiVersion: v1
kind: Pod
metadata: {name: host, namespace: shop, uid: u4, labels: {app: web}}
spec: {nodeName: node-a, hostNetwork: true, containers: [{name: app}]}
status: {podIP: 10.0.0.100}
",
    );
    let network = model.pod_network("cluster/shop/web-1").unwrap();
    assert!(network.selected && network.capture.is_some());
    assert_eq!(network.inbound.len(), 1);
    let egress = model.pod_egress("cluster/shop/web-1").unwrap();
    assert_eq!(&*egress.policies[0].name, "shop/web");
    assert!(!egress.policies[0].version.is_empty());
    let free = model.pod_network("cluster/shop/free").unwrap();
    assert!(!free.selected && free.capture.is_none());
    assert!(
        model
            .pod_egress("cluster/shop/free")
            .unwrap()
            .policies
            .is_empty()
    );
    assert!(
        model.pod_network("cluster/shop/host").is_none(),
        "its node's network is not ours"
    );
    let mut pods = model.pods_of("node-a");
    pods.sort();
    assert_eq!(
        pods,
        ["cluster/shop/free".into(), "cluster/shop/web-1".into()]
    );
    let members = model.members("cluster/node-a").unwrap().addresses;
    assert_eq!(
        members,
        ["10.0.0.1".parse::<IpAddr>().unwrap(), [10, 0, 0, 3].into()]
    );
}

#[test]
fn the_api_server_belongs_to_the_cluster_wherever_it_is() {
    let slice = |name: &str, address: &str| {
        format!(
            "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: default, labels: {{kubernetes.io/service-name: kubernetes}}}}
addressType: IPv4
ports: [{{name: https, port: 6443}}]
endpoints: [{{addresses: [{address}]}}]
"
        )
    };
    let mut model = model();
    let mesh = "{apiVersion: turnpike.dev/v1alpha1, kind: MeshConfig, metadata: {name: default}, spec: \
                {clusterAddresses: [10.0.0.7]}}";
    load(&mut model, mesh);
    let members = |model: &Model| model.members("cluster/static").unwrap().addresses;
    let at = |addresses: &[[u8; 4]]| -> Vec<IpAddr> {
        addresses.iter().map(|&address| address.into()).collect()
    };
    assert_eq!(members(&model), at(&[[10, 0, 0, 7]]));
    for (address, expected) in [("10.0.0.10", [10, 0, 0, 10]), ("10.0.0.11", [10, 0, 0, 11])] {
        let changes = load(&mut model, &slice("kubernetes", address));
        let told = changes
            .iter()
            .any(|(kind, name)| kind == ResourceType::Members && &**name == "cluster/static");
        assert!(told, "agents and gates hear of {address}");
        assert_eq!(members(&model), at(&[[10, 0, 0, 7], expected]));
    }
    model.delete(&key(Kind::EndpointSlice, "default", "kubernetes"));
    assert_eq!(members(&model), at(&[[10, 0, 0, 7]]));
}

#[test]
fn where_no_range_is_given_each_service_is_the_clusters_by_its_address() {
    let service = |name: &str, address: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: \
             kube-system}}\nspec: {{clusterIP: {address}, ports: [{{port: 53}}]}}\n"
        )
    };
    let mut model = model();
    let services = |model: &Model| -> Vec<String> {
        let members = model.members("cluster/static").unwrap();
        members.services.iter().map(ToString::to_string).collect()
    };
    let mesh = |ranges: &str| {
        format!(
            "apiVersion: turnpike.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default}}\n\
             spec: {{serviceCidrs: [{ranges}]}}\n"
        )
    };
    load(&mut model, &mesh(""));
    let changes = load(&mut model, &service("kube-dns", "10.96.0.10"));
    assert!(changes.contains(ResourceType::Members, "cluster/static"));
    assert_eq!(services(&model), ["10.96.0.10/32"]);
    let changes = load(&mut model, &service("kube-dns", "10.96.0.11"));
    assert!(changes.contains(ResourceType::Members, "cluster/static"));
    load(&mut model, &service("headless", "None"));
    assert_eq!(services(&model), ["10.96.0.11/32"]);

    load(&mut model, &mesh("10.96.0.0/16"));
    assert_eq!(
        services(&model),
        ["10.96.0.0/16"],
        "what is given holds alone"
    );
    let changes = load(&mut model, &service("kube-dns", "10.96.0.12"));
    assert!(!changes.contains(ResourceType::Members, "cluster/static"));
}
