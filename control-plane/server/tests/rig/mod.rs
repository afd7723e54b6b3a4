//! The real executable, with a folder of YAML and an issuer of tokens.
#![allow(dead_code, reason = "each test program uses its part")]

use std::{
    fs,
    ops::{Deref, DerefMut},
    path::Path,
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use serde_json::{Value, json};

use crate::common::{Process, own_loopback};

pub(crate) const ISSUER: &str = "https://issuer.example";

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
    pub(crate) issuer: Issuer,
    listen: String,
    process: Process,
}

impl Deref for Rig {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Rig {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

impl Rig {
    /// A controller that is ready, with one file of YAML.
    pub(crate) fn start(yaml: &str) -> Self {
        let mut rig = Self::prepare(yaml);
        rig.launch();
        rig
    }

    pub(crate) fn prepare(yaml: &str) -> Self {
        let rig = Self {
            issuer: Issuer::new("k1"),
            listen: format!("{}:0", own_loopback()),
            process: Process::prepare(),
        };
        fs::create_dir(rig.path("source")).unwrap();
        rig.write("world.yaml", yaml);
        rig.set_keys(&[&rig.issuer]);
        rig
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
        let mut command = self.process.executable();
        command
            .args(["--token-issuer", ISSUER, "--listen", &self.listen])
            .arg("--source-dir")
            .arg(self.path("source"))
            .arg("--token-jwks")
            .arg(self.path("jwks.json"));
        command
    }

    /// Started, and ready.
    pub(crate) fn launch(&mut self) {
        self.process.run(self.command());
        self.process.ready();
    }

    /// Where clients of the one before look for it.
    pub(crate) fn relaunch_at(&mut self, address: &str) {
        self.listen = address.into();
        self.launch();
    }

    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let text = self.get("/metrics").1;
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse().ok()
    }
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
