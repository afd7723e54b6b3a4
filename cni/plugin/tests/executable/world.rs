//! An agent on a Unix socket, and the executable as a runtime runs it.

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{net::UnixListener, runtime::Runtime};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use turnpike_wire::node::{
    AddReply, AddRequest, CheckReply, DelReply, DelRequest, GcReply, GcRequest, StatusReply,
    StatusRequest,
    cni_server::{Cni, CniServer},
};

/// What the agent was asked, in words; and what it is to refuse.
#[derive(Clone, Default)]
pub(crate) struct Agent {
    asked: Arc<Mutex<Vec<String>>>,
    refusal: Arc<Mutex<Option<Status>>>,
    pub(crate) delay: Arc<Mutex<Duration>>,
}

impl Agent {
    async fn hear<T>(&self, what: String, reply: T) -> Result<Response<T>, Status> {
        self.asked.lock().unwrap().push(what);
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        match self.refusal.lock().unwrap().clone() {
            Some(status) => Err(status),
            None => Ok(Response::new(reply)),
        }
    }
}

#[tonic::async_trait]
impl Cni for Agent {
    async fn add(&self, request: Request<AddRequest>) -> Result<Response<AddReply>, Status> {
        let reply = AddReply {
            address: "10.0.1.5/32".into(),
            gateway: "169.254.1.1".into(),
            host_interface: "eni18582a65b10".into(),
            host_mac: "02:00:00:00:00:01".into(),
            pod_mac: "02:00:00:00:00:02".into(),
            mtu: 9001,
        };
        let it = request.into_inner();
        let words = [
            it.container_id,
            it.ifname,
            it.network,
            it.pod_namespace,
            it.pod_name,
            it.pod_uid,
        ];
        self.hear(format!("ADD {}", words.join(" ")), reply).await
    }

    async fn del(&self, request: Request<DelRequest>) -> Result<Response<DelReply>, Status> {
        let it = request.into_inner();
        let words = [
            it.container_id,
            it.ifname,
            it.network,
            it.pod_namespace,
            it.pod_name,
        ];
        self.hear(format!("DEL {}", words.join(" ")), DelReply {})
            .await
    }

    async fn check(&self, request: Request<AddRequest>) -> Result<Response<CheckReply>, Status> {
        self.hear(
            format!("CHECK {}", request.into_inner().container_id),
            CheckReply {
                address: "10.0.1.5/32".into(),
            },
        )
        .await
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        self.hear("STATUS".to_owned(), StatusReply {}).await
    }

    async fn gc(&self, request: Request<GcRequest>) -> Result<Response<GcReply>, Status> {
        let valid = request.into_inner().valid;
        let names = valid
            .iter()
            .map(|it| format!("{}/{}", it.container_id, it.ifname));
        self.hear(
            format!("GC {}", names.collect::<Vec<_>>().join(" ")),
            GcReply { removed: 0 },
        )
        .await
    }
}

/// A folder with the agent's socket, and the agent if it runs.
pub(crate) struct World {
    pub(crate) folder: TempDir,
    pub(crate) agent: Agent,
    runtime: Runtime,
}

impl World {
    pub(crate) fn new() -> Self {
        let world = Self::without_agent();
        let (socket, agent) = (world.socket(), world.agent.clone());
        world.runtime.block_on(async move {
            let listener = UnixListener::bind(socket).unwrap();
            let server = Server::builder().add_service(CniServer::new(agent));
            tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        });
        world
    }

    pub(crate) fn without_agent() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        Self {
            folder: TempDir::new().unwrap(),
            agent: Agent::default(),
            runtime,
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("cni.sock")
    }

    pub(crate) fn config(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "turnpike", "type": "turnpike-cni",
            "agentSocket": self.socket(),
        })
    }

    /// With the result of the stand-in's ADD, or a part of it, as `prevResult`.
    pub(crate) fn config_after_add(&self) -> Value {
        let mut config = self.config("1.1.0");
        config["prevResult"] = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "eni18582a65b10", "mac": "02:00:00:00:00:01"},
                {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/proc/self/ns/net"},
            ],
            "ips": [{"address": "10.0.1.5/32", "gateway": "169.254.1.1", "interface": 1}],
        });
        config
    }

    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.agent.asked.lock().unwrap())
    }

    pub(crate) fn refuse(&self, status: Status) {
        *self.agent.refusal.lock().unwrap() = Some(status);
    }
}

pub(crate) type Variables = BTreeMap<&'static str, String>;

pub(crate) fn variables(command: &str) -> Variables {
    BTreeMap::from([
        ("CNI_COMMAND", command.to_owned()),
        ("CNI_CONTAINERID", "c0ffee".to_owned()),
        ("CNI_NETNS", "/proc/self/ns/net".to_owned()),
        ("CNI_IFNAME", "eth0".to_owned()),
        ("CNI_PATH", "/opt/cni/bin".to_owned()),
        (
            "CNI_ARGS",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=u-1".to_owned(),
        ),
    ])
}

/// Exit status 0 or not, and what was on standard output.
pub(crate) fn execute(variables: &Variables, stdin: &str) -> (bool, Value) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_turnpike-cni"))
        .env_clear()
        .envs(variables)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(stdin.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let value = if text.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&text).unwrap()
    };
    (output.status.success(), value)
}

pub(crate) fn run(world: &World, command: &str) -> (bool, Value) {
    execute(&variables(command), &world.config("1.1.0").to_string())
}
