//! Pods.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::core::v1::{
        Container, ContainerPort, LifecycleHandler, Pod as PodObject, PodSpec, PodStatus, Probe,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use turnpike_rules::{Identity, pod::Capture, service::EndpointState, workload::Names};

use super::Refusal;
use crate::{
    key::{Birth, Key},
    selector::Labels,
};

/// Name of the container that makes a pod a member of the mesh.
const SIDECAR: &str = "turnpike-proxy";
const SIDECAR_UID: u32 = 1337;
const OUTBOUND_PORT: u16 = 15001;
const INBOUND_PORT: u16 = 15006;
/// The sidecar's own ports that are reached from outside the pod: metrics and readiness.
const SIDECAR_PORTS: [u16; 2] = [15020, 15021];
const CANONICAL_NAME: &str = "service.istio.io/canonical-name";
const CANONICAL_REVISION: &str = "service.istio.io/canonical-revision";
const ZONE: &str = "topology.kubernetes.io/zone";

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pod {
    pub(crate) key: Key,
    pub(crate) uid: Arc<str>,
    pub(crate) birth: Birth,
    pub(crate) labels: Labels,
    pub(crate) identity: Identity,
    pub(crate) names: Arc<Names>,
    pub(crate) node: Option<Arc<str>>,
    pub(crate) addresses: Vec<IpAddr>,
    /// As the pod itself says; its node's zone is known from elsewhere.
    pub(crate) zone: Option<Arc<str>>,
    pub(crate) host_network: bool,
    /// It ran to its end: its address may be another's by now.
    pub(crate) finished: bool,
    pub(crate) terminating: bool,
    pub(crate) ready: bool,
    /// Set where the sidecar runs in it.
    pub(crate) capture: Option<Capture>,
    /// TCP, with their names.
    pub(crate) ports: Vec<(String, u16)>,
    /// What kubelet asks at, ascending.
    pub(crate) probe_ports: Vec<u16>,
}

impl Pod {
    pub(crate) fn read(object: &PodObject, trust_domain: &str) -> Result<Self, Refusal> {
        let meta = &object.metadata;
        let key = Key::of(meta);
        let none = PodSpec::default();
        let spec = object.spec.as_ref().unwrap_or(&none);
        let account = spec
            .service_account_name
            .as_deref()
            .filter(|name| !name.is_empty());
        let identity = Identity::new(
            trust_domain,
            key.namespace.to_string(),
            account.unwrap_or("default"),
        )
        .map_err(|error| Refusal::new("InvalidIdentity", error.to_string()))?;
        let sidecar = containers(spec).find(|container| container.name == SIDECAR);
        let ports = named_ports(spec);
        let probe_ports = probe_ports(spec, &ports);
        let status = object.status.as_ref();
        Ok(Self {
            uid: uid(meta.uid.as_deref(), &key),
            birth: Birth::of(meta),
            labels: meta.labels.clone().unwrap_or_default(),
            names: Arc::new(names(object, &key)),
            node: spec
                .node_name
                .as_deref()
                .filter(|name| !name.is_empty())
                .map(Arc::from),
            addresses: status.map(addresses).unwrap_or_default(),
            zone: zone(object),
            host_network: spec.host_network.unwrap_or(false),
            finished: status
                .and_then(|status| status.phase.as_deref())
                .is_some_and(|phase| matches!(phase, "Succeeded" | "Failed")),
            terminating: meta.deletion_timestamp.is_some(),
            ready: status.is_some_and(is_ready),
            capture: sidecar.map(|container| capture(container, spec, &probe_ports)),
            ports,
            probe_ports,
            identity,
            key,
        })
    }

    pub(crate) fn meshed(&self) -> bool {
        self.capture.is_some()
    }

    /// The identity that its callers must find.
    pub(crate) fn mesh_identity(&self) -> Option<Identity> {
        self.meshed().then(|| self.identity.clone())
    }

    /// The addresses that are this pod's alone: none where it shares its node's, none when it ran
    /// to its end.
    pub(crate) fn own_addresses(&self) -> &[IpAddr] {
        if self.host_network || self.finished {
            &[]
        } else {
            &self.addresses
        }
    }

    /// Its node sets up a network for it.
    pub(crate) fn networked_on(&self) -> Option<&Arc<str>> {
        self.node.as_ref().filter(|_| !self.host_network)
    }

    /// Whether it takes requests to a Service. `unready_too`: as the Service may ask.
    pub(crate) fn state(&self, unready_too: bool) -> Option<EndpointState> {
        if self.finished || !(self.ready || unready_too) {
            return None;
        }
        Some(if self.terminating {
            EndpointState::Terminating
        } else {
            EndpointState::Serving
        })
    }

    pub(crate) fn named_port(&self, name: &str) -> Option<u16> {
        self.ports
            .iter()
            .find(|(own, _)| own == name)
            .map(|(_, port)| *port)
    }
}

/// A pod that is written by hand may have no UID; its name is unique among such pods.
fn uid(uid: Option<&str>, key: &Key) -> Arc<str> {
    match uid {
        Some(uid) if !uid.is_empty() => uid.into(),
        _ => format!("{}.{}", key.name, key.namespace).into(),
    }
}

/// As Istio names it, so that its dashboards show what they showed.
/// Source: <https://istio.io/latest/docs/ops/deployment/application-requirements/>.
fn names(object: &PodObject, key: &Key) -> Names {
    let workload = workload(object);
    let labels = object.metadata.labels.as_ref();
    let label = |name: &str| {
        let value = labels.and_then(|labels| labels.get(name));
        value.filter(|value| !value.is_empty()).map(String::as_str)
    };
    let first = |names: [&str; 3]| names.into_iter().find_map(label);
    let service = first([CANONICAL_NAME, "app.kubernetes.io/name", "app"]);
    let revision = first([CANONICAL_REVISION, "app.kubernetes.io/version", "version"]);
    Names {
        namespace: key.namespace.clone(),
        service: service.unwrap_or(&workload).into(),
        revision: revision.unwrap_or("latest").into(),
        app: label("app").unwrap_or_default().into(),
        version: label("version").unwrap_or_default().into(),
        workload,
    }
}

/// The owner's name: a ReplicaSet's without the hash of its template, a CronJob's Job without its
/// time.
fn workload(object: &PodObject) -> Arc<str> {
    let meta = &object.metadata;
    let owners = meta.owner_references.as_deref().unwrap_or_default();
    let owner = owners
        .iter()
        .find(|owner| owner.controller == Some(true))
        .or(owners.first());
    let Some(owner) = owner else {
        return meta.name.as_deref().unwrap_or_default().into();
    };
    let hash = meta
        .labels
        .as_ref()
        .and_then(|labels| labels.get("pod-template-hash"));
    let stripped = match (owner.kind.as_str(), hash) {
        ("ReplicaSet", Some(hash)) => owner
            .name
            .strip_suffix(hash.as_str())
            .and_then(|name| name.strip_suffix('-')),
        ("Job", _) => owner.name.rsplit_once('-').and_then(|(name, time)| {
            let generated = time.len() >= 8 && time.bytes().all(|b| b.is_ascii_digit());
            generated.then_some(name)
        }),
        _ => None,
    };
    stripped.unwrap_or(&owner.name).into()
}

fn zone(object: &PodObject) -> Option<Arc<str>> {
    let meta = &object.metadata;
    let from = |map: &Option<Labels>| map.as_ref().and_then(|map| map.get(ZONE)).cloned();
    from(&meta.labels)
        .or_else(|| from(&meta.annotations))
        .map(Arc::from)
}

fn addresses(status: &PodStatus) -> Vec<IpAddr> {
    let listed = status
        .pod_ips
        .iter()
        .flatten()
        .map(|pod_ip| pod_ip.ip.as_str());
    let mut found: Vec<IpAddr> = Vec::new();
    for address in status.pod_ip.as_deref().into_iter().chain(listed) {
        if let Ok(address) = address.parse()
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

fn is_ready(status: &PodStatus) -> bool {
    let mut conditions = status.conditions.iter().flatten();
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The containers that live as long as the pod: also init containers that restart.
fn containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    let restarting = |container: &&Container| {
        container.restart_policy.as_deref() == Some("Always") || container.name == SIDECAR
    };
    spec.init_containers
        .iter()
        .flatten()
        .filter(restarting)
        .chain(&spec.containers)
}

fn named_ports(spec: &PodSpec) -> Vec<(String, u16)> {
    let tcp = |port: &&ContainerPort| port.protocol.as_deref().is_none_or(|p| p == "TCP");
    containers(spec)
        .filter(|container| container.name != SIDECAR)
        .flat_map(|container| container.ports.iter().flatten())
        .filter(tcp)
        .filter_map(|port| {
            let number = u16::try_from(port.container_port)
                .ok()
                .filter(|number| *number > 0)?;
            Some((port.name.clone().unwrap_or_default(), number))
        })
        .collect()
}

fn probe_ports(spec: &PodSpec, ports: &[(String, u16)]) -> Vec<u16> {
    let resolve = |port: &IntOrString| match port {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(name) => ports.iter().find(|(own, _)| own == name).map(|(_, p)| *p),
    };
    let mut found: Vec<u16> = containers(spec)
        .filter(|container| container.name != SIDECAR)
        .flat_map(asked_ports)
        .filter_map(|port| resolve(&port))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Where kubelet connects to a container: its probes and its lifecycle hooks.
fn asked_ports(container: &Container) -> Vec<IntOrString> {
    let probes = [
        &container.liveness_probe,
        &container.readiness_probe,
        &container.startup_probe,
    ];
    let of_probe = |probe: &Probe| {
        let http = probe.http_get.as_ref().map(|http| http.port.clone());
        let tcp = probe.tcp_socket.as_ref().map(|tcp| tcp.port.clone());
        let grpc = probe.grpc.as_ref().map(|grpc| IntOrString::Int(grpc.port));
        http.or(tcp).or(grpc)
    };
    let of_hook = |hook: &LifecycleHandler| {
        let http = hook.http_get.as_ref().map(|http| http.port.clone());
        http.or_else(|| hook.tcp_socket.as_ref().map(|tcp| tcp.port.clone()))
    };
    let hooks = container
        .lifecycle
        .iter()
        .flat_map(|l| [&l.post_start, &l.pre_stop])
        .flatten();
    probes
        .into_iter()
        .flatten()
        .filter_map(of_probe)
        .chain(hooks.filter_map(of_hook))
        .collect()
}

fn capture(sidecar: &Container, spec: &PodSpec, probe_ports: &[u16]) -> Capture {
    let own = sidecar
        .security_context
        .as_ref()
        .and_then(|context| context.run_as_user);
    let pod = spec
        .security_context
        .as_ref()
        .and_then(|context| context.run_as_user);
    let mut ports: Vec<u16> = SIDECAR_PORTS.iter().chain(probe_ports).copied().collect();
    ports.sort_unstable();
    ports.dedup();
    Capture {
        proxy_uid: own
            .or(pod)
            .and_then(|uid| u32::try_from(uid).ok())
            .unwrap_or(SIDECAR_UID),
        outbound_port: OUTBOUND_PORT,
        inbound_port: INBOUND_PORT,
        probe_ports: ports,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(yaml: &str) -> Pod {
        Pod::read(&serde_saphyr::from_str(yaml).unwrap(), "cluster.local").unwrap()
    }

    #[test]
    fn a_meshed_pod() {
        let pod = read(
            r"
metadata:
  name: web-5d4-abc
  namespace: shop
  uid: u1
  labels: {app: web, pod-template-hash: 5d4, topology.kubernetes.io/zone: a}
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-5d4, uid: r, controller: true}]
spec:
  nodeName: node-a
  serviceAccountName: web
  initContainers:
  - {name: turnpike-proxy, restartPolicy: Always, ports: [{containerPort: 15020}], securityContext: {runAsUser: 1400}}
  - {name: setup, ports: [{name: setup, containerPort: 1}]}
  containers:
  - name: app
    ports: [{name: web, containerPort: 8080}, {containerPort: 53, protocol: UDP}]
    livenessProbe: {httpGet: {port: web}}
    readinessProbe: {tcpSocket: {port: 9000}}
    startupProbe: {grpc: {port: 9001}}
    lifecycle: {preStop: {httpGet: {port: 9002}}}
status:
  podIP: 10.0.0.7
  podIPs: [{ip: 10.0.0.7}, {ip: 'fd00::7'}]
  conditions: [{type: Ready, status: 'True'}]
",
        );
        assert_eq!(&*pod.names.workload, "web");
        assert_eq!(
            pod.identity.to_string(),
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        assert_eq!(pod.zone.as_deref(), Some("a"));
        assert_eq!(pod.ports, [("web".to_owned(), 8080)]);
        assert_eq!(pod.probe_ports, [8080, 9000, 9001, 9002]);
        let capture = pod.capture.as_ref().unwrap();
        assert_eq!(capture.proxy_uid, 1400);
        assert_eq!(capture.probe_ports, [8080, 9000, 9001, 9002, 15020, 15021]);
        assert_eq!(pod.addresses.len(), 2);
        assert_eq!(pod.state(false), Some(EndpointState::Serving));
    }

    #[test]
    fn owners_and_states() {
        let job = read(
            "{metadata: {name: n-28471234-x, namespace: a, uid: u, ownerReferences: \
             [{apiVersion: batch/v1, kind: Job, name: n-28471234, uid: j}]}}",
        );
        assert_eq!(&*job.names.workload, "n");
        assert!(job.mesh_identity().is_none());
        assert_eq!(job.state(false), None, "not ready");
        let bare = read("{metadata: {name: solo, namespace: a}}");
        assert_eq!((&*bare.names.workload, &*bare.uid), ("solo", "solo.a"));
        let done = read("{metadata: {name: d}, status: {phase: Succeeded, podIP: 10.0.0.1}}");
        assert!(done.own_addresses().is_empty());
        let host = read(
            "{metadata: {name: h}, spec: {hostNetwork: true, nodeName: n, containers: []}, \
                         status: {podIP: 10.0.0.1}}",
        );
        assert!(host.own_addresses().is_empty() && host.networked_on().is_none());
    }

    #[test]
    fn the_names_that_dashboards_use_come_from_owner_and_labels() {
        let named = |labels: &str| {
            let pod = read(&format!(
                "{{metadata: {{name: w-5d4-x, namespace: shop, uid: u, labels: {{pod-template-hash: \
                 5d4, {labels}}}, ownerReferences: [{{apiVersion: apps/v1, kind: ReplicaSet, name: \
                 w-5d4, uid: r, controller: true}}]}}}}"
            ));
            let Names {
                workload,
                namespace,
                service,
                revision,
                app,
                version,
            } = &*pod.names;
            format!("{workload}.{namespace} {service}/{revision} {app}:{version}")
        };
        for (labels, expected) in [
            ("", "w.shop w/latest :"),
            ("app: a, version: v2", "w.shop a/v2 a:v2"),
            (
                "app: a, app.kubernetes.io/name: k, app.kubernetes.io/version: '3'",
                "w.shop k/3 a:",
            ),
            (
                "app: a, version: v2, service.istio.io/canonical-name: c, \
                 service.istio.io/canonical-revision: r",
                "w.shop c/r a:v2",
            ),
        ] {
            assert_eq!(named(labels), expected);
        }
    }

    #[test]
    fn a_pod_that_can_have_no_identity_is_refused() {
        let object = serde_saphyr::from_str("{metadata: {name: a, namespace: Bad_Name}}").unwrap();
        let refusal = Pod::read(&object, "cluster.local").unwrap_err();
        assert!(refusal.message.contains("Bad_Name"), "{refusal:?}");
    }
}
