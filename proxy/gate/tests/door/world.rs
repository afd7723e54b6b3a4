//! A node with the real rules and the real gate, two pods, and an outside.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::ServerName;
use tokio::runtime::Runtime;
use turnpike_datapath::{Datapath, Eni, Mac, NodePlan, PodKey, PodPlan, PodPolicy, PrimaryEni};
use turnpike_gate::spool::{Reader, now_ms};
use turnpike_ledger::{Entry, Event, Record, Report, Trust, verify};
use turnpike_rules::{
    egress::{EgressPolicy, EgressPort, EgressProtocol, EgressRule, Mode},
    host::HostPattern,
    pod::PodEgress,
};

use crate::{
    control::{Control, identity, local_pod},
    namespace::Namespace,
    outside::Web,
};

const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct World {
    pub(crate) node: Namespace,
    pub(crate) outside: Namespace,
    pub(crate) pods: Vec<Namespace>,
    pub(crate) control: Control,
    datapath: Option<Datapath>,
    runtime: Runtime,
    dir: tempfile::TempDir,
    gate: Option<Child>,
}

/// Pod `n`'s addresses; even ones are on the secondary ENI.
pub(crate) fn pod4(n: u8) -> IpAddr {
    [10, 0, 1, n].into()
}

pub(crate) fn pod6(n: u8) -> IpAddr {
    [0xfd00, 1, 0, 0, 0, 0, 0, u16::from(n)].into()
}

impl World {
    /// Pods 5 and 6, selected; what is allowed is set later.
    pub(crate) fn new(name: &str) -> Self {
        let node = Namespace::new(&format!("tpt-{name}-node"));
        let outside = Namespace::new(&format!("tpt-{name}-out"));
        for (end, peer, mac) in [
            ("eth0", "e0", "02:00:00:00:00:10"),
            ("eth1", "e1", "02:00:00:00:00:11"),
        ] {
            let out = format!("tpt-{name}-out");
            node.sh(&format!(
                "ip link add {end} address {mac} type veth peer name {peer} netns {out}; \
                 ip link set {end} up"
            ));
        }
        node.sh(
            "ip addr add 10.0.1.10/24 dev eth0; ip route add default via 10.0.1.1; \
             ip -6 addr add fd00:1::10/64 dev eth0 nodad; ip -6 route add default via fd00:1::1",
        );
        outside.sh(
            "ip link set e0 up; ip link set e1 up; \
             for f in ipv4/ip_forward ipv6/conf/all/forwarding; do echo 1 > /proc/sys/net/$f; done; \
             for d in e0 e1; do ip addr add 10.0.1.1/32 dev $d; ip -6 addr add fe80::1/64 dev $d nodad; done; \
             ip -6 addr add fd00:1::1/128 dev e0 nodad; \
             for n in 10 53 66 99; do ip addr add 203.0.113.$n/32 dev lo; done; \
             ip -6 addr add 2001:db8:113::66/128 dev lo; \
             ip route add 10.0.1.10 dev e0; ip route add 10.0.1.5 dev e0; ip route add 10.0.1.6 dev e1; \
             ip -6 route add fd00:1::10 dev e0; ip -6 route add fd00:1::5 dev e0; \
             ip -6 route add fd00:1::6 dev e1; \
             ip neigh replace 10.0.1.5 lladdr 02:00:00:00:00:10 dev e0; \
             ip neigh replace 10.0.1.6 lladdr 02:00:00:00:00:11 dev e1; \
             ip -6 neigh replace fd00:1::5 lladdr 02:00:00:00:00:10 dev e0; \
             ip -6 neigh replace fd00:1::6 lladdr 02:00:00:00:00:11 dev e1",
        );
        let inside = node.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .on_thread_start(move || inside.enter())
            .build()
            .unwrap();
        let mut world = Self {
            node,
            outside,
            pods: vec![],
            control: Control::new(),
            datapath: None,
            runtime,
            dir: tempfile::tempdir().unwrap(),
            gate: None,
        };
        world.lay(name);
        world.serve_control();
        world.start_gate();
        world
    }

    /// Runs a future on the node.
    fn wait<F: Future<Output: Send> + Send>(&self, future: F) -> F::Output {
        self.node.run(|| self.runtime.block_on(future))
    }

    fn lay(&mut self, name: &str) {
        let plan = NodePlan {
            primary: PrimaryEni {
                mac: Mac([2, 0, 0, 0, 0, 0x10]),
                address: [10, 0, 1, 10].into(),
                address6: Some("fd00:1::10".parse().unwrap()),
            },
            secondary: vec![Eni {
                mac: Mac([2, 0, 0, 0, 0, 0x11]),
                table: 2,
                address: [10, 0, 1, 11].into(),
                gateway: [10, 0, 1, 1].into(),
                gateway6: Some("fe80::1".parse().unwrap()),
                mtu: 1500,
            }],
            snat: None,
            sysctls: "/proc/sys/net".into(),
        };
        let datapath = self.wait(async { Datapath::open(&plan).await }).unwrap();
        for n in [5, 6] {
            let netns = Namespace::new(&format!("tpt-{name}-pod{n}"));
            let plan = PodPlan {
                pod: PodKey {
                    namespace: "shop".into(),
                    name: format!("pay-{n}"),
                },
                container_id: format!("container-pay-{n}"),
                netns: netns.path(),
                ifname: "eth0".into(),
                addresses: vec![pod4(n), pod6(n)],
                mtu: 1500,
                table: (n % 2 == 0).then_some(2),
                node: vec!["10.0.1.10".parse().unwrap()],
                capture: None,
                policy: PodPolicy {
                    selected: true,
                    inbound: vec![],
                },
            };
            self.wait(datapath.apply(&plan)).unwrap();
            self.pods.push(netns);
        }
        self.datapath = Some(datapath);
        self.announce();
    }

    /// The feed names both pods.
    pub(crate) fn announce(&self) {
        let pod = |n: u8| local_pod(&format!("pay-{n}"), &[pod4(n), pod6(n)]);
        self.control.set_pods(vec![pod(5), pod(6)]);
    }

    fn serve_control(&self) {
        let listener = self
            .node
            .run(|| TcpListener::bind("127.0.0.1:15012").unwrap());
        std::fs::write(
            self.dir.path().join("root.pem"),
            self.control.authority.certificate_pem(),
        )
        .unwrap();
        std::fs::write(self.dir.path().join("token"), "token").unwrap();
        let feed = self.dir.path().join("feed.sock");
        self.wait(self.control.serve(listener, &feed));
        // The gate is another user.
        let open = |path: PathBuf, mode| {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        open(self.dir.path().to_owned(), 0o755);
        open(feed, 0o666);
    }

    pub(crate) fn spool(&self) -> PathBuf {
        self.dir.path().join("spool")
    }

    pub(crate) fn start_gate(&mut self) {
        self.start_gate_with(&[]);
    }

    pub(crate) fn start_gate_with(&mut self, arguments: &[&str]) {
        self.begin_gate(arguments);
        eventually("the gate is ready", || {
            self.health("/healthz/ready")
                .is_some_and(|answer| answer.contains(" 200 "))
        });
    }

    /// Its sockets are bound; what it knows is another question.
    pub(crate) fn begin_gate(&mut self, arguments: &[&str]) {
        let path = |name: &str| self.dir.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_turnpike-gate"));
        command
            .args(["--node-name", "node-a", "--controller", "127.0.0.1:15012"])
            .args([
                "--upstream-dns",
                "203.0.113.53",
                "--cluster-dns",
                "203.0.113.53:5353",
            ])
            .args(["--drain-seconds", "1"])
            .arg("--token-file")
            .arg(path("token"))
            .arg("--root-file")
            .arg(path("root.pem"))
            .arg("--feed-socket")
            .arg(path("feed.sock"))
            .arg("--spool-dir")
            .arg(self.spool())
            .args(arguments)
            .stdin(Stdio::null());
        self.gate = Some(self.node.run(|| command.spawn().unwrap()));
        eventually("the gate serves", || {
            self.health("/healthz/live")
                .is_some_and(|answer| answer.contains(" 200 "))
        });
    }

    pub(crate) fn health(&self, path: &str) -> Option<String> {
        self.node.run(|| {
            let mut stream = TcpStream::connect("127.0.0.1:15022").ok()?;
            let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok()?;
            Some(answer)
        })
    }

    pub(crate) fn kill_gate(&mut self) {
        let mut gate = self.gate.take().unwrap();
        gate.kill().unwrap();
        gate.wait().unwrap();
    }

    /// SIGTERM; whether it ended with status 0.
    pub(crate) fn stop_gate(&mut self) -> bool {
        let mut gate = self.gate.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(gate.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        gate.wait().unwrap().success()
    }

    /// Uid and effective capabilities of the running gate, as the kernel says.
    pub(crate) fn gate_status(&self) -> String {
        let pid = self.gate.as_ref().unwrap().id();
        std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap()
    }

    pub(crate) fn entries(&self) -> Vec<Entry> {
        let dir = self.spool();
        self.wait(async move {
            Reader::open(&dir)
                .await
                .unwrap()
                .after(0, 1_000_000)
                .await
                .unwrap()
        })
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        let decode = |entry: &Entry| Record::decode(&entry.body).unwrap().event;
        self.entries().iter().map(decode).collect()
    }

    /// Waits for an event that `wanted` takes, and returns what it makes of it.
    pub(crate) fn event<T>(&self, what: &str, wanted: impl Fn(&Event) -> Option<T>) -> T {
        let mut found = None;
        eventually(&format!("on record: {what}"), || {
            found = self.events().iter().find_map(&wanted);
            found.is_some()
        });
        found.unwrap()
    }

    pub(crate) fn report(&self) -> Report {
        let trust = Trust {
            roots: self.control.roots.clone(),
            signer: identity("turnpike-gate"),
        };
        verify("node-a", &self.entries(), &trust, None, now_ms())
    }

    /// What the node's rules counted that must be nothing.
    pub(crate) fn unrecorded(&self) -> u64 {
        let datapath = self.datapath.as_ref().unwrap();
        self.wait(datapath.counts())
            .unwrap()
            .forward_original_offcluster
            .packets
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut gate) = self.gate.take() {
            let _ = gate.kill();
            let _ = gate.wait();
        }
    }
}

pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..400 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("never: {what}");
}

/// `api.payments.example` over TLS, `partner.example` over HTTP on 80, an SMTP-like server by
/// address; for pods 5 and 6.
pub(crate) fn policies() -> Vec<PodEgress> {
    let rule = |id: &str, hosts: &[&str], cidrs: &[&str], port, protocol| EgressRule {
        id: id.into(),
        hosts: hosts
            .iter()
            .map(|host| HostPattern::parse(host).unwrap())
            .collect(),
        cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        ports: vec![EgressPort {
            port,
            end_port: port,
            protocol,
        }],
        http: None,
        originate_tls: false,
    };
    let policy = EgressPolicy {
        name: "shop/pay".into(),
        version: "7".into(),
        mode: Mode::Enforce,
        rules: vec![
            rule(
                "allow[0]",
                &["api.payments.example", "inside.example"],
                &[],
                443,
                EgressProtocol::Tls,
            ),
            rule(
                "allow[1]",
                &["partner.example"],
                &[],
                80,
                EgressProtocol::Http,
            ),
            rule(
                "allow[2]",
                &[],
                &["203.0.113.10/32"],
                25,
                EgressProtocol::Tcp,
            ),
        ],
    };
    let egress = |n: u8| PodEgress {
        uid: format!("uid-pay-{n}").into(),
        namespace: "shop".into(),
        name: format!("pay-{n}").into(),
        identity: "spiffe://cluster.local/ns/shop/sa/pay".parse().unwrap(),
        policies: vec![policy.clone()],
    };
    vec![egress(5), egress(6)]
}

pub(crate) type Tls = StreamOwned<ClientConnection, TcpStream>;

/// A TLS connection from a pod, handshake done, verified for `certificate`; `sni` may lie.
pub(crate) fn tls(
    pod: &Namespace,
    to: SocketAddr,
    sni: &str,
    send_sni: bool,
    web: &Web,
) -> std::io::Result<Tls> {
    let mut roots = RootCertStore::empty();
    roots.add(web.root.clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(turnpike_certs::crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.enable_sni = send_sni;
    let name = ServerName::try_from(sni.to_owned()).unwrap();
    let mut session = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut tcp = connect(pod, to)?;
    while session.is_handshaking() {
        session.complete_io(&mut tcp)?;
    }
    Ok(StreamOwned::new(session, tcp))
}

pub(crate) fn connect(pod: &Namespace, to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = pod.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends bytes and reads to the end, whichever way it comes.
pub(crate) fn exchange(pod: &Namespace, to: SocketAddr, bytes: &[u8]) -> String {
    let Ok(mut stream) = connect(pod, to) else {
        return String::new();
    };
    let mut answer = Vec::new();
    let _ = stream.write_all(bytes);
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}
