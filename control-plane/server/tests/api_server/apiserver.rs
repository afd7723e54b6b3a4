//! An etcd and a kube-apiserver of a test's own. They end with it.

use std::{
    fs,
    io::Write as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
};

use base64::{Engine, engine::general_purpose::STANDARD};

use super::pki::Pki;
use crate::common::{eventually, own_loopback};

pub(crate) struct ApiServer {
    folder: tempfile::TempDir,
    bin: PathBuf,
    pub(crate) pki: Pki,
    /// A loopback address of its own.
    pub(crate) host: Ipv4Addr,
    /// Where the next controller's injector listens.
    webhook_port: AtomicU16,
    etcd: Child,
    server: Option<Child>,
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) ok: bool,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl ApiServer {
    /// One that answers.
    pub(crate) fn start() -> Self {
        let bin = executables();
        let folder = tempfile::tempdir().unwrap();
        let (pki, host) = (Pki::new(), own_loopback());
        let (certificate, key) = pki.write(folder.path(), host);
        let identity = format!(
            "{{client-certificate-data: {}, client-key-data: {}}}",
            STANDARD.encode(certificate),
            STANDARD.encode(key)
        );
        let etcd = etcd(&bin, folder.path(), host);
        let mut all = Self {
            folder,
            bin,
            pki,
            host,
            webhook_port: AtomicU16::new(9443),
            etcd,
            server: None,
        };
        all.kubeconfig("admin.conf", &identity);
        // The API server finds the webhook by the name in its certificate.
        let hosts =
            format!("127.0.0.1 localhost\n{host} turnpike-controller.turnpike-system.svc\n");
        fs::write(all.path("hosts"), hosts).unwrap();
        all.start_server();
        all
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn next_webhook_port(&self) -> u16 {
        self.webhook_port.fetch_add(1, Ordering::Relaxed)
    }

    /// A kubeconfig for a user given by its fields.
    pub(crate) fn kubeconfig(&self, name: &str, user: &str) -> PathBuf {
        let path = self.path(name);
        let text = format!(
            "apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: 'https://{}:6443', certificate-authority-data: {}}}}}]
users: [{{name: u, user: {user}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
current-context: c
",
            self.host,
            STANDARD.encode(&self.pki.certificate)
        );
        fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn start_server(&mut self) {
        let file = |name: &str| self.path(name).display().to_string();
        let flags = [
            format!("--etcd-servers=http://{}:2379", self.host),
            format!("--bind-address={}", self.host),
            // Nothing is sent there; it is what EndpointSlice default/kubernetes says.
            "--advertise-address=192.0.2.1".to_owned(),
            "--secure-port=6443".to_owned(),
            format!("--tls-cert-file={}", file("apiserver.crt")),
            format!("--tls-private-key-file={}", file("apiserver.key")),
            format!("--client-ca-file={}", file("ca.crt")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--api-audiences=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", file("sa.pub")),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--profiling=false".to_owned(),
        ];
        let mut command = command("unshare", &self.path("apiserver.log"));
        command
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg("mount --bind \"$0\" /etc/hosts && exec \"$@\"")
            .arg(self.path("hosts"))
            .arg(self.bin.join("kube-apiserver"))
            .args(flags);
        self.server = Some(command.spawn().unwrap());
        eventually("a ready API server", || {
            self.try_kubectl(&["get", "--raw=/readyz"]).ok.then_some(())
        });
    }

    pub(crate) fn stop_server(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }

    /// As an administrator.
    pub(crate) fn try_kubectl(&self, args: &[&str]) -> Said {
        self.kubectl_with("admin.conf", args, None)
    }

    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        let said = self.try_kubectl(args);
        assert!(said.ok, "kubectl {}: {}", args.join(" "), said.err);
        said.out
    }

    pub(crate) fn apply(&self, yaml: &str) {
        let said = self.try_apply(yaml);
        assert!(said.ok, "{yaml}\n{}", said.err);
    }

    /// Creates it anew each time, as controllers do: what is denied is said on standard error.
    pub(crate) fn try_create(&self, yaml: &str) -> Said {
        self.kubectl_with("admin.conf", &["create", "-f", "-"], Some(yaml))
    }

    pub(crate) fn try_apply(&self, yaml: &str) -> Said {
        let args = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        self.kubectl_with("admin.conf", &args, Some(yaml))
    }

    fn kubectl_with(&self, config: &str, args: &[&str], input: Option<&str>) -> Said {
        let mut child = Command::new(self.bin.join("kubectl"))
            .arg("--kubeconfig")
            .arg(self.path(config))
            .arg("--cache-dir")
            .arg(self.path("kubectl-cache"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin
            .write_all(input.unwrap_or_default().as_bytes())
            .unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        Said {
            ok: output.status.success(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// An object as JSON; `None`: there is none.
    pub(crate) fn get(&self, namespace: &str, what: &str) -> Option<serde_json::Value> {
        let said = self.try_kubectl(&["get", "--namespace", namespace, what, "--output=json"]);
        said.ok.then(|| serde_json::from_str(&said.out).unwrap())
    }

    /// A template of the chart, as helm makes it.
    pub(crate) fn chart(&self, templates: &[&str]) -> String {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../charts/turnpike");
        let mut command = Command::new(self.bin.join("helm"));
        command
            .args(["template", "turnpike"])
            .arg(&chart)
            .args(["--namespace=turnpike-system", "--kube-version=1.34.0"])
            .args(["--set=mesh.prefixes={10.0.0.0/16,10.96.0.0/16}"])
            .args(["--set=mesh.serviceCidrs={10.96.0.0/16},gate.clusterDns=10.96.0.10"]);
        for template in templates {
            command.arg(format!("--show-only=templates/{template}"));
        }
        let output = command.output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "helm template: {err}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The CRDs of our kinds, in force when it returns.
    pub(crate) fn install_crds(&self) {
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../charts/turnpike/crds");
        self.establish(&crds);
    }

    /// The CRD of Gateway API's HTTPRoute, as its project publishes it.
    pub(crate) fn install_routes(&self) {
        let crd = self
            .bin
            .join("../gateway-api/gateway.networking.k8s.io_httproutes.yaml");
        self.establish(&crd);
    }

    fn establish(&self, crds: &Path) {
        let crds = crds.display().to_string();
        self.kubectl(&["apply", "--server-side", "-f", &crds]);
        let established = "--for=condition=Established";
        self.kubectl(&["wait", established, "crd", "--all", "--timeout=60s"]);
    }

    /// A token of a pod's, as kubelet asks for it.
    pub(crate) fn token(&self, pod: &str, account: &str, audience: &str) -> String {
        let (namespace, pod) = pod.split_once('/').unwrap();
        let args = [
            "create",
            "token",
            account,
            &format!("--namespace={namespace}"),
            "--bound-object-kind=Pod",
            &format!("--bound-object-name={pod}"),
            &format!("--audience={audience}"),
        ];
        self.kubectl(&args).trim().to_owned()
    }

    /// A namespace in which pods can be made; nobody else makes its service account here.
    pub(crate) fn namespace(&self, name: &str, labels: &str) {
        self.apply(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n\
             ---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: default, namespace: \
             {name}}}\n"
        ));
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop_server();
        let _ = self.etcd.kill();
        let _ = self.etcd.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.path("apiserver.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let last = lines.len().saturating_sub(30);
            eprintln!(
                "---- the API server's last lines\n{}",
                lines[last..].join("\n")
            );
        }
    }
}

/// Where the executables are. Missing ones fail the test: it was asked for.
fn executables() -> PathBuf {
    let bin = match std::env::var_os("KUBERNETES_BIN") {
        Some(bin) => PathBuf::from(bin),
        None => {
            let home = std::env::var_os("HOME").unwrap_or_default();
            Path::new(&home).join(".cache/turnpike/kubernetes/bin")
        }
    };
    for name in ["etcd", "kube-apiserver", "kubectl", "helm"] {
        assert!(
            bin.join(name).exists(),
            "there is no {name} in {}: build it with `cargo verify kubernetes`, or set \
             KUBERNETES_BIN",
            bin.display()
        );
    }
    bin
}

fn etcd(bin: &Path, folder: &Path, host: Ipv4Addr) -> Child {
    let (client, peer) = (format!("http://{host}:2379"), format!("http://{host}:2380"));
    command(
        &bin.join("etcd").display().to_string(),
        &folder.join("etcd.log"),
    )
    .args(["--name=one", "--unsafe-no-fsync", "--log-level=warn"])
    .arg(format!("--data-dir={}", folder.join("etcd").display()))
    .arg(format!("--listen-client-urls={client}"))
    .arg(format!("--advertise-client-urls={client}"))
    .arg(format!("--listen-peer-urls={peer}"))
    .arg(format!("--initial-advertise-peer-urls={peer}"))
    .arg(format!("--initial-cluster=one={peer}"))
    .spawn()
    .unwrap()
}

/// In a process group of its own, and never outliving the test, however that ends.
fn command(program: &str, log: &Path) -> Command {
    use std::os::unix::process::CommandExt;
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .unwrap();
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig=KILL", program])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    command
}
