//! The controller as the chart runs it, with the chart's own rights.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use turnpike_wire::channel;

use super::apiserver::{ApiServer, eventually};

pub(crate) struct Controller {
    folder: tempfile::TempDir,
    child: Option<Child>,
    pub(crate) webhook: SocketAddr,
    addresses: Option<(SocketAddr, SocketAddr)>,
    kubeconfig: PathBuf,
    /// Where the log of the process that runs begins.
    begin: usize,
}

/// The namespace, the service account and its rights, by the chart; the CRDs too.
pub(crate) fn install(api: &ApiServer) {
    api.namespace("turnpike-system", "");
    api.apply(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: turnpike-controller, namespace: \
         turnpike-system}\n",
    );
    api.apply(&api.chart(&["rbac.yaml"]));
}

impl Controller {
    /// Started, whether it gets ready or not.
    pub(crate) fn launch(api: &ApiServer) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let args = [
            "create",
            "token",
            "turnpike-controller",
            "--namespace=turnpike-system",
            "--duration=24h",
        ];
        let token = api.kubectl(&args);
        let user = format!("{{token: {}}}", token.trim());
        let webhook = SocketAddr::from((api.host, api.next_webhook_port()));
        let kubeconfig = api.kubeconfig(&format!("controller-{}.conf", webhook.port()), &user);
        fs::write(
            folder.path().join("inject.yaml"),
            "image: turnpike/proxy:1\n",
        )
        .unwrap();
        let mut controller = Self {
            folder,
            child: None,
            webhook,
            addresses: None,
            kubeconfig,
            begin: 0,
        };
        controller.spawn();
        controller
    }

    /// Started, and ready.
    pub(crate) fn start(api: &ApiServer) -> Self {
        let mut controller = Self::launch(api);
        controller.ready();
        controller
    }

    pub(crate) fn spawn(&mut self) {
        self.begin = self.log().len();
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"));
        let mut command = Command::new("setpriv");
        command
            .args([
                "--pdeathsig=KILL",
                env!("CARGO_BIN_EXE_turnpike-controller"),
            ])
            .args([
                "--source=kubernetes",
                "--tokens=review",
                "--root-secret=turnpike-ca",
            ])
            .args(["--listen=127.0.0.1:0", "--http=127.0.0.1:0"])
            .arg(format!("--webhook={}", self.webhook))
            .args(["--webhook-configuration=turnpike-injector"])
            .arg("--inject-config")
            .arg(self.path("inject.yaml"))
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--root-cert-out")
            .arg(self.path("root.pem"))
            .env("KUBECONFIG", &self.kubeconfig)
            .env("TURNPIKE_LOG", "json")
            .env(
                "RUST_LOG",
                "info,turnpike_server=debug,turnpike_kubernetes=debug,kube_runtime=error",
            )
            .stdin(Stdio::null())
            .stderr(log.unwrap());
        self.child = Some(command.spawn().unwrap());
    }

    /// Waits for its ports.
    pub(crate) fn up(&mut self) {
        let up = eventually("the controller is up", || {
            let log = self.log().split_off(self.begin);
            let line = log
                .lines()
                .rfind(|line| line.contains("the controller is up"));
            line.map(str::to_owned)
        });
        let fields: Value = serde_json::from_str(&up).unwrap();
        let address = |name: &str| fields["fields"][name].as_str().unwrap().parse().unwrap();
        self.addresses = Some((address("grpc"), address("http")));
    }

    pub(crate) fn ready(&mut self) {
        self.up();
        eventually("readiness", || {
            (self.page("/healthz/ready").0 == 200).then_some(())
        });
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn page(&self, path: &str) -> (u16, String) {
        let (_, http) = self.addresses.unwrap();
        let mut stream = TcpStream::connect(http).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }

    pub(crate) fn json(&self, path: &str) -> Value {
        let (status, body) = self.page(path);
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    /// Messages of `/debug/rejections` that are about something.
    pub(crate) fn rejections(&self, about: &str) -> Vec<String> {
        let all = self.json("/debug/rejections");
        let all = all.as_array().unwrap().iter();
        all.map(|entry| {
            let text = |field: &str| entry[field].as_str().unwrap_or_default();
            format!("{} {} {}", text("file"), text("field"), text("message"))
        })
        .filter(|text| text.contains(about))
        .collect()
    }

    /// A client's way to it, with a token.
    pub(crate) fn client(&self, name: &str, token: &str) -> channel::Controller {
        let token_file = self.path(&format!("token-{name}"));
        fs::write(&token_file, token.trim()).unwrap();
        channel::Controller {
            address: self.addresses.unwrap().0.to_string(),
            server_name: turnpike_server::ca::DNS_NAME.into(),
            root_file: self.path("root.pem"),
            token_file,
        }
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM.
    pub(crate) fn terminate(&self) {
        let id = self.child.as_ref().unwrap().id();
        let process = Pid::from_raw(id.try_into().unwrap());
        kill(process, Signal::SIGTERM).unwrap();
    }

    /// The exit status, once it has ended by itself.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        self.child.as_mut().unwrap().wait().unwrap().code()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("---- the controller's log\n{}", self.log());
        }
    }
}
