//! Configurations of the peers: one worker, an access log, HTTP/1.1 throughout, keep-alive to the
//! upstream, and for the pair TLS 1.3 with X25519MLKEM768 and both certificates verified, as in
//! ours.

use std::{fs, net::IpAddr, path::Path};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use turnpike_rig::{Pod, daemon::Daemon};
use turnpike_vpc::netns::Command;

/// The user whose connections are not captured again.
const PROXY_USER: u32 = 1337;

/// The nginx that everybody calls.
pub(crate) fn origin() -> String {
    let body = "x".repeat(1024);
    include_str!("../peers/origin.conf.in").replace("@BODY@", &body)
}

/// nginx as a forward proxy in a client's pod.
pub(crate) fn nginx(pod: &Pod, upstream: IpAddr) -> Result<Daemon> {
    let folder = pod.folder.join("nginx-proxy");
    make(&folder)?;
    let config = folder.join("nginx.conf");
    let text = include_str!("../peers/proxy.conf.in")
        .replace("@FOLDER@", &folder.to_string_lossy())
        .replace("@UPSTREAM@", &format!("{upstream}:8080"));
    fs::write(&config, text)?;
    let command = Command::new("nginx")
        .arg("-c")
        .arg(config)
        .user(PROXY_USER, PROXY_USER);
    Daemon::start("nginx-proxy", command, &pod.namespace, &folder, false)
}

/// Envoy in a pod's sidecar's place.
pub(crate) fn envoy(program: &Path, pod: &Pod, config: &str) -> Result<Daemon> {
    let folder = pod.folder.join("envoy");
    make(&folder)?;
    let file = folder.join("envoy.yaml");
    fs::write(&file, config.replace("@FOLDER@", &folder.to_string_lossy()))?;
    let command = Command::new(program)
        .args([
            "--concurrency",
            "1",
            "--log-level",
            "error",
            "--disable-hot-restart",
            "-c",
        ])
        .arg(file)
        .user(PROXY_USER, PROXY_USER);
    let daemon = Daemon::start("envoy", command, &pod.namespace, &folder, false)?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    Ok(daemon)
}

/// Plaintext from the client to the upstream.
pub(crate) fn plain(upstream: IpAddr) -> String {
    envoy_config(15001, "", upstream, "")
}

/// The client's side of a pair.
pub(crate) fn originate(upstream: IpAddr, certificates: &Certificates) -> String {
    let context = certificates.fill(include_str!("../peers/upstream-tls.yaml.in"));
    envoy_config(15001, "", upstream, &context)
}

/// The server's side of a pair.
pub(crate) fn terminate(app: IpAddr, certificates: &Certificates) -> String {
    let context = certificates.fill(include_str!("../peers/downstream-tls.yaml.in"));
    envoy_config(15006, &context, app, "")
}

fn envoy_config(port: u16, downstream: &str, upstream: IpAddr, origination: &str) -> String {
    include_str!("../peers/envoy.yaml.in")
        .replace("@PORT@", &port.to_string())
        .replace("@UPSTREAM@", &upstream.to_string())
        .replace("@DOWNSTREAM_TLS@", downstream)
        .replace("@UPSTREAM_TLS@", origination)
}

/// One leaf for both sides, and its root.
#[derive(Debug)]
pub(crate) struct Certificates {
    root: String,
    leaf: String,
    key: String,
}

impl Certificates {
    pub(crate) fn make() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A leaf by the same name as its issuer would pass for self-signed.
        params
            .distinguished_name
            .push(DnType::CommonName, "bench root");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let leaf = CertificateParams::new(["peer".to_owned()])?.signed_by(&key, &issuer)?;
        Ok(Self {
            root: issuer.pem(),
            leaf: leaf.pem(),
            key: key.serialize_pem(),
        })
    }

    fn fill(&self, template: &str) -> String {
        let quoted = |pem: &str| format!("\"{}\"", pem.replace('\n', "\\n"));
        template
            .replace("@ROOT@", &quoted(&self.root))
            .replace("@LEAF@", &quoted(&self.leaf))
            .replace("@KEY@", &quoted(&self.key))
    }
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    Ok(std::os::unix::fs::chown(
        folder,
        Some(PROXY_USER),
        Some(PROXY_USER),
    )?)
}
