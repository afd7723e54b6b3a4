//! The sidecar's container and volumes.
//!
//! A native sidecar, first among the init containers: it is ready before anything else of the pod
//! runs, and ends after the application. Everything keeps to Pod Security's `restricted`.

use k8s_openapi::{
    api::core::v1::{
        Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource,
        EnvVar, EnvVarSource, HTTPGetAction, KeyToPath, ObjectFieldSelector, Probe,
        ProjectedVolumeSource, ResourceRequirements, SeccompProfile, SecurityContext,
        ServiceAccountTokenProjection, Volume, VolumeMount, VolumeProjection,
    },
    apimachinery::pkg::{api::resource::Quantity, util::intstr::IntOrString},
};

use super::{CONTAINER, InjectConfig, USER};

const TOKEN: &str = "turnpike-token";
const ROOT: &str = "turnpike-root";
const STATE: &str = "turnpike-state";
const TOKEN_FOLDER: &str = "/var/run/secrets/turnpike/token";
const ROOT_FOLDER: &str = "/var/run/secrets/turnpike/root";
const STATE_FOLDER: &str = "/var/lib/turnpike";
const METRICS_PORT: i32 = 15020;
const HEALTH_PORT: i32 = 15021;

pub(super) fn container(config: &InjectConfig) -> Container {
    Container {
        name: CONTAINER.to_owned(),
        image: Some(config.image.clone()),
        image_pull_policy: config.image_pull_policy.clone(),
        restart_policy: Some("Always".to_owned()),
        env: Some(environment(config)),
        ports: Some(vec![
            port("metrics", METRICS_PORT),
            port("health", HEALTH_PORT),
        ]),
        // The application starts when this passes: within a second of the sidecar being ready, and
        // not at all while it cannot get its identity.
        startup_probe: Some(probe(1, 120)),
        readiness_probe: Some(probe(5, 3)),
        resources: Some(resources(config)),
        security_context: Some(security()),
        volume_mounts: Some(vec![
            mount(TOKEN, TOKEN_FOLDER, true),
            mount(ROOT, ROOT_FOLDER, true),
            mount(STATE, STATE_FOLDER, false),
        ]),
        ..Container::default()
    }
}

pub(super) fn volumes(config: &InjectConfig) -> Vec<Volume> {
    let token = ServiceAccountTokenProjection {
        audience: Some(config.token_audience.clone()),
        expiration_seconds: Some(config.token_expiration_seconds),
        path: "token".to_owned(),
    };
    vec![
        Volume {
            name: TOKEN.to_owned(),
            projected: Some(ProjectedVolumeSource {
                sources: Some(vec![VolumeProjection {
                    service_account_token: Some(token),
                    ..VolumeProjection::default()
                }]),
                ..ProjectedVolumeSource::default()
            }),
            ..Volume::default()
        },
        Volume {
            name: ROOT.to_owned(),
            config_map: Some(ConfigMapVolumeSource {
                name: config.root_config_map.clone(),
                items: Some(vec![KeyToPath {
                    key: "root.pem".to_owned(),
                    path: "root.pem".to_owned(),
                    ..KeyToPath::default()
                }]),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        },
        // The last snapshot outlives a restart of the container.
        Volume {
            name: STATE.to_owned(),
            empty_dir: Some(EmptyDirVolumeSource {
                size_limit: Some(Quantity("64Mi".to_owned())),
                ..EmptyDirVolumeSource::default()
            }),
            ..Volume::default()
        },
    ]
}

fn environment(config: &InjectConfig) -> Vec<EnvVar> {
    let value = |name: &str, value: &str| EnvVar {
        name: name.to_owned(),
        value: Some(value.to_owned()),
        ..EnvVar::default()
    };
    let mut variables = vec![
        value("TURNPIKE_CONTROLLER", &config.controller),
        value("TURNPIKE_CONTROLLER_NAME", &config.controller_name),
        value("TURNPIKE_TOKEN_FILE", &format!("{TOKEN_FOLDER}/token")),
        value("TURNPIKE_ROOT_FILE", &format!("{ROOT_FOLDER}/root.pem")),
        value("TURNPIKE_CLUSTER", &config.cluster),
        value("TURNPIKE_NETWORK", &config.network),
        value("TURNPIKE_TRUST_DOMAIN", &config.trust_domain),
        value("TURNPIKE_STATE_DIR", STATE_FOLDER),
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("POD_UID", "metadata.uid"),
        field("POD_IP", "status.podIP"),
        field("NODE_NAME", "spec.nodeName"),
        field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
    ];
    let workers = config.workers.map(|workers| workers.to_string());
    variables.extend(workers.map(|workers| value("TURNPIKE_WORKERS", &workers)));
    let otlp = config.otlp_endpoint.as_deref();
    variables.extend(otlp.map(|endpoint| value("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)));
    variables
}

fn field(name: &str, path: &str) -> EnvVar {
    let selector = ObjectFieldSelector {
        field_path: path.to_owned(),
        api_version: None,
    };
    EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(selector),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }
}

fn port(name: &str, port: i32) -> ContainerPort {
    ContainerPort {
        name: Some(format!("tp-{name}")),
        container_port: port,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

fn probe(period_seconds: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some("/healthz/ready".to_owned()),
            port: IntOrString::Int(HEALTH_PORT),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(1),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

/// No CPU limit by itself: the kernel would stall the application's traffic with it. A namespace's
/// quota may ask for one.
fn resources(config: &InjectConfig) -> ResourceRequirements {
    let quantities = |pairs: &[(&str, &String)]| {
        Some(
            pairs
                .iter()
                .map(|(name, q)| ((*name).to_owned(), Quantity((*q).clone())))
                .collect(),
        )
    };
    let mut limits = vec![("memory", &config.memory_limit)];
    limits.extend(config.cpu_limit.iter().map(|limit| ("cpu", limit)));
    ResourceRequirements {
        requests: quantities(&[
            ("cpu", &config.cpu_request),
            ("memory", &config.memory_request),
        ]),
        limits: quantities(&limits),
        ..ResourceRequirements::default()
    }
}

fn security() -> SecurityContext {
    SecurityContext {
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        run_as_non_root: Some(true),
        privileged: Some(false),
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities {
            add: None,
            drop: Some(vec!["ALL".to_owned()]),
        }),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".to_owned(),
            localhost_profile: None,
        }),
        ..SecurityContext::default()
    }
}

fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(read_only),
        ..VolumeMount::default()
    }
}
