//! A box for one test, run by the executable, and clients inside its namespaces.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub(crate) mod dns;
pub(crate) mod ec2;

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use turnpike_vpc::{
    claim,
    internet::Record,
    netns::Namespace,
    run::{Ready, ReadyInstance},
    spec::DEFAULT,
};

/// Far beyond what anything here takes; reached only where something is lost.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// How long nothing must happen where nothing should.
pub(crate) const SILENCE: Duration = Duration::from_millis(700);

pub(crate) struct Vpc {
    pub(crate) name: String,
    pub(crate) ready: Ready,
    pub(crate) state: TempDir,
    child: Child,
}

impl Vpc {
    /// The built-in box.
    pub(crate) fn start(name: &str) -> Self {
        Self::with_spec(name, DEFAULT)
    }

    /// The built-in box with some of its text replaced; what is not there is a mistake.
    pub(crate) fn replacing(name: &str, changes: &[(&str, &str)]) -> Self {
        let mut text = DEFAULT.to_owned();
        for (from, to) in changes {
            assert!(text.contains(from), "the built-in spec has no {from:?}");
            text = text.replace(from, to);
        }
        Self::with_spec(name, &text)
    }

    pub(crate) fn with_spec(name: &str, spec: &str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test makes namespaces: run it as root"
        );
        let name = format!("tpt-{name}");
        claim::release(&name).unwrap();
        let state = tempfile::tempdir().unwrap();
        let file = state.path().join("spec.yaml");
        fs::write(&file, spec).unwrap();
        let child = spawn(&name, &file, state.path());
        let mut vpc = Self {
            name,
            ready: placeholder(),
            state,
            child,
        };
        vpc.ready = vpc.wait_until_ready();
        vpc
    }

    fn wait_until_ready(&mut self) -> Ready {
        let path = self.state.path().join("ready");
        let begun = Instant::now();
        loop {
            if let Ok(text) = fs::read(&path) {
                return serde_json::from_slice(&text).unwrap();
            }
            let ended = self.child.try_wait().unwrap();
            let log = || fs::read_to_string(self.state.path().join("stderr")).unwrap();
            assert!(ended.is_none(), "the box ended: {ended:?}\n{}", log());
            assert!(
                begun.elapsed() < PATIENCE,
                "the box is not ready\n{}",
                log()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn instance(&self, name: &str) -> &ReadyInstance {
        &self.ready.instances[name]
    }

    pub(crate) fn namespace(&self, instance: &str) -> Namespace {
        Namespace::open(&self.instance(instance).namespace).unwrap()
    }

    pub(crate) fn router(&self) -> Namespace {
        Namespace::open(&self.ready.router).unwrap()
    }

    pub(crate) fn namespaces(&self) -> Vec<Namespace> {
        let instances = self
            .ready
            .instances
            .values()
            .map(|instance| instance.namespace.as_str());
        let all = [self.ready.router.as_str(), self.ready.internet.as_str()];
        all.into_iter()
            .chain(instances)
            .map(|name| Namespace::handle(name).unwrap())
            .collect()
    }

    /// A pod's namespace behind a node, wired as a CNI does, with these addresses (v4 and v6).
    pub(crate) fn pod(&self, node: &str, name: &str, addresses: &[IpAddr]) -> Namespace {
        let pod = Namespace::handle(&format!("{}-{name}", self.name)).unwrap();
        claim::add(&self.name, &pod).unwrap();
        Namespace::create(pod.name()).unwrap();
        let node = self.namespace(node);
        let (node_name, pod_name) = (node.name(), pod.name());
        let link = format!("pod{}", name.len());
        ip(&format!(
            "-n {node_name} link add {link} type veth peer name eth0 netns {pod_name}"
        ));
        ip(&format!("-n {node_name} link set {link} up"));
        ip(&format!("-n {pod_name} link set eth0 up"));
        let host_mac = node.run(|| link_mac(&link)).unwrap();
        let pod_mac = pod.run(|| link_mac("eth0")).unwrap();
        for address in addresses {
            let (length, gateway) = match address {
                IpAddr::V4(_) => (32, "169.254.1.1"),
                IpAddr::V6(_) => (128, "fe80::1"),
            };
            ip(&format!(
                "-n {pod_name} addr add {address}/{length} dev eth0 nodad"
            ));
            ip(&format!(
                "-n {pod_name} neigh add {gateway} lladdr {host_mac} dev eth0 nud permanent"
            ));
            ip(&format!(
                "-n {pod_name} route add default via {gateway} dev eth0 onlink"
            ));
            ip(&format!(
                "-n {node_name} route add {address}/{length} dev {link}"
            ));
            ip(&format!(
                "-n {node_name} neigh add {address} lladdr {pod_mac} dev {link} nud permanent"
            ));
        }
        pod
    }

    pub(crate) fn internet_log(&self) -> Vec<Record> {
        let file = File::open(&self.ready.internet_log).unwrap();
        let lines = BufReader::new(file).lines().map(Result::unwrap);
        lines
            .map(|line| serde_json::from_str(&line).unwrap())
            .collect()
    }

    /// Waits for a line of the internet's log.
    pub(crate) fn logged(&self, what: &str, wanted: impl Fn(&Record) -> bool) -> Record {
        eventually(what, || self.internet_log().into_iter().find(&wanted))
    }

    /// Whether a datagram from here gets out: one that surely does is sent after it and waited for.
    pub(crate) fn escapes(&self, from: &Namespace, source: IpAddr, to: IpAddr) -> bool {
        let mark = fastrand::u64(..).to_be_bytes();
        datagram(from, Some(source), SocketAddr::new(to, 7001), &mark);
        datagram(
            &self.namespace("control"),
            None,
            SocketAddr::new(to, 7002),
            &mark,
        );
        let hex: String = mark.iter().map(|byte| format!("{byte:02x}")).collect();
        self.logged("the datagram that is allowed", |r| {
            r.port == 7002 && r.first == hex
        });
        self.internet_log()
            .iter()
            .any(|r| r.port == 7001 && r.first == hex)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Vpc {
    fn drop(&mut self) {
        // Ours until it is waited for.
        if self.child.try_wait().unwrap().is_none() {
            self.signal(Signal::SIGTERM);
            self.child.wait().unwrap();
        }
        claim::release(&self.name).unwrap();
    }
}

pub(crate) fn spawn(name: &str, spec: &Path, state: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_turnpike-vpc"));
    command
        .arg("run")
        .args(["--name", name])
        .arg("--spec")
        .arg(spec)
        .arg("--state")
        .arg(state);
    command.stderr(File::create(state.join("stderr")).unwrap());
    command.spawn().unwrap()
}

fn placeholder() -> Ready {
    let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
    Ready {
        name: String::new(),
        pid: 0,
        region: String::new(),
        cidr: String::new(),
        router: String::new(),
        internet: String::new(),
        instances: Default::default(),
        hosts: Default::default(),
        nat_address: [0, 0, 0, 0].into(),
        resolver: nowhere,
        metadata: String::new(),
        ec2: String::new(),
        root: Default::default(),
        internet_log: Default::default(),
        zone_file: Default::default(),
    }
}

pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

pub(crate) fn link_mac(link: &str) -> String {
    let output = Command::new("ip")
        .args(["-o", "link", "show", link])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_once("link/ether ")
        .unwrap()
        .1
        .split(' ')
        .next()
        .unwrap()
        .to_owned()
}

/// Asks until there is an answer.
pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A server in a namespace that sends back what it gets, on the address given.
pub(crate) fn echo_server(namespace: &Namespace, address: SocketAddr) {
    let listener = namespace
        .run(|| std::net::TcpListener::bind(address))
        .unwrap()
        .unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || io::copy(&mut stream.try_clone().unwrap(), &mut stream));
        }
    });
}

/// A connection made inside a namespace, from an address if one is given.
pub(crate) fn connect(
    from: &Namespace,
    source: Option<IpAddr>,
    to: SocketAddr,
) -> io::Result<TcpStream> {
    let connected = from.run(|| {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(to),
            socket2::Type::STREAM,
            None,
        )?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.connect_timeout(&to.into(), Duration::from_secs(2))?;
        Ok::<_, io::Error>(TcpStream::from(socket))
    });
    let stream = connected.unwrap()?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok(stream)
}

/// Whether a word comes back.
pub(crate) fn echoes(stream: &mut TcpStream) -> bool {
    let mut back = [0; 5];
    stream.write_all(b"hello").is_ok() && stream.read_exact(&mut back).is_ok() && &back == b"hello"
}

pub(crate) fn datagram(from: &Namespace, source: Option<IpAddr>, to: SocketAddr, payload: &[u8]) {
    let any = if to.is_ipv4() {
        IpAddr::from([0, 0, 0, 0])
    } else {
        IpAddr::from([0; 16])
    };
    let own = SocketAddr::new(source.unwrap_or(any), 0);
    let socket: UdpSocket = from.run(|| UdpSocket::bind(own)).unwrap().unwrap();
    socket.send_to(payload, to).unwrap();
}

/// One HTTP exchange as text: status and body.
pub(crate) fn http(from: &Namespace, to: SocketAddr, request: &str) -> io::Result<(u16, String)> {
    let mut stream = connect(from, None, to)?;
    stream.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Ok((status, body.to_owned()))
}
