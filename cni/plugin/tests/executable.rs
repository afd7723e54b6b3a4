//! The real executable, as a runtime runs it, against an agent on a Unix socket.

#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot do")]

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
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
struct Agent {
    asked: Arc<Mutex<Vec<String>>>,
    refusal: Arc<Mutex<Option<Status>>>,
    delay: Arc<Mutex<Duration>>,
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
            CheckReply {},
        )
        .await
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        self.hear("STATUS".to_owned(), StatusReply { allocatable: 0 })
            .await
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
struct World {
    folder: TempDir,
    agent: Agent,
    runtime: Runtime,
}

impl World {
    fn new() -> Self {
        let world = Self::without_agent();
        let (socket, agent) = (world.socket(), world.agent.clone());
        world.runtime.block_on(async move {
            let listener = UnixListener::bind(socket).unwrap();
            let server = Server::builder().add_service(CniServer::new(agent));
            tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        });
        world
    }

    fn without_agent() -> Self {
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

    fn socket(&self) -> PathBuf {
        self.folder.path().join("cni.sock")
    }

    fn config(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "turnpike", "type": "turnpike-cni",
            "agentSocket": self.socket(),
        })
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.agent.asked.lock().unwrap())
    }

    fn refuse(&self, status: Status) {
        *self.agent.refusal.lock().unwrap() = Some(status);
    }
}

type Variables = BTreeMap<&'static str, String>;

fn variables(command: &str) -> Variables {
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
fn execute(variables: &Variables, stdin: &str) -> (bool, Value) {
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

fn run(world: &World, command: &str) -> (bool, Value) {
    execute(&variables(command), &world.config("1.1.0").to_string())
}

#[test]
fn add_answers_in_the_form_of_each_version() {
    let world = World::new();
    let interfaces = |mtu: bool| {
        let mut list = json!([
            {"name": "eni18582a65b10", "mac": "02:00:00:00:00:01"},
            {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/proc/self/ns/net"},
        ]);
        if mtu {
            list[0]["mtu"] = 9001.into();
            list[1]["mtu"] = 9001.into();
        }
        list
    };
    for version in ["0.4.0", "1.0.0", "1.1.0"] {
        let (success, result) = execute(&variables("ADD"), &world.config(version).to_string());
        assert!(success, "{result}");
        let mut ip = json!({"address": "10.0.1.5/32", "gateway": "169.254.1.1", "interface": 1});
        if version == "0.4.0" {
            ip["version"] = "4".into();
        }
        let expected = json!({
            "cniVersion": version,
            "interfaces": interfaces(version == "1.1.0"),
            "ips": [ip],
            "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}],
            "dns": {},
        });
        assert_eq!(result, expected);
        assert_eq!(world.asked(), ["ADD c0ffee eth0 turnpike shop cart-0 u-1"]);
    }
}

#[test]
fn what_an_earlier_plugin_made_is_kept() {
    let world = World::new();
    let mut config = world.config("1.0.0");
    config["prevResult"] = json!({
        "cniVersion": "1.0.0", "interfaces": [{"name": "other0"}], "dns": {"nameservers": ["10.0.0.2"]},
    });
    let (success, result) = execute(&variables("ADD"), &config.to_string());
    assert!(success, "{result}");
    assert_eq!(result["interfaces"].as_array().unwrap().len(), 3);
    assert_eq!(result["interfaces"][0]["name"], "other0");
    assert_eq!(result["ips"][0]["interface"], 2);
    assert_eq!(result["dns"]["nameservers"][0], "10.0.0.2");

    config["prevResult"] = json!({"interfaces": "none"});
    let (success, result) = execute(&variables("ADD"), &config.to_string());
    assert!(!success);
    assert_eq!(result["code"], 7);
}

#[test]
fn the_other_commands_print_nothing() {
    let world = World::new();
    for (command, asked) in [
        ("DEL", "DEL c0ffee eth0 turnpike shop cart-0"),
        ("CHECK", "CHECK c0ffee"),
        ("STATUS", "STATUS"),
    ] {
        assert_eq!(run(&world, command), (true, Value::Null), "{command}");
        assert_eq!(world.asked(), [asked]);
    }
    let mut config = world.config("1.1.0");
    config["cni.dev/valid-attachments"] =
        json!([{"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "eth0"}]);
    let environment = BTreeMap::from([("CNI_COMMAND", "GC".to_owned())]);
    assert_eq!(
        execute(&environment, &config.to_string()),
        (true, Value::Null)
    );
    assert_eq!(world.asked(), ["GC a/eth0 b/eth0"]);
}

#[test]
fn version_needs_neither_agent_nor_configuration() {
    let environment = BTreeMap::from([("CNI_COMMAND", "VERSION".to_owned())]);
    let all = json!(["0.4.0", "1.0.0", "1.1.0"]);
    for (stdin, version) in [
        ("", "1.1.0"),
        ("{}", "1.1.0"),
        (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
    ] {
        let (success, result) = execute(&environment, stdin);
        assert!(success);
        assert_eq!(
            result,
            json!({"cniVersion": version, "supportedVersions": all})
        );
    }
}

type Spoil = fn(&mut Variables, &mut Value);

/// What is wrong with the input, and the code it must be refused with.
const MALFORMED: &[(&str, u32, Spoil)] = &[
    ("no command", 4, |v, _| drop(v.remove("CNI_COMMAND"))),
    ("unknown command", 4, |v, _| {
        drop(v.insert("CNI_COMMAND", "add".into()))
    }),
    ("no container", 4, |v, _| drop(v.remove("CNI_CONTAINERID"))),
    ("empty container", 4, |v, _| {
        drop(v.insert("CNI_CONTAINERID", String::new()))
    }),
    ("container as path", 4, |v, _| {
        drop(v.insert("CNI_CONTAINERID", "../../etc".into()))
    }),
    ("container too long", 4, |v, _| {
        drop(v.insert("CNI_CONTAINERID", "c".repeat(201)))
    }),
    ("no interface", 4, |v, _| drop(v.remove("CNI_IFNAME"))),
    ("interface as path", 4, |v, _| {
        drop(v.insert("CNI_IFNAME", "a/b".into()))
    }),
    ("interface with space", 4, |v, _| {
        drop(v.insert("CNI_IFNAME", "eth 0".into()))
    }),
    ("interface too long", 4, |v, _| {
        drop(v.insert("CNI_IFNAME", "sixteencharacter".into()))
    }),
    ("no netns", 4, |v, _| drop(v.remove("CNI_NETNS"))),
    ("missing netns", 3, |v, _| {
        drop(v.insert("CNI_NETNS", "/run/netns/tpt-none".into()))
    }),
    ("no arguments", 4, |v, _| drop(v.remove("CNI_ARGS"))),
    ("no pod name", 4, |v, _| {
        drop(v.insert("CNI_ARGS", "K8S_POD_NAMESPACE=shop".into()))
    }),
    ("malformed arguments", 4, |v, _| {
        drop(v.insert("CNI_ARGS", "K8S_POD_NAME".into()))
    }),
    ("not an object", 7, |_, c| *c = json!([1])),
    ("no version", 1, |_, c| c["cniVersion"] = "".into()),
    ("old version", 1, |_, c| c["cniVersion"] = "0.3.1".into()),
    ("future version", 1, |_, c| c["cniVersion"] = "2.0.0".into()),
    ("version not text", 7, |_, c| c["cniVersion"] = 1.into()),
    ("no name", 7, |_, c| c["name"] = "".into()),
    ("strange name", 7, |_, c| c["name"] = "a b".into()),
    ("relative socket", 7, |_, c| {
        c["agentSocket"] = "cni.sock".into()
    }),
    ("socket not text", 7, |_, c| c["agentSocket"] = 3.into()),
    ("no time", 7, |_, c| c["timeoutSeconds"] = 0.into()),
    ("endless time", 7, |_, c| c["timeoutSeconds"] = 601.into()),
    ("negative time", 7, |_, c| c["timeoutSeconds"] = (-1).into()),
    ("unknown field", 2, |_, c| c["ipMasq"] = true.into()),
    ("other's addresses", 2, |_, c| {
        c["ipam"] = json!({"type": "host-local"})
    }),
];

#[test]
fn malformed_input_is_refused_before_the_agent_hears_of_it() {
    let world = World::new();
    for (what, code, spoil) in MALFORMED {
        let (mut environment, mut config) = (variables("ADD"), world.config("1.1.0"));
        spoil(&mut environment, &mut config);
        let (success, error) = execute(&environment, &config.to_string());
        assert!(!success, "{what}");
        assert_eq!(error["code"], *code, "{what}: {error}");
        assert_eq!(error["cniVersion"], "1.1.0", "{what}");
        assert!(
            error["msg"].as_str().is_some_and(|text| !text.is_empty()),
            "{what}: {error}"
        );
    }
    let endless = format!("{{\"x\": \"{}\"}}", "x".repeat(1 << 20));
    for (what, stdin) in [
        ("nothing", ""),
        ("half", "{\"cniVersion\":"),
        ("too long", &endless),
    ] {
        let (success, error) = execute(&variables("ADD"), stdin);
        assert!(!success, "{what}");
        assert_eq!(error["code"], 6, "{what}: {error}");
    }
    assert_eq!(world.asked(), Vec::<String>::new());
    assert_eq!(
        fs::read_dir(world.folder.path()).unwrap().count(),
        1,
        "a side effect"
    );
}

#[test]
fn status_and_gc_are_of_the_newest_version_alone() {
    let world = World::new();
    for command in ["STATUS", "GC"] {
        let (success, error) = execute(&variables(command), &world.config("1.0.0").to_string());
        assert!(!success);
        assert_eq!(
            (&error["code"], &error["cniVersion"]),
            (&json!(1), &json!("1.0.0"))
        );
    }
    assert_eq!(world.asked(), Vec::<String>::new());
}

#[test]
fn del_takes_what_is_left_of_its_input() {
    let world = World::new();
    let mut environment = variables("DEL");
    environment.remove("CNI_NETNS");
    environment.insert("CNI_ARGS", "broken".into());
    let mut config = world.config("1.1.0");
    config["leftover"] = "of an older configuration".into();
    assert_eq!(
        execute(&environment, &config.to_string()),
        (true, Value::Null)
    );
    assert_eq!(world.asked(), ["DEL c0ffee eth0 turnpike  "]);
}

#[test]
fn refusals_of_the_agent_have_the_specifications_codes() {
    let world = World::new();
    for (status, add, asked_status) in [
        (Status::invalid_argument("no"), 7, 7),
        (Status::not_found("no"), 3, 3),
        (Status::resource_exhausted("no"), 11, 50),
        (Status::unavailable("no"), 11, 50),
        (Status::failed_precondition("no"), 11, 51),
        (Status::internal("no"), 100, 100),
    ] {
        world.refuse(status.clone());
        for (command, code) in [("ADD", add), ("STATUS", asked_status)] {
            let (success, error) = run(&world, command);
            assert!(!success, "{status}");
            assert_eq!(error["code"], code, "{command} {status}");
            assert!(error["msg"].as_str().unwrap().ends_with(": no"), "{error}");
        }
    }
}

fn tombstones(folder: &Path) -> Vec<(String, Value)> {
    let Ok(entries) = fs::read_dir(folder.join("removed")) else {
        return Vec::new();
    };
    let read = entries.map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (
            name,
            serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap(),
        )
    });
    read.collect()
}

#[test]
fn without_an_agent_del_is_noted_and_the_others_are_told_to_try_again() {
    let world = World::without_agent();
    for (command, code) in [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)] {
        let (success, error) = run(&world, command);
        assert!(!success, "{command}");
        assert_eq!(error["code"], code, "{command}: {error}");
    }
    assert!(tombstones(world.folder.path()).is_empty());

    for _ in 0..2 {
        assert_eq!(run(&world, "DEL"), (true, Value::Null));
    }
    let noted = tombstones(world.folder.path());
    assert_eq!(noted.len(), 1);
    let (name, mut content) = noted.into_iter().next().unwrap();
    assert_eq!(name, "c0ffee@eth0.json");
    assert!(content["time_ms"].take().as_u64().unwrap() > 0);
    let expected = json!({
        "container_id": "c0ffee", "ifname": "eth0", "network": "turnpike",
        "netns": "/proc/self/ns/net", "pod_namespace": "shop", "pod_name": "cart-0", "time_ms": null,
    });
    assert_eq!(content, expected);
}

#[test]
fn an_agent_that_hangs_is_given_up_at_the_deadline() {
    let world = World::new();
    *world.agent.delay.lock().unwrap() = Duration::from_secs(3600);
    let mut config = world.config("1.1.0");
    config["timeoutSeconds"] = 1.into();
    let (success, error) = execute(&variables("ADD"), &config.to_string());
    assert!(!success);
    assert_eq!(error["code"], 11, "{error}");
    assert_eq!(
        execute(&variables("DEL"), &config.to_string()),
        (true, Value::Null)
    );
    assert_eq!(tombstones(world.folder.path()).len(), 1);
}

#[test]
fn a_del_that_can_be_neither_done_nor_noted_fails() {
    let world = World::without_agent();
    fs::write(world.folder.path().join("removed"), "in the way").unwrap();
    let (success, error) = run(&world, "DEL");
    assert!(!success);
    assert_eq!(error["code"], 5, "{error}");
}
