//! Puts the sidecar into a pod.
//!
//! Pure and idempotent: a pod that was injected before comes out as if it had not been, so that
//! the webhook may be asked again after others have changed the pod.

mod config;
pub mod review;
mod sidecar;

use std::{collections::BTreeMap, fmt};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

pub use config::{InjectConfig, InvalidConfig};

/// On a namespace: `enabled` injects its pods. On a pod: `disabled` leaves it out.
pub const LABEL: &str = "turnpike.dev/inject";
/// On every injected pod: `true`.
pub const INJECTED: &str = "turnpike.dev/injected";
pub const CONTAINER: &str = "turnpike-proxy";
/// The user that the sidecar runs as; its connections are not captured.
pub const USER: i64 = 1337;
/// The sidecar's ports in the pod: admin, outbound, inbound, metrics, health.
pub const PORTS: [i32; 5] = [15000, 15001, 15006, 15020, 15021];

/// What became of a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Injection {
    Injected(Box<Pod>),
    /// The pod stays as it is.
    Skipped(Reason),
}

/// Why a pod has no sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    ExemptNamespace(String),
    HostNetwork,
    Windows,
    PodOptedOut,
    /// With the label's value, if it has one.
    NamespaceNotLabelled(Option<String>),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExemptNamespace(namespace) => {
                write!(f, "pods in the namespace {namespace} are never injected")
            }
            Self::HostNetwork => f.write_str(
                "the pod uses the node's network (hostNetwork: true), where nothing is captured",
            ),
            Self::Windows => f.write_str("the pod is for Windows nodes"),
            Self::PodOptedOut => write!(f, "the pod's label {LABEL} is `disabled`"),
            Self::NamespaceNotLabelled(None) => {
                write!(f, "the namespace has no label {LABEL}; set it to `enabled`")
            }
            Self::NamespaceNotLabelled(Some(value)) => write!(
                f,
                "the namespace's label {LABEL} is `{value}`; set it to `enabled`"
            ),
        }
    }
}

/// A pod that should be in the mesh and cannot be: it must not start, since it would run outside.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error(
        "container `{0}` runs as user 1337, whose connections are the sidecar's own and are not \
         captured; choose another runAsUser"
    )]
    ProxyUser(String),
    #[error("container `{container}` uses port {port}, which the sidecar needs; choose another")]
    ProxyPort { container: String, port: i32 },
    #[error("the name `{CONTAINER}` belongs to the sidecar; give the container another")]
    ProxyName,
}

/// The pod with its sidecar, or why it goes without.
pub fn inject(
    pod: &Pod,
    namespace_labels: &BTreeMap<String, String>,
    config: &InjectConfig,
) -> Result<Injection, Refused> {
    if let Some(reason) = skip(pod, namespace_labels, config) {
        return Ok(Injection::Skipped(reason));
    }
    let mut pod = pod.clone();
    let spec = pod.spec.get_or_insert_default();
    let inits = spec.init_containers.get_or_insert_default();
    inits.retain(|container| container.name != CONTAINER);
    check(spec)?;
    spec.init_containers
        .get_or_insert_default()
        .insert(0, sidecar::container(config));

    let volumes = spec.volumes.get_or_insert_default();
    let ours = sidecar::volumes(config);
    volumes.retain(|volume| ours.iter().all(|own| own.name != volume.name));
    volumes.extend(ours);
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(INJECTED.to_owned(), "true".to_owned());
    Ok(Injection::Injected(Box::new(pod)))
}

/// Whether there is anything to capture in such a pod: it has a network of its own, and Linux.
pub(crate) fn can_be_injected(spec: &PodSpec) -> bool {
    !on_node_network(spec) && !for_windows(spec)
}

fn on_node_network(spec: &PodSpec) -> bool {
    spec.host_network == Some(true)
}

fn for_windows(spec: &PodSpec) -> bool {
    spec.os.as_ref().is_some_and(|os| os.name == "windows")
}

fn skip(
    pod: &Pod,
    namespace_labels: &BTreeMap<String, String>,
    config: &InjectConfig,
) -> Option<Reason> {
    let spec = pod.spec.as_ref();
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let pod_label = pod
        .metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get(LABEL));
    let namespace_label = namespace_labels.get(LABEL);
    if config
        .exempt_namespaces
        .iter()
        .any(|exempt| exempt == namespace)
    {
        Some(Reason::ExemptNamespace(namespace.to_owned()))
    } else if spec.is_some_and(on_node_network) {
        Some(Reason::HostNetwork)
    } else if spec.is_some_and(for_windows) {
        Some(Reason::Windows)
    } else if pod_label.is_some_and(|value| value == "disabled") {
        Some(Reason::PodOptedOut)
    } else if namespace_label.is_none_or(|value| value != "enabled") {
        Some(Reason::NamespaceNotLabelled(namespace_label.cloned()))
    } else {
        None
    }
}

/// The pod's own containers, the sidecar already taken out.
fn check(spec: &PodSpec) -> Result<(), Refused> {
    let pod_user = spec
        .security_context
        .as_ref()
        .and_then(|context| context.run_as_user);
    for container in spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
    {
        let Container {
            name,
            security_context,
            ports,
            ..
        } = container;
        if name == CONTAINER {
            return Err(Refused::ProxyName);
        }
        let own_user = security_context
            .as_ref()
            .and_then(|context| context.run_as_user);
        if own_user.or(pod_user) == Some(USER) {
            return Err(Refused::ProxyUser(name.clone()));
        }
        let taken = ports
            .iter()
            .flatten()
            .find(|port| PORTS.contains(&port.container_port));
        if let Some(port) = taken {
            return Err(Refused::ProxyPort {
                container: name.clone(),
                port: port.container_port,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
