//! What the resources say, case by case.
#![allow(clippy::unwrap_used, reason = "what fails here ends the test")]

#[path = "../common/mod.rs"]
mod common;
mod policies;
mod services;
mod statuses;

use common::{load, model};
use turnpike_model::Model;
use turnpike_rules::service::Service;

const WEB: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: web}, {name: db, port: 5432, targetPort: 5432}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, uid: u1, labels: {app: web}}
spec:
  nodeName: node-a
  serviceAccountName: web
  initContainers: [{name: turnpike-proxy, restartPolicy: Always}]
  containers:
  - {name: app, ports: [{name: web, containerPort: 8080}], livenessProbe: {httpGet: {port: web}}}
status: {podIP: 10.0.0.1, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-2, namespace: shop, uid: u2, labels: {app: web}}
spec:
  nodeName: node-b
  containers: [{name: app, ports: [{name: web, containerPort: 9090}]}]
status: {podIP: 10.0.0.2, conditions: [{type: Ready, status: 'True'}]}
---
";

fn world(yaml: &str) -> Model {
    let mut model = model();
    load(&mut model, &format!("{WEB}{yaml}"));
    model
}

fn web(model: &Model) -> Service {
    model.service("cluster/shop/web").unwrap()
}
