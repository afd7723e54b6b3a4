//! The containers of a pod: their files, their environment, the order in which they start.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::chown,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Container, EnvVar, Volume};
use turnpike_vpc::netns::Command;

use super::{APP_USER, Pod, file, key_of, name_of};
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
const READY: Duration = Duration::from_secs(20);

impl World {
    pub(super) fn start_containers(&self, pod: &mut Pod, files: &[(&str, String)]) -> Result<()> {
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

    pub(super) fn resolv_conf(&self, pod: &Pod) -> Result<PathBuf> {
        let path = pod.folder.join("resolv.conf");
        let (namespace, _) = key_of(pod);
        let text = format!(
            "nameserver 10.0.0.2\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
        );
        fs::write(&path, text)?;
        Ok(path)
    }
}

/// Folders of its own, so that a pod sees nothing of this machine's.
pub(super) fn in_pod(command: Command) -> Command {
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
