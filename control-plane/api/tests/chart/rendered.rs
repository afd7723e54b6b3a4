//! What `helm template` makes of the chart.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use k8s_openapi::api::{
    admissionregistration::v1::{
        MutatingWebhookConfiguration, ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
    },
    apps::v1::{DaemonSet, Deployment, StatefulSet},
    core::v1::{ConfigMap, Service, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use turnpike_api::MeshConfig;

use crate::{chart, writes};

/// Everything that the chart can be asked for, beside what must be said.
const ALL: &str = r#"
image: {registry: registry.example, tag: v1, pullPolicy: Always, pullSecrets: [pull]}
images: {proxy: {repository: turnpike/proxy, tag: v2}}
mesh: {clusterAddresses: [10.0.0.10], mtls: STRICT, telemetry: {sampling: 0.1, accessLog: true}}
telemetry: {otlpEndpoint: "http://otel.observability.svc:4317"}
proxy: {workers: 2, resources: {cpuLimit: "2"}}
controller: {nodeSelector: {role: system}, tolerations: [{key: system, operator: Exists}], env: {RUST_LOG: debug}}
audit: {persistence: {storageClass: gp3}, nodeSelector: {role: system}, tolerations: [{operator: Exists}], env: {RUST_LOG: debug}}
node: {env: {WARM_IP_TARGET: 4, ADDITIONAL_ENI_TAGS: '{"team":"a"}'}, serviceAccountAnnotations: {a: b}, nodeSelector: {cni: turnpike}, maxUnavailable: 10%}
gate: {searchDomains: [eu-west-1.compute.internal], env: {RUST_LOG: debug}, nodeSelector: {cni: turnpike}}
metrics: {onNodeAddress: true}
"#;
const NEEDED: &str = r"
mesh: {prefixes: [10.0.0.0/16, 172.20.0.0/16], serviceCidrs: [172.20.0.0/16]}
gate: {clusterDns: 172.20.0.10}
";

fn helm() -> PathBuf {
    let home = std::env::var_os("HOME").unwrap_or_default();
    let path = PathBuf::from(home).join(".cache/turnpike/kubernetes/bin/helm");
    assert!(
        path.exists(),
        "there is no {}; `cargo verify kubernetes` builds it",
        path.display()
    );
    path
}

fn template(namespace: &str, values: &[&str], more: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(helm());
    command.args(["template", "turnpike"]).arg(chart()).args([
        "--namespace",
        namespace,
        "--kube-version",
        "1.34.4",
    ]);
    for (number, values) in values.iter().enumerate() {
        let file = folder.path().join(format!("{number}.yaml"));
        std::fs::write(&file, values).unwrap();
        command.arg("--values").arg(file);
    }
    command.args(more).output().unwrap()
}

fn render(values: &[&str]) -> String {
    let output = template("turnpike-system", values, &[]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

fn refused(namespace: &str, values: &[&str], more: &[&str]) -> String {
    let output = template(namespace, values, more);
    assert!(!output.status.success(), "it was taken: {more:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn objects(text: &str) -> Vec<Value> {
    text.split("\n---\n")
        .map(|document| serde_saphyr::from_str::<Value>(document).unwrap())
        .filter(|value| !value.is_null())
        .collect()
}

/// Reads an object as its type, and wants every field of it to be one.
fn check<T: DeserializeOwned>(object: &Value) {
    let mut unknown = Vec::new();
    let read: Result<T, _> =
        serde_ignored::deserialize(object, |path| unknown.push(path.to_string()));
    // Types of custom resources leave these to who reads them.
    unknown.retain(|path| !["apiVersion", "kind"].contains(&path.as_str()));
    let name = format!("{} {}", object["kind"], object["metadata"]["name"]);
    if let Err(error) = read {
        panic!("{name}: {error}");
    }
    assert!(unknown.is_empty(), "{name} has unknown fields: {unknown:?}");
}

#[test]
#[ignore = "needs helm: cargo verify kubernetes"]
fn every_object_is_what_its_kind_allows() {
    for values in [&[NEEDED][..], &[NEEDED, ALL]] {
        for object in objects(&render(values)) {
            let kind = object["kind"].as_str().unwrap();
            let check = match kind {
                "ServiceAccount" => check::<ServiceAccount>,
                "Service" => check::<Service>,
                "ConfigMap" => check::<ConfigMap>,
                "DaemonSet" => check::<DaemonSet>,
                "Deployment" => check::<Deployment>,
                "StatefulSet" => check::<StatefulSet>,
                "ClusterRole" => check::<ClusterRole>,
                "ClusterRoleBinding" => check::<ClusterRoleBinding>,
                "Role" => check::<Role>,
                "RoleBinding" => check::<RoleBinding>,
                "MutatingWebhookConfiguration" => check::<MutatingWebhookConfiguration>,
                "ValidatingAdmissionPolicy" => check::<ValidatingAdmissionPolicy>,
                "ValidatingAdmissionPolicyBinding" => check::<ValidatingAdmissionPolicyBinding>,
                "MeshConfig" => check::<MeshConfig>,
                other => panic!("no type is known for {other}"),
            };
            check(&object);
        }
    }
}

#[test]
#[ignore = "needs helm: cargo verify kubernetes"]
fn what_is_rendered_is_the_golden_file() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/chart/golden");
    for (name, values) in [("least.yaml", &[NEEDED][..]), ("all.yaml", &[NEEDED, ALL])] {
        let path = folder.join(name);
        let rendered = render(values);
        if writes() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&path, &rendered).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        let mut lines = golden.lines().zip(rendered.lines()).enumerate();
        let first = lines.find(|(_, (golden, rendered))| golden != rendered);
        assert!(
            golden == rendered,
            "{} differs, first at {first:?}; if that is meant: `TURNPIKE_WRITE_CHART=1 cargo test -p \
             turnpike-api --test chart -- --include-ignored`",
            path.display()
        );
    }
}

/// Capabilities, users and mounts of a pod's containers, against what Pod Security calls restricted.
#[test]
#[ignore = "needs helm: cargo verify kubernetes"]
fn only_the_nodes_daemons_have_privileges() {
    for object in objects(&render(&[NEEDED])) {
        let name = object["metadata"]["name"].as_str().unwrap();
        let pod = &object["spec"]["template"]["spec"];
        if pod.is_null() {
            continue;
        }
        assert_eq!(
            pod["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault"
        );
        let expected = match name {
            "turnpike-node" => json!(["NET_ADMIN", "SYS_ADMIN", "CHOWN"]),
            "turnpike-gate" => json!([
                "NET_RAW",
                "NET_BIND_SERVICE",
                "CHOWN",
                "DAC_READ_SEARCH",
                "SETUID",
                "SETGID"
            ]),
            _ => Value::Null,
        };
        let is_daemon = !expected.is_null();
        assert_eq!(
            pod["hostNetwork"].as_bool().unwrap_or(false),
            is_daemon,
            "{name}"
        );
        assert_eq!(
            pod["securityContext"]["runAsNonRoot"]
                .as_bool()
                .unwrap_or(false),
            !is_daemon,
            "{name}"
        );
        let on_host = pod["volumes"].as_array().unwrap().iter();
        assert!(is_daemon || on_host.clone().all(|volume| volume["hostPath"].is_null()));
        for container in pod["containers"].as_array().unwrap() {
            let security = &container["securityContext"];
            assert_eq!(security["readOnlyRootFilesystem"], true, "{name}");
            assert_eq!(security["allowPrivilegeEscalation"], false, "{name}");
            assert_eq!(security["capabilities"]["drop"], json!(["ALL"]), "{name}");
            assert_eq!(security["capabilities"]["add"], expected, "{name}");
            assert!(security["privileged"].is_null(), "{name}");
        }
        // Nobody but the controller speaks to the API server.
        let mounts_token = pod["automountServiceAccountToken"] != json!(false);
        assert_eq!(mounts_token, name == "turnpike-controller", "{name}");
    }
}

#[test]
#[ignore = "needs helm: cargo verify kubernetes"]
fn what_is_wrong_is_said() {
    let misspelt = |set: &str| refused("turnpike-system", &[NEEDED], &["--set", set]);
    for (set, said) in [
        ("node.evn.X=1", "'evn' not allowed"),
        ("controler.env.X=1", "'controler' not allowed"),
        ("mesh.mtls=strict", "'PERMISSIVE', 'STRICT'"),
        ("mesh.prefixes={10.0.0.0}", "/mesh/prefixes/0"),
        ("mesh.telemetry.sampling=2", "/mesh/telemetry/sampling"),
        ("gate.clusterDns=kube-dns", "/gate/clusterDns"),
        ("audit.persistence.size=lots", "/audit/persistence/size"),
        ("webhook.timeoutSeconds=30", "/webhook/timeoutSeconds"),
    ] {
        let error = misspelt(set);
        assert!(error.contains(said), "{set}: {error}");
    }
    let elsewhere = refused("default", &[NEEDED], &[]);
    assert!(
        elsewhere.contains("cannot be installed into `default`")
            && elsewhere.contains("--namespace turnpike-system"),
        "{elsewhere}"
    );
    let nothing = refused("turnpike-system", &[], &[]);
    assert!(
        nothing.contains("mesh.prefixes: name the ranges"),
        "{nothing}"
    );
    let prefixes = ["--set", "mesh.prefixes={10.0.0.0/16}"];
    let services = refused("turnpike-system", &[], &prefixes);
    assert!(services.contains("Error"), "{services}");
    let old = refused("turnpike-system", &[NEEDED], &["--kube-version", "1.29.0"]);
    assert!(old.contains(">=1.30.0-0"), "{old}");
}
