//! The real executable, with a folder of YAML and an issuer of tokens.
#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU8, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use serde_json::{Value, json};
use turnpike_wire::channel::Controller;

pub(crate) const ISSUER: &str = "https://issuer.example";
/// Far beyond what anything here takes; reached only where something is lost.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A signer of service-account tokens.
pub(crate) struct Issuer {
    key: KeyPair,
    kid: &'static str,
}

impl Issuer {
    pub(crate) fn new(kid: &'static str) -> Self {
        Self {
            key: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap(),
            kid,
        }
    }

    pub(crate) fn jwk(&self) -> Value {
        // An uncompressed point: 4, x, y.
        let point = self.key.der_bytes();
        json!({
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.kid,
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..]),
        })
    }

    pub(crate) fn sign(&self, claims: &Value) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.kid.into());
        encode(
            &header,
            claims,
            &EncodingKey::from_ec_der(&self.key.serialize_der()),
        )
        .unwrap()
    }
}

/// Good claims, as Kubernetes writes them.
pub(crate) fn claims(namespace: &str, account: &str, pod: &str, node: &str) -> Value {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    json!({
        "iss": ISSUER,
        "aud": ["istio-ca"],
        "sub": format!("system:serviceaccount:{namespace}:{account}"),
        "iat": now, "nbf": now, "exp": now + 3600,
        "kubernetes.io": {
            "namespace": namespace,
            "serviceaccount": {"name": account, "uid": "a"},
            "pod": {"name": pod, "uid": format!("uid-{pod}")},
            "node": {"name": node, "uid": "n"},
        },
    })
}

pub(crate) struct Rig {
    folder: tempfile::TempDir,
    pub(crate) issuer: Issuer,
    listen: String,
    process: Option<Running>,
}

struct Running {
    child: Child,
    grpc: SocketAddr,
    http: SocketAddr,
}

impl Rig {
    /// A controller that is ready, with one file of YAML.
    pub(crate) fn start(yaml: &str) -> Self {
        let mut rig = Self::prepare(yaml);
        rig.launch();
        rig
    }

    pub(crate) fn prepare(yaml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = format!("{}:0", own_loopback());
        let rig = Self {
            folder,
            issuer: Issuer::new("k1"),
            listen,
            process: None,
        };
        fs::create_dir(rig.path("source")).unwrap();
        rig.write("world.yaml", yaml);
        rig.set_keys(&[&rig.issuer]);
        rig
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file of the source, all at once.
    pub(crate) fn write(&self, name: &str, yaml: &str) {
        replace(&self.path("source").join(name), yaml);
    }

    pub(crate) fn set_keys(&self, issuers: &[&Issuer]) {
        let keys: Vec<Value> = issuers.iter().map(|issuer| issuer.jwk()).collect();
        replace(
            &self.path("jwks.json"),
            &json!({ "keys": keys }).to_string(),
        );
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_turnpike-controller"));
        command
            .args([
                "--token-issuer",
                ISSUER,
                "--http",
                "127.0.0.1:0",
                "--listen",
                &self.listen,
            ])
            .arg("--source-dir")
            .arg(self.path("source"))
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--root-cert-out")
            .arg(self.path("root.pem"))
            .arg("--token-jwks")
            .arg(self.path("jwks.json"))
            .env("TURNPIKE_LOG", "json")
            .env("RUST_LOG", "info,turnpike_server=debug")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn launch(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"));
        let offset = fs::read_to_string(self.path("log"))
            .unwrap_or_default()
            .len();
        let child = self.command().stderr(log.unwrap()).spawn().unwrap();
        let mut running = Running {
            child,
            grpc: ([0, 0, 0, 0], 0).into(),
            http: ([0, 0, 0, 0], 0).into(),
        };
        let up = eventually("the controller is up", || {
            let log = self.log().split_off(offset);
            log.lines()
                .find(|line| line.contains("the controller is up"))
                .map(str::to_owned)
        });
        let fields: Value = serde_json::from_str(&up).unwrap();
        let address = |name: &str| fields["fields"][name].as_str().unwrap().parse().unwrap();
        running.grpc = address("grpc");
        running.http = address("http");
        self.process = Some(running);
        eventually("readiness", || {
            (self.get("/healthz/ready").0 == 200).then_some(())
        });
    }

    /// Where clients of the one before look for it.
    pub(crate) fn relaunch_at(&mut self, address: &str) {
        self.listen = address.into();
        self.launch();
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Status and body of a page.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let http = self.process.as_ref().unwrap().http;
        let mut stream = TcpStream::connect(http).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (
            head.split(' ').nth(1).unwrap().parse().unwrap(),
            body.to_owned(),
        )
    }

    pub(crate) fn json(&self, path: &str) -> Value {
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let text = self.get("/metrics").1;
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// A client's way to the controller, with a token of these claims.
    pub(crate) fn controller(&self, name: &str, token: &str) -> Controller {
        let token_file = self.path(&format!("token-{name}"));
        fs::write(&token_file, token).unwrap();
        Controller {
            address: self.process.as_ref().unwrap().grpc.to_string(),
            server_name: turnpike_server::ca::DNS_NAME.into(),
            root_file: self.path("root.pem"),
            token_file,
        }
    }

    pub(crate) fn kill(&mut self) {
        let mut running = self.process.take().unwrap();
        running.child.kill().unwrap();
        running.child.wait().unwrap();
    }

    /// Exit status after SIGTERM.
    pub(crate) fn terminate(&mut self) -> Option<i32> {
        let mut running = self.process.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(running.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        running.child.wait().unwrap().code()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(mut running) = self.process.take() {
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
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
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// An address that no other rig has, and no client calls from. A controller that comes back to its
/// port, which was free meanwhile, would on 127.0.0.1 find it taken now and then: by a connection of
/// whatever else runs on this machine.
fn own_loopback() -> Ipv4Addr {
    static RIGS: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    // Neither 127.0.x.x nor 127.255.x.x.
    let rig = RIGS.fetch_add(1, Ordering::Relaxed) % 254 + 1;
    Ipv4Addr::new(127, rig, high, low)
}

fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

/// A meshed pod `shop/NAME` with label `app: APP`, ready.
pub(crate) fn pod(name: &str, app: &str, node: &str, address: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, uid: uid-{name}, labels: {{app: {app}}}}}
spec:
  nodeName: {node}
  serviceAccountName: web
  initContainers: [{{name: turnpike-proxy, restartPolicy: Always}}]
  containers: [{{name: app, ports: [{{containerPort: 8080}}]}}]
status:
  podIP: {address}
  conditions: [{{type: Ready, status: 'True'}}]
"
    )
}

pub(crate) fn service(name: &str) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec:
  clusterIP: 10.96.0.1
  selector: {{app: {name}}}
  ports: [{{name: http, port: 80, targetPort: 8080}}]
"
    )
}
