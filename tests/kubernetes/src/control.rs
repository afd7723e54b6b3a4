//! The control plane: etcd, API server, controllers and scheduler, on an instance of their own.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use turnpike_rig::{daemon::Daemon, wait_for, world::CONTROL};
use turnpike_vpc::netns::{Command, Namespace};

use crate::{
    build::Cache,
    certificates::{Authority, Pair, Subject, kubeconfig, secret, write_pair},
    kubectl::Kubectl,
};

pub const SERVER: &str = "https://10.0.0.10:6443";
/// The first address of the Services' range.
const KUBERNETES_SERVICE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
const SERVICES: &str = "10.96.0.0/16";
const ISSUER: &str = "https://kubernetes.default.svc";
const READY: Duration = Duration::from_secs(60);

/// Certificates and kubeconfigs of a cluster, below one folder.
#[derive(Debug)]
pub struct Keys {
    folder: PathBuf,
    authority: Authority,
}

impl Keys {
    pub fn make(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let keys = Self {
            folder: folder.to_owned(),
            authority: Authority::new("turnpike box")?,
        };
        fs::write(keys.file("ca.crt"), keys.authority.pem())?;
        secret(&keys.file("ca.key"), &keys.authority.key_pem())?;
        let names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        let addresses = [CONTROL, KUBERNETES_SERVICE, IpAddr::V4(Ipv4Addr::LOCALHOST)];
        let server = Subject {
            user: "kube-apiserver",
            group: None,
        };
        write_pair(
            folder,
            "apiserver",
            &keys.authority.server(server, &names, &addresses)?,
        )?;
        let to_kubelets = keys.client("kube-apiserver-kubelet-client", Some("system:masters"))?;
        write_pair(folder, "kubelet-client", &to_kubelets)?;
        keys.front_proxy()?;
        keys.service_accounts()?;
        for (name, user, group) in [
            ("admin", "box-admin", Some("system:masters")),
            ("controller-manager", "system:kube-controller-manager", None),
            ("scheduler", "system:kube-scheduler", None),
        ] {
            let pair = keys.client(user, group)?;
            secret(
                &keys.kubeconfig(name),
                &kubeconfig(SERVER, &keys.authority, &pair),
            )?;
        }
        Ok(keys)
    }

    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    pub fn kubeconfig(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.conf"))
    }

    pub fn client(&self, user: &str, group: Option<&str>) -> Result<Pair> {
        self.authority.client(Subject { user, group })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Extension API servers know the API server by an authority of its own.
    fn front_proxy(&self) -> Result<()> {
        let authority = Authority::new("turnpike box front proxy")?;
        fs::write(self.file("front-proxy-ca.crt"), authority.pem())?;
        let client = authority.client(Subject {
            user: "front-proxy-client",
            group: None,
        })?;
        write_pair(&self.folder, "front-proxy", &client)?;
        Ok(())
    }

    /// The key that service accounts' tokens are signed by.
    fn service_accounts(&self) -> Result<()> {
        let key = rcgen::KeyPair::generate()?;
        secret(&self.file("accounts.key"), &key.serialize_pem())?;
        Ok(fs::write(self.file("accounts.pub"), key.public_key_pem())?)
    }
}

/// Starts everything and waits until the API server is ready.
pub fn start(
    cache: &Cache,
    keys: &Keys,
    control: &Namespace,
    folder: &Path,
    disk: &Path,
    keep: bool,
) -> Result<Vec<Daemon>> {
    let plan = Plan {
        cache,
        keys,
        control,
        folder,
        keep,
    };
    let etcd = plan.etcd(&disk.join("etcd"))?;
    let mut server = plan.server()?;
    let kubectl = Kubectl::new(cache, control, &keys.kubeconfig("admin"));
    let ready = wait_for(READY, || {
        if !server.is_running() {
            return Some(false);
        }
        kubectl
            .run(&["get", "--raw=/readyz"])
            .ok()?
            .ok
            .then_some(true)
    });
    if ready != Some(true) {
        let log = turnpike_rig::daemon::tail(&server.log());
        anyhow::bail!("the API server is not ready; its log:\n{log}");
    }
    Ok(vec![etcd, server, plan.controllers()?, plan.scheduler()?])
}

struct Plan<'a> {
    cache: &'a Cache,
    keys: &'a Keys,
    control: &'a Namespace,
    folder: &'a Path,
    keep: bool,
}

impl Plan<'_> {
    fn etcd(&self, data: &Path) -> Result<Daemon> {
        fs::create_dir_all(data)?;
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(data, fs::Permissions::from_mode(0o700))?;
        let (client, peer) = ("http://127.0.0.1:2379", "http://127.0.0.1:2380");
        self.start(
            "etcd",
            &[
                "--name=box".to_owned(),
                format!("--data-dir={}", data.display()),
                // A box's state is not worth waiting for the disk.
                "--unsafe-no-fsync".to_owned(),
                "--log-level=warn".to_owned(),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=box={peer}"),
            ],
        )
    }

    fn server(&self) -> Result<Daemon> {
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.keys.file(name).display());
        self.start(
            "kube-apiserver",
            &[
                "--etcd-servers=http://127.0.0.1:2379".to_owned(),
                format!("--advertise-address={CONTROL}"),
                "--secure-port=6443".to_owned(),
                file("tls-cert-file", "apiserver.crt"),
                file("tls-private-key-file", "apiserver.key"),
                file("client-ca-file", "ca.crt"),
                file("kubelet-client-certificate", "kubelet-client.crt"),
                file("kubelet-client-key", "kubelet-client.key"),
                file("kubelet-certificate-authority", "ca.crt"),
                "--kubelet-preferred-address-types=InternalIP".to_owned(),
                format!("--service-account-issuer={ISSUER}"),
                format!("--api-audiences={ISSUER}"),
                file("service-account-key-file", "accounts.pub"),
                file("service-account-signing-key-file", "accounts.key"),
                format!("--service-cluster-ip-range={SERVICES}"),
                "--authorization-mode=Node,RBAC".to_owned(),
                "--enable-admission-plugins=NodeRestriction".to_owned(),
                file("requestheader-client-ca-file", "front-proxy-ca.crt"),
                "--requestheader-allowed-names=front-proxy-client".to_owned(),
                "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
                "--requestheader-group-headers=X-Remote-Group".to_owned(),
                "--requestheader-username-headers=X-Remote-User".to_owned(),
                file("proxy-client-cert-file", "front-proxy.crt"),
                file("proxy-client-key-file", "front-proxy.key"),
                // There is no kube-proxy here: Services of webhooks are resolved to pods, which
                // the VPC routes.
                "--enable-aggregator-routing=true".to_owned(),
                "--allow-privileged=true".to_owned(),
                "--profiling=false".to_owned(),
            ],
        )
    }

    fn controllers(&self) -> Result<Daemon> {
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.keys.file(name).display());
        self.start(
            "kube-controller-manager",
            &[
                file("kubeconfig", "controller-manager.conf"),
                file("authentication-kubeconfig", "controller-manager.conf"),
                file("authorization-kubeconfig", "controller-manager.conf"),
                "--bind-address=127.0.0.1".to_owned(),
                "--leader-elect=false".to_owned(),
                "--use-service-account-credentials=true".to_owned(),
                file("service-account-private-key-file", "accounts.key"),
                file("root-ca-file", "ca.crt"),
                file("client-ca-file", "ca.crt"),
                file("cluster-signing-cert-file", "ca.crt"),
                file("cluster-signing-key-file", "ca.key"),
                file("requestheader-client-ca-file", "front-proxy-ca.crt"),
                // Tests wait for a dead node to be noticed.
                "--node-monitor-grace-period=20s".to_owned(),
                "--allocate-node-cidrs=false".to_owned(),
                "--controllers=*".to_owned(),
            ],
        )
    }

    fn scheduler(&self) -> Result<Daemon> {
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.keys.file(name).display());
        self.start(
            "kube-scheduler",
            &[
                file("kubeconfig", "scheduler.conf"),
                file("authentication-kubeconfig", "scheduler.conf"),
                file("authorization-kubeconfig", "scheduler.conf"),
                "--bind-address=127.0.0.1".to_owned(),
                "--leader-elect=false".to_owned(),
            ],
        )
    }

    fn start(&self, name: &str, arguments: &[String]) -> Result<Daemon> {
        let command = Command::new(self.cache.program(name))
            .args(arguments)
            // Certificates and sockets of its own; nothing of ours.
            .env_clear()
            .env("HOME", "/nonexistent")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        Daemon::start(
            name,
            command,
            self.control,
            &self.folder.join("control"),
            self.keep,
        )
        .with_context(|| name.to_owned())
    }
}
