//! Pods, started and ended the way a kubelet and a container runtime do it.
//!
//! 1. the Pod object goes through injection and into the controller's folder, bound to its node;
//! 2. the runtime's part: a network namespace, then the CNI executable with its environment and
//!    standard input;
//! 3. native sidecars start first and must be ready, then the containers;
//! 4. the status (address, readiness) is written back into the object.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::chown,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Container, EnvVar, Pod as PodObject, Volume};
use serde_json::{Value, json};
use turnpike_kubernetes::inject::{self, Injection};
use turnpike_vpc::netns::{Command, Namespace, Output};

use crate::{
    daemon::Daemon,
    tokens::Subject,
    world::{World, at, program},
};

const SIDECAR: &str = "turnpike-proxy";
/// Where the sidecar's image has it. It was built where its user need not be able to look, or where
/// the pod has a folder of its own.
const SIDECAR_PROGRAM: &str = "/run/image/turnpike-proxy";
const SIDECAR_READY_PORT: u16 = 15021;
/// The user that workloads run as: anyone but root and the proxy.
pub const APP_USER: u32 = 1000;
const READY: Duration = Duration::from_secs(20);
const GRACE: Duration = Duration::from_secs(5);

/// A pod that runs.
#[derive(Debug)]
pub struct Pod {
    pub object: PodObject,
    pub node: String,
    pub address: IpAddr,
    pub namespace: Namespace,
    pub sidecar: Option<Daemon>,
    pub apps: Vec<Daemon>,
    pub folder: PathBuf,
}

impl Pod {
    pub(crate) fn daemons(&self) -> impl Iterator<Item = &Daemon> {
        self.sidecar.iter().chain(&self.apps)
    }

    pub fn uid(&self) -> &str {
        uid_of(&self.object)
    }

    /// The folder behind the pod's `/run/scratch`.
    pub fn scratch(&self) -> PathBuf {
        self.folder.join("volumes/scratch")
    }

    /// The sidecar's access log, one JSON object a line.
    pub fn access_log(&self) -> Vec<Value> {
        let log = self
            .sidecar
            .as_ref()
            .map(Daemon::output)
            .unwrap_or_default();
        log.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// The sidecar's metrics, as Prometheus reads them.
    pub fn metrics(&self) -> Result<String> {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Ok(crate::http::get(&self.namespace, at(loopback, 15020), "/stats/prometheus")?.body)
    }
}

/// What a runtime knows of a pod when it calls the CNI executable.
#[derive(Clone, Debug)]
pub struct Sandbox<'a> {
    pub node: &'a str,
    /// Namespace and name of the pod.
    pub key: &'a (String, String),
    /// Container id: a new one for each start.
    pub id: &'a str,
    pub namespace: &'a Namespace,
}

/// What a command in a pod said.
#[derive(Clone, Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn succeeded(&self) -> bool {
        self.code == Some(0)
    }
}

/// A workload: what a Deployment's template would say.
#[derive(Clone, Debug)]
pub struct Workload<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub app: &'a str,
    pub service_account: &'a str,
    pub node: &'a str,
    /// Command line of the one container, and the port it serves.
    pub command: &'a [&'a str],
    pub port: Option<u16>,
    /// Files that appear in `/run/config`.
    pub files: Vec<(&'a str, String)>,
}

impl Workload<'_> {
    fn object(&self, zone: &str) -> Result<PodObject> {
        let Self {
            namespace,
            name,
            app,
            service_account,
            node,
            command,
            port,
            files,
        } = self;
        let ports: Vec<Value> = port
            .iter()
            .map(|port| json!({"name": "http", "containerPort": port}))
            .collect();
        let mut container = json!({
            "name": app, "image": "workload", "command": command, "ports": ports,
            "securityContext": {"runAsUser": APP_USER},
        });
        let mut volumes = vec![json!({"name": "scratch", "emptyDir": {}})];
        let mut mounts = vec![json!({"name": "scratch", "mountPath": "/run/scratch"})];
        if !files.is_empty() {
            volumes.push(json!({"name": "config", "configMap": {"name": name}}));
            mounts.push(json!({"name": "config", "mountPath": "/run/config"}));
        }
        container["volumeMounts"] = json!(mounts);
        Ok(serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "namespace": namespace, "name": name, "uid": uuid::Uuid::new_v4().to_string(),
                "labels": {"app": app, "topology.kubernetes.io/zone": zone},
            },
            "spec": {
                "serviceAccountName": service_account, "nodeName": node,
                "containers": [container], "volumes": volumes,
            },
        }))?)
    }
}

impl World {
    /// Starts a workload's pod and waits until it is ready. `labelled`: its namespace is labelled
    /// for injection.
    pub fn start_pod(&mut self, workload: &Workload<'_>, labelled: bool) -> Result<&Pod> {
        let zone = self.node(workload.node)?.zone;
        let object = self.injected(workload.object(zone)?, labelled)?;
        self.start_object(object, &workload.files)
    }

    /// Runs the pod through injection, as the webhook will.
    pub fn injected(&self, object: PodObject, labelled: bool) -> Result<PodObject> {
        let label = ("turnpike.dev/inject".to_owned(), "enabled".to_owned());
        let labels = if labelled {
            [label].into()
        } else {
            BTreeMap::new()
        };
        match inject::inject(&object, &labels, &self.inject_config())? {
            Injection::Injected(pod) => Ok(*pod),
            Injection::Skipped(reason) => {
                ensure!(!labelled, "the pod was not injected: {reason}");
                Ok(object)
            }
        }
    }

    /// Starts a Pod object as it is.
    pub fn start_object(&mut self, object: PodObject, files: &[(&str, String)]) -> Result<&Pod> {
        let key = (
            name_of(&object.metadata.namespace),
            name_of(&object.metadata.name),
        );
        self.directory.write_object(&file(&key), &object)?;
        let node = object
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.clone())
            .unwrap_or_default();
        let folder = self.folder.join("pods").join(file(&key));
        fs::create_dir_all(&folder)?;
        let namespace = Namespace::handle(&format!("{}-{}-{}", self.options.name, key.0, key.1))?;
        turnpike_vpc::claim::add(&self.options.name, &namespace)?;
        let namespace = Namespace::create(namespace.name())?;
        let sandbox = Sandbox {
            node: &node,
            key: &key,
            id: uid_of(&object),
            namespace: &namespace,
        };
        let added = self.cni("ADD", &sandbox);
        let address = match added {
            Ok(result) => address_of(&result)?,
            Err(error) => {
                namespace.remove(Duration::ZERO)?;
                self.directory.remove(&file(&key))?;
                return Err(error);
            }
        };
        let mut pod = Pod {
            object,
            node,
            address,
            namespace,
            sidecar: None,
            apps: Vec::new(),
            folder,
        };
        let started = self
            .start_containers(&mut pod, files)
            .and_then(|()| self.report(&mut pod, true));
        if let Err(error) = started {
            self.pods.insert(key.clone(), pod);
            // Why it did not start matters more than how it ended.
            let _ = self.delete_pod(&key.0, &key.1);
            return Err(error);
        }
        Ok(self.pods.entry(key).insert_entry(pod).into_mut())
    }

    fn start_containers(&self, pod: &mut Pod, files: &[(&str, String)]) -> Result<()> {
        let spec = pod.object.spec.clone().unwrap_or_default();
        let volumes = self.volumes(pod, &spec.volumes.unwrap_or_default(), files)?;
        for container in spec.init_containers.unwrap_or_default() {
            ensure!(
                container.name == SIDECAR,
                "{} is not a container of the box",
                container.name
            );
            let mut sidecar = self.start_container(pod, &container, &volumes)?;
            let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
            sidecar.ready(at(loopback, SIDECAR_READY_PORT), "/healthz/ready", READY)?;
            pod.sidecar = Some(sidecar);
        }
        for container in spec.containers {
            let app = self.start_container(pod, &container, &volumes)?;
            pod.apps.push(app);
        }
        Ok(())
    }

    fn start_container(
        &self,
        pod: &Pod,
        container: &Container,
        volumes: &[(String, PathBuf)],
    ) -> Result<Daemon> {
        let user = container
            .security_context
            .as_ref()
            .and_then(|context| context.run_as_user)
            .and_then(|user| u32::try_from(user).ok())
            .unwrap_or(APP_USER);
        let mut command = if container.name == SIDECAR {
            Command::new(SIDECAR_PROGRAM)
        } else {
            let line = container.command.clone().unwrap_or_default();
            let (first, rest) = line
                .split_first()
                .context("a container of the box has a command")?;
            Command::new(first).args(rest)
        };
        command = command
            .args(container.args.clone().unwrap_or_default())
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("RUST_LOG", "info")
            .no_new_privileges()
            .capabilities(0);
        for variable in container.env.iter().flatten() {
            command = command.env(&variable.name, value_of(variable, pod)?);
        }
        command = in_pod(command).bind_read_only(self.resolv_conf(pod)?, "/etc/resolv.conf");
        for mount in container.volume_mounts.iter().flatten() {
            let (_, source) = volumes
                .iter()
                .find(|(name, _)| *name == mount.name)
                .with_context(|| format!("volume {} is not known", mount.name))?;
            let target = mount.mount_path.replacen("/var/run", "/run", 1);
            command = if mount.read_only == Some(true) {
                command.bind_read_only(source, target)
            } else {
                command.bind(source, target)
            };
        }
        if container.name == SIDECAR {
            let build = match &self.options.proxy {
                Some(build) => build.clone(),
                None => program("turnpike-proxy")?,
            };
            command = command.bind_read_only(build, SIDECAR_PROGRAM);
        }
        let name = format!("{}/{}", file(&key_of(pod)), container.name);
        let command = command.user(user, user);
        Daemon::start(
            &name,
            command,
            &pod.namespace,
            &pod.folder,
            self.options.keep,
        )
    }

    /// Makes a folder for each volume: tokens and the root bundle as a kubelet projects them.
    fn volumes(
        &self,
        pod: &Pod,
        volumes: &[Volume],
        files: &[(&str, String)],
    ) -> Result<Vec<(String, PathBuf)>> {
        let mut made = Vec::new();
        for volume in volumes {
            let folder = pod.folder.join("volumes").join(&volume.name);
            fs::create_dir_all(&folder)?;
            chown(&folder, Some(APP_USER), Some(APP_USER))?;
            for source in volume
                .projected
                .iter()
                .flat_map(|p| p.sources.iter().flatten())
            {
                if let Some(token) = &source.service_account_token {
                    self.write_token(pod, &folder.join(&token.path))?;
                }
            }
            match volume.config_map.as_ref().map(|map| map.name.as_str()) {
                Some("turnpike-root") => {
                    fs::copy(self.folder.join("root.pem"), folder.join("root.pem"))?;
                }
                Some(_) => {
                    for (name, content) in files {
                        fs::write(folder.join(name), content)?;
                    }
                }
                None if volume.empty_dir.is_some() && volume.name != "scratch" => {
                    // The sidecar's own state.
                    chown(&folder, Some(1337), Some(1337))?;
                }
                None => {}
            }
            made.push((volume.name.clone(), folder));
        }
        Ok(made)
    }

    fn write_token(&self, pod: &Pod, path: &Path) -> Result<()> {
        let (namespace, name) = key_of(pod);
        let account = pod
            .object
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.clone());
        let subject = Subject {
            namespace: &namespace,
            service_account: account.as_deref().unwrap_or("default"),
            pod: Some((&name, pod.uid())),
            node: Some(&pod.node),
        };
        fs::write(
            path,
            self.issuer.token(&subject, Duration::from_secs(3600))?,
        )?;
        Ok(())
    }

    fn resolv_conf(&self, pod: &Pod) -> Result<PathBuf> {
        let path = pod.folder.join("resolv.conf");
        let (namespace, _) = key_of(pod);
        let text = format!(
            "nameserver 10.0.0.2\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
        );
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Runs a command inside a pod to its end, as the workloads' user.
    pub fn exec(&self, namespace: &str, name: &str, line: &[&str]) -> Result<Said> {
        let pod = self.pod(namespace, name)?;
        self.exec_as(pod, APP_USER, line)
    }

    /// As [`exec`](Self::exec), as any user; root keeps its capabilities in the pod.
    pub fn exec_as(&self, pod: &Pod, user: u32, line: &[&str]) -> Result<Said> {
        let (first, rest) = line.split_first().context("an empty command line")?;
        let command = in_pod(Command::new(first).args(rest))
            .bind_read_only(self.resolv_conf(pod)?, "/etc/resolv.conf")
            .bind(pod.scratch(), "/run/scratch")
            .user(user, user)
            .stdout(Output::Piped)
            .stderr(Output::Piped);
        let output = command.output(&pod.namespace)?;
        Ok(Said {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    pub fn pod(&self, namespace: &str, name: &str) -> Result<&Pod> {
        let key = (namespace.to_owned(), name.to_owned());
        self.pods
            .get(&key)
            .with_context(|| format!("no pod {namespace}/{name}"))
    }

    pub fn pod_mut(&mut self, namespace: &str, name: &str) -> Result<&mut Pod> {
        let key = (namespace.to_owned(), name.to_owned());
        self.pods
            .get_mut(&key)
            .with_context(|| format!("no pod {namespace}/{name}"))
    }

    /// Ends a pod: terminating first, then its processes, then its network.
    pub fn delete_pod(&mut self, namespace: &str, name: &str) -> Result<()> {
        let key = (namespace.to_owned(), name.to_owned());
        let mut pod = self
            .pods
            .remove(&key)
            .with_context(|| format!("no pod {namespace}/{name}"))?;
        let now = k8s_openapi::jiff::Timestamp::now();
        pod.object.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
        self.report(&mut pod, false)?;
        for app in &mut pod.apps {
            app.stop(GRACE)?;
        }
        if let Some(sidecar) = &mut pod.sidecar {
            sidecar.stop(GRACE)?;
        }
        self.cni(
            "DEL",
            &Sandbox {
                node: &pod.node,
                key: &key,
                id: pod.uid(),
                namespace: &pod.namespace,
            },
        )?;
        pod.namespace.remove(Duration::from_millis(500))?;
        turnpike_vpc::claim::forget(&self.options.name, &pod.namespace)?;
        self.directory.remove(&file(&key))?;
        Ok(())
    }

    /// Writes the pod's status, as a kubelet does.
    pub fn report(&self, pod: &mut Pod, ready: bool) -> Result<()> {
        let ready = if ready { "True" } else { "False" };
        let status = json!({
            "phase": "Running",
            "podIP": pod.address, "podIPs": [{"ip": pod.address}],
            "conditions": [{"type": "Ready", "status": ready}],
        });
        pod.object.status = Some(serde_json::from_value(status)?);
        self.directory
            .write_object(&file(&key_of(pod)), &pod.object)
    }

    /// Calls the CNI executable on a node as a runtime does. Its result, if it succeeded.
    pub fn cni(&self, verb: &str, sandbox: &Sandbox<'_>) -> Result<Value> {
        let Sandbox {
            node,
            key: (pod_namespace, name),
            id,
            namespace,
        } = sandbox;
        let node = self.node(node)?;
        let config = json!({
            "cniVersion": "1.1.0", "name": "turnpike", "type": "turnpike-cni",
            "agentSocket": node.folder.join("cni.sock"),
        });
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={pod_namespace};K8S_POD_NAME={name};K8S_POD_UID={id}"
        );
        let command = Command::new(program("turnpike-cni")?)
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", namespace.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", arguments)
            .stdin_piped()
            .stdout(Output::Piped)
            .stderr(Output::Piped);
        let mut child = command.spawn(&node.namespace)?;
        let mut input = child.stdin.take().context("standard input was asked for")?;
        std::io::Write::write_all(&mut input, config.to_string().as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!("CNI {verb} for {pod_namespace}/{name} was refused: {said}");
        }
        Ok(if said.trim().is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&said)?
        })
    }
}

/// Folders of its own, so that a pod sees nothing of this machine's.
fn in_pod(command: Command) -> Command {
    command.tmpfs("/run").tmpfs("/tmp").tmpfs("/var/lib")
}

fn value_of(variable: &EnvVar, pod: &Pod) -> Result<String> {
    if let Some(value) = &variable.value {
        return Ok(value.clone());
    }
    let path = variable
        .value_from
        .as_ref()
        .and_then(|from| from.field_ref.as_ref())
        .map(|field| field.field_path.as_str());
    let spec = pod.object.spec.as_ref();
    Ok(match path {
        Some("metadata.name") => name_of(&pod.object.metadata.name),
        Some("metadata.namespace") => name_of(&pod.object.metadata.namespace),
        Some("metadata.uid") => pod.uid().to_owned(),
        Some("status.podIP" | "status.podIPs") => pod.address.to_string(),
        Some("status.hostIP") => String::new(),
        Some("spec.nodeName") => pod.node.clone(),
        Some("spec.serviceAccountName") => spec
            .and_then(|spec| spec.service_account_name.clone())
            .unwrap_or_default(),
        other => bail!("{}: {other:?} is not known to the box", variable.name),
    })
}

fn address_of(result: &Value) -> Result<IpAddr> {
    let text = result["ips"][0]["address"]
        .as_str()
        .context("the CNI result has an address")?;
    Ok(text.split('/').next().unwrap_or_default().parse()?)
}

fn key_of(pod: &Pod) -> (String, String) {
    (
        name_of(&pod.object.metadata.namespace),
        name_of(&pod.object.metadata.name),
    )
}

fn uid_of(object: &PodObject) -> &str {
    object.metadata.uid.as_deref().unwrap_or_default()
}

fn name_of(name: &Option<String>) -> String {
    name.clone().unwrap_or_default()
}

fn file((namespace, name): &(String, String)) -> String {
    format!("pod-{namespace}-{name}")
}
