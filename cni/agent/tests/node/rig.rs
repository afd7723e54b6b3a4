//! A box with one node: the real agent, the real CNI executable, and pods that are namespaces.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::Child,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use prost::Message;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::Notify, task::JoinHandle};
use tonic::transport::Endpoint;
use turnpike_ipam::{Record, decode, encode};
use turnpike_rules::pod::PodNetwork;
use turnpike_vpc::{
    netns::{Command, Namespace, Output},
    run::{Error as BoxError, Options, down, run},
    spec::{DEFAULT, Spec},
};
use turnpike_wire::{
    discovery::DeltaDiscoveryResponse,
    node::{FeedEvent, WatchRequest, feed_client::FeedClient, feed_event::Event},
};

const PATIENCE: Duration = Duration::from_secs(120);
const GRACE: Duration = Duration::from_secs(2);
/// Two cores carry one box at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub(crate) struct Rig {
    name: String,
    pub(crate) node: Namespace,
    pub(crate) control: Namespace,
    pub(crate) folder: TempDir,
    environment: BTreeMap<&'static str, String>,
    /// What the agent has from its next start on.
    pub(crate) capabilities: Vec<&'static str>,
    pub(crate) agent: Option<Child>,
    pods: Mutex<Vec<Namespace>>,
    stop: Arc<Notify>,
    the_box: Option<JoinHandle<Result<(), BoxError>>>,
    runtime: Runtime,
    _turn: MutexGuard<'static, ()>,
}

const CHART: &str = include_str!("../../../../charts/turnpike/templates/node.yaml");

/// The capabilities that the chart gives the agent's container, without `CAP_`.
pub(crate) fn capabilities() -> Vec<&'static str> {
    let listed = CHART.lines().map(str::trim);
    listed
        .skip_while(|line| *line != "add:")
        .skip(1)
        .map_while(|line| line.strip_prefix("- ")?.split(' ').next())
        .collect()
}

/// As in `CapBnd`.
fn bits(capabilities: &[&str]) -> u64 {
    let bits = capabilities.iter().map(|name| {
        let capability: caps::Capability = format!("CAP_{name}").parse().unwrap();
        capability.bitmask()
    });
    bits.fold(0, |all, bit| all | bit)
}

/// What the CNI executable said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) ok: bool,
    pub(crate) json: Value,
}

impl Said {
    /// The address of a successful ADD.
    pub(crate) fn address(&self) -> Ipv4Addr {
        assert!(self.ok, "ADD failed: {}", self.json);
        let text = self.json["ips"][0]["address"].as_str().expect("an address");
        text.strip_suffix("/32")
            .expect("a /32")
            .parse()
            .expect("an address")
    }
}

/// The feed, event by event.
pub(crate) struct Feed<'a> {
    runtime: &'a Runtime,
    stream: tonic::Streaming<FeedEvent>,
}

impl Feed<'_> {
    pub(crate) fn next(&mut self) -> Event {
        let stream = &mut self.stream;
        let next = self
            .runtime
            .block_on(async { tokio::time::timeout(PATIENCE, stream.message()).await });
        let event = next
            .expect("an event in time")
            .unwrap()
            .expect("the feed goes on");
        event.event.expect("an event has a kind")
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) netns: Namespace,
}

impl Rig {
    /// A box with these faults, and the agent of node-a with this environment.
    pub(crate) fn up(name: &str, faults: &str, environment: &[(&'static str, &str)]) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test makes network namespaces: be root"
        );
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("tpt-{name}");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(down(name.clone())).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let spec = Spec::parse(&format!("{DEFAULT}\n{faults}")).unwrap();
        let state = folder.path().join("box");
        let options = Options {
            name: name.clone(),
            spec,
            state: state.clone(),
        };
        let stop = Arc::new(Notify::new());
        let stopped = Arc::clone(&stop);
        let the_box = runtime.spawn(async move { run(options, stopped.notified()).await });
        wait_for("the box", || state.join("ready").exists());
        fs::write(folder.path().join("token"), "none").unwrap();
        fs::write(folder.path().join("root.pem"), "").unwrap();
        let mut rig = Self {
            node: Namespace::open(&format!("{name}-node-a")).unwrap(),
            control: Namespace::open(&format!("{name}-control")).unwrap(),
            name,
            folder,
            environment: environment
                .iter()
                .map(|(k, v)| (*k, (*v).to_owned()))
                .collect(),
            capabilities: capabilities(),
            agent: None,
            pods: Mutex::default(),
            stop,
            the_box: Some(the_box),
            runtime,
            _turn: turn,
        };
        rig.start();
        rig
    }

    /// From the agent's next start on.
    pub(crate) fn set(&mut self, key: &'static str, value: &str) {
        self.environment.insert(key, value.to_owned());
    }

    /// Changes what is on record. The agent must not run.
    pub(crate) fn edit_journal(&self, mut edit: impl FnMut(&mut Record)) {
        let path = self.path("state/pool.journal");
        let bytes = fs::read(&path).unwrap();
        let (records, end, _) = decode(&bytes);
        assert_eq!(end, bytes.len(), "it is whole");
        let mut edited = Vec::new();
        for mut record in records {
            edit(&mut record);
            encode(&record, &mut edited);
        }
        fs::write(&path, edited).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the agent and waits until it serves.
    pub(crate) fn start(&mut self) {
        self.launch();
        wait_for("the agent", || {
            self.get(61678, "/healthz/ready")
                .starts_with("HTTP/1.1 200")
        });
    }

    pub(crate) fn launch(&mut self) {
        let sysctls = self.path("sysctls");
        fs::create_dir_all(&sysctls).unwrap();
        // As in its container: no right more, and `/proc/sys` read-only but for the network's part,
        // which is mounted elsewhere.
        let mut command = Command::new(env!("CARGO_BIN_EXE_turnpike-node"))
            .capabilities(bits(&self.capabilities))
            .no_new_privileges()
            .bind("/proc/sys/net", &sysctls)
            .bind_read_only("/proc/sys", "/proc/sys")
            .arg("--sysctl-dir")
            .arg(&sysctls)
            .args(["--node-name", "node-a", "--controller", "10.0.0.10:15012"])
            .arg("--token-file")
            .arg(self.path("token"))
            .arg("--root-file")
            .arg(self.path("root.pem"))
            .arg("--cni-socket")
            .arg(self.path("cni.sock"))
            .arg("--feed-socket")
            .arg(self.path("feed.sock"))
            .arg("--state-dir")
            .arg(self.path("state"))
            .env("AWS_ENDPOINT_URL_EC2", "http://10.0.0.2:8773")
            .env("AWS_REGION", "eu-west-1")
            .env("NO_COLOR", "1")
            .env("RUST_LOG", "info,turnpike_wire=error")
            .stderr(Output::File(self.path("agent.log")))
            .die_with_parent();
        for (key, value) in &self.environment {
            command = command.env(key, value);
        }
        self.agent = Some(command.spawn(&self.node).unwrap());
    }

    /// Whether the agent has ended by itself; then it is reaped.
    pub(crate) fn has_ended(&mut self) -> bool {
        let agent = self.agent.as_mut().expect("it was started");
        let ended = agent.try_wait().unwrap().is_some();
        if ended {
            self.agent = None;
        }
        ended
    }

    /// Sends the signal and reaps the agent.
    pub(crate) fn end(&mut self, signal: Signal) -> std::process::ExitStatus {
        let mut agent = self.agent.take().expect("it runs");
        kill(Pid::from_raw(agent.id() as i32), signal).unwrap();
        agent.wait().unwrap()
    }

    pub(crate) fn pod(&self, id: &str, namespace: &str, name: &str) -> Pod {
        let netns = format!("{}-{id}", self.name);
        Namespace::handle(&netns).unwrap().remove(GRACE).unwrap();
        let netns = Namespace::create(&netns).unwrap();
        self.pods.lock().unwrap().push(netns.clone());
        Pod {
            id: id.into(),
            namespace: namespace.into(),
            name: name.into(),
            netns,
        }
    }

    pub(crate) fn add(&self, pod: &Pod) -> Said {
        self.cni("ADD", pod, &json!({}))
    }

    pub(crate) fn del(&self, pod: &Pod) -> Said {
        self.cni("DEL", pod, &json!({}))
    }

    /// Calls the CNI executable as a runtime does.
    pub(crate) fn cni(&self, command: &str, pod: &Pod, more: &Value) -> Said {
        let plugin = Path::new(env!("CARGO_BIN_EXE_turnpike-node")).with_file_name("turnpike-cni");
        assert!(
            plugin.exists(),
            "build it first: cargo build -p turnpike-plugin"
        );
        let mut config = json!({
            "cniVersion": "1.1.0", "name": "turnpike", "type": "turnpike-cni",
            "agentSocket": self.path("cni.sock"),
        });
        config
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_UID=uid-{}",
            pod.namespace, pod.name, pod.name
        );
        let mut child = Command::new(plugin)
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &pod.id)
            .env("CNI_NETNS", pod.netns.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", args)
            .stdin_piped()
            .stdout(Output::Piped)
            .spawn(&self.node)
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(config.to_string().as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        Said {
            ok: output.status.success(),
            json,
        }
    }

    /// GET inside the node, the whole answer.
    pub(crate) fn get(&self, port: u16, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let answer = self.node.run(move || {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok::<_, std::io::Error>(answer)
        });
        answer.unwrap().unwrap_or_default()
    }

    fn json(&self, path: &str) -> Value {
        let answer = self.get(61679, path);
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }

    pub(crate) fn enis(&self) -> Value {
        self.json("/v1/enis")
    }

    /// Address by container, as the agent leases them.
    pub(crate) fn leases(&self) -> BTreeMap<String, Ipv4Addr> {
        let pods = self.json("/v1/pods");
        let text = |pod: &Value, key: &str| pod[key].as_str().unwrap().to_owned();
        pods.as_array()
            .unwrap()
            .iter()
            .map(|pod| {
                (
                    text(pod, "containerId"),
                    text(pod, "address").parse().unwrap(),
                )
            })
            .collect()
    }

    /// Everything in the node's kernel that pods leave traces in.
    pub(crate) fn kernel(&self) -> String {
        let show = |program: &str, args: &[&str]| {
            let output = Command::new(program)
                .args(args)
                .stdout(Output::Piped)
                .output(&self.node)
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let links = show("ip", &["-o", "link", "show", "type", "veth"]);
        let names: Vec<_> = links
            .lines()
            .filter_map(|line| line.split(": ").nth(1))
            .collect();
        // Whose refused packets were logged lately, the kernel forgets by itself.
        let lately =
            |line: &&str| line.trim().starts_with("elements") && line.contains("limit rate");
        let rules = show("nft", &["-s", "list", "ruleset"]);
        let rules: Vec<_> = rules.lines().filter(|line| !lately(line)).collect();
        [
            names.join("\n"),
            show("ip", &["route", "show", "table", "all"]),
            show("ip", &["rule"]),
            show("ip", &["neigh", "show", "nud", "permanent"]),
            rules.join("\n"),
        ]
        .join("\n---\n")
    }

    pub(crate) fn pods_json(&self) -> Value {
        self.json("/v1/pods")
    }

    /// Puts in place what the agent last heard of its pods. It must not run.
    pub(crate) fn policy(&self, pods: &[PodNetwork]) {
        let named = |pod: &PodNetwork| {
            let name = turnpike_wire::names::pod("cluster", &pod.namespace, &pod.name);
            turnpike_wire::resource::pack(name, "1", pod)
        };
        let resources = pods.iter().map(named).collect();
        let kept = DeltaDiscoveryResponse {
            resources,
            ..DeltaDiscoveryResponse::default()
        };
        fs::write(self.path("state/policy.snapshot"), kept.encode_to_vec()).unwrap();
    }

    /// Reads the feed as the gate does.
    pub(crate) fn feed(&self) -> Feed<'_> {
        let path = self.path("feed.sock");
        let stream = self.runtime.block_on(async {
            let connect = tower::service_fn(move |_| {
                let path = path.clone();
                async move {
                    tokio::net::UnixStream::connect(path)
                        .await
                        .map(TokioIo::new)
                }
            });
            let endpoint = Endpoint::from_static("http://node");
            let channel = endpoint.connect_with_connector(connect).await.unwrap();
            FeedClient::new(channel)
                .watch(WatchRequest {})
                .await
                .unwrap()
                .into_inner()
        });
        Feed {
            runtime: &self.runtime,
            stream,
        }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("──── agent\n{}", self.log());
        }
        if self.agent.is_some() {
            self.end(Signal::SIGKILL);
        }
        for pod in self
            .pods
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            pod.remove(GRACE).ok();
        }
        self.stop.notify_one();
        if let Some(the_box) = self.the_box.take() {
            self.runtime.block_on(the_box).ok();
        }
    }
}

/// Lines that one of the two has and the other has not.
pub(crate) fn residue(before: &str, after: &str) -> String {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (before, after) = (lines(before), lines(after));
    let gone = before
        .iter()
        .filter(|line| !after.contains(line))
        .map(|line| format!("- {line}"));
    let new = after
        .iter()
        .filter(|line| !before.contains(line))
        .map(|line| format!("+ {line}"));
    gone.chain(new).collect::<Vec<_>>().join("\n")
}

pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(50));
    }
}
