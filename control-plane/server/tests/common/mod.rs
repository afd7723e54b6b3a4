//! What the test programs share: the real executable, run in a folder of its own, and how to wait.
#![allow(dead_code, reason = "each test program uses its part")]

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU8, Ordering},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use turnpike_wire::channel::Controller;

/// Far beyond what anything here takes; reached only where something is lost.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// The executable and the folder that it keeps from one start to the next.
pub(crate) struct Process {
    folder: tempfile::TempDir,
    child: Option<Child>,
    addresses: Option<Addresses>,
    /// Where the log of the one that runs begins.
    begin: usize,
}

#[derive(Clone, Copy)]
struct Addresses {
    grpc: SocketAddr,
    http: SocketAddr,
}

impl Process {
    /// A folder, and nothing that runs.
    pub(crate) fn prepare() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            child: None,
            addresses: None,
            begin: 0,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The executable with its folders; it never outlives the test, however that ends.
    pub(crate) fn executable(&self) -> Command {
        let mut command = Command::new("setpriv");
        command
            .arg("--pdeathsig=KILL")
            .arg(env!("CARGO_BIN_EXE_turnpike-controller"))
            .arg("--http=127.0.0.1:0")
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--root-cert-out")
            .arg(self.path("root.pem"))
            .env("TURNPIKE_LOG", "json")
            .env("RUST_LOG", "info,turnpike_server=debug")
            .stdin(Stdio::null());
        command
    }

    /// Starts it; its log goes on where the one before ended.
    pub(crate) fn run(&mut self, mut command: Command) {
        self.begin = self.log().len();
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"));
        self.child = Some(command.stderr(log.unwrap()).spawn().unwrap());
    }

    /// Waits for its ports.
    pub(crate) fn up(&mut self) {
        let up = eventually("the controller is up", || {
            let log = self.log().split_off(self.begin);
            let mut lines = log
                .lines()
                .filter(|line| line.contains("the controller is up"));
            // Half a line is one that is being written.
            lines.find_map(|line| serde_json::from_str::<Value>(line).ok())
        });
        let address = |name: &str| up["fields"][name].as_str().unwrap().parse().unwrap();
        self.addresses = Some(Addresses {
            grpc: address("grpc"),
            http: address("http"),
        });
    }

    pub(crate) fn ready(&mut self) {
        self.up();
        eventually("readiness", || {
            (self.get("/healthz/ready").0 == 200).then_some(())
        });
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Status and body of a page.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.addresses.unwrap().http).unwrap();
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
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    /// A client's way to it, with a token.
    pub(crate) fn client(&self, name: &str, token: &str) -> Controller {
        let token_file = self.path(&format!("token-{name}"));
        fs::write(&token_file, token.trim()).unwrap();
        Controller {
            address: self.addresses.unwrap().grpc.to_string(),
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
        kill(Pid::from_raw(id.try_into().unwrap()), Signal::SIGTERM).unwrap();
    }

    /// The exit status, once it has ended by itself.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        self.child.take().unwrap().wait().unwrap().code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("---- the controller's log\n{}", self.log());
        }
    }
}

/// Waits for something to come true.
pub(crate) fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// An address that no other listener has, and no client calls from. What comes back to its port,
/// which was free meanwhile, would on 127.0.0.1 find it taken now and then: by a connection of
/// whatever else runs on this machine.
pub(crate) fn own_loopback() -> Ipv4Addr {
    static TAKEN: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    // Neither 127.0.x.x nor 127.255.x.x.
    let second = TAKEN.fetch_add(1, Ordering::Relaxed) % 254 + 1;
    Ipv4Addr::new(127, second, high, low)
}
