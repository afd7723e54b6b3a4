//! Unmodified workloads as a team writes them, within Pod Security's `restricted`: nginx behind a
//! Service, curl to call it with.

use serde_json::{Value, json};

use crate::images::{CURL, NGINX};

/// Several objects as one document.
pub fn list(objects: &[Value]) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string()
}

/// A namespace that enforces `restricted`; `meshed` labels it for injection.
pub fn namespace(name: &str, meshed: bool) -> Value {
    let mut labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
    if meshed {
        labels["turnpike.dev/inject"] = "enabled".into();
    }
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

pub fn service_account(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"namespace": namespace, "name": name},
    })
}

/// nginx behind a Service of the same name, as a Deployment under a service account of its own.
pub fn web(namespace: &str, name: &str, replicas: u32) -> Vec<Value> {
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": web_pod(name)},
        },
    });
    vec![
        service_account(namespace, name),
        deployment,
        service(namespace, name, name),
    ]
}

/// As [`web`], with all pods on one node.
pub fn web_on(node: &str, namespace: &str, name: &str, replicas: u32) -> Vec<Value> {
    let mut objects = web(namespace, name, replicas);
    for object in &mut objects {
        if object["kind"] == "Deployment" {
            object["spec"]["template"]["spec"]["nodeSelector"] =
                json!({"kubernetes.io/hostname": node});
        }
    }
    objects
}

/// As [`web`], with one pod on each of these nodes, whose Deployments are `NAME-NODE`.
pub fn web_on_each(nodes: &[&str], namespace: &str, name: &str) -> Vec<Value> {
    let mut objects = vec![
        service_account(namespace, name),
        service(namespace, name, name),
    ];
    for node in nodes {
        let labels = json!({"app": name, "on": node});
        let mut pod = web_pod(name);
        pod["nodeSelector"] = json!({"kubernetes.io/hostname": node});
        objects.push(json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"namespace": namespace, "name": format!("{name}-{node}")},
            "spec": {
                "replicas": 1, "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }));
    }
    objects
}

/// The pod of [`web`], probed in each of the three ways. A probe that is answered late must not look
/// like one that fails, hence the long timeouts.
pub fn web_pod(name: &str) -> Value {
    json!({
        "serviceAccountName": name,
        "terminationGracePeriodSeconds": 10,
        "topologySpreadConstraints": [{
            "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"app": name}},
        }],
        "securityContext": restricted_pod(101),
        "containers": [{
            "name": "nginx", "image": NGINX, "imagePullPolicy": "Never",
            "ports": [{"name": "http", "containerPort": 8080}],
            "startupProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 60},
            "readinessProbe": {"httpGet": {"path": "/unready", "port": "http"}, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 2},
            "livenessProbe": {"exec": {"command": ["test", "!", "-e", "/tmp/dead"]}, "periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": 2},
            "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}},
            "securityContext": restricted(),
        }],
    })
}

/// Port 80 to the pods' 8080.
pub fn service(namespace: &str, name: &str, app: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "selector": {"app": app},
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
        },
    })
}

/// A pod to call from, on one node; `app` is its label and its service account.
pub fn client(namespace: &str, name: &str, app: &str, node: &str) -> Vec<Value> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": {"app": app}},
        "spec": {
            "serviceAccountName": app,
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 1,
            "securityContext": restricted_pod(1000),
            "containers": [caller(&["sleep", "infinity"])],
        },
    });
    vec![service_account(namespace, app), pod]
}

/// A container of curl and a shell.
pub fn caller(command: &[&str]) -> Value {
    json!({
        "name": "curl", "image": CURL, "imagePullPolicy": "Never", "command": command,
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}},
        "securityContext": restricted(),
    })
}

pub fn restricted() -> Value {
    json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}})
}

pub fn restricted_pod(user: u32) -> Value {
    json!({"runAsNonRoot": true, "runAsUser": user, "seccompProfile": {"type": "RuntimeDefault"}})
}
