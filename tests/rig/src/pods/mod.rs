//! Pods, started and ended the way a kubelet and a container runtime do it.
//!
//! 1. the Pod object goes through injection and into the controller's folder, bound to its node;
//! 2. the runtime's part: a network namespace, then the CNI executable with its environment and
//!    standard input;
//! 3. native sidecars start first and must be ready, then the containers;
//! 4. the status (address, readiness) is written back into the object.

mod cni;
mod containers;

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod as PodObject;
use serde_json::{Value, json};
use turnpike_kubernetes::inject::{self, Injection};
use turnpike_vpc::netns::{Command, Namespace, Output};

pub use self::cni::Sandbox;
use self::{cni::address_of, containers::in_pod};
use crate::{
    daemon::Daemon,
    world::{World, at},
};

/// The user that workloads run as: anyone but root and the proxy.
pub const APP_USER: u32 = 1000;
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

    /// Runs a command inside a pod to its end, as the workloads' user.
    pub fn exec(&self, namespace: &str, name: &str, line: &[&str]) -> Result<Said> {
        let pod = self.pod(namespace, name)?;
        self.exec_as(pod, APP_USER, line)
    }

    /// As [`exec`](Self::exec), as any user; root keeps its capabilities in the pod.
    pub fn exec_as(&self, pod: &Pod, user: u32, line: &[&str]) -> Result<Said> {
        let output = self.command_in(pod, user, line)?.output(&pod.namespace)?;
        Ok(Said {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// A command as [`exec_as`](Self::exec_as) runs it, to be run in the pod's namespace.
    pub fn command_in(&self, pod: &Pod, user: u32, line: &[&str]) -> Result<Command> {
        let (first, rest) = line.split_first().context("an empty command line")?;
        Ok(in_pod(Command::new(first).args(rest))
            .bind_read_only(self.resolv_conf(pod)?, "/etc/resolv.conf")
            .bind(pod.scratch(), "/run/scratch")
            .user(user, user)
            .stdout(Output::Piped)
            .stderr(Output::Piped))
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

pub(crate) fn name_of(name: &Option<String>) -> String {
    name.clone().unwrap_or_default()
}

fn file((namespace, name): &(String, String)) -> String {
    format!("pod-{namespace}-{name}")
}
