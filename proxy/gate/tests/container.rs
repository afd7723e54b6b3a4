//! The gate as a container runtime starts it: as root with the capabilities that the chart gives
//! its container, and none more.
//!
//! Needs root, for its network namespace.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "door/namespace.rs"]
#[allow(dead_code, reason = "the door's tests use more of it")]
mod namespace;

use std::{
    fs,
    io::{Read, Write},
    net::{TcpStream, UdpSocket},
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use namespace::Namespace;

const CHART: &str = include_str!("../../../charts/turnpike/templates/gate.yaml");
const PATIENCE: Duration = Duration::from_secs(20);
const NET_RAW: u64 = 1 << 13;

/// Those under `add:`, without `CAP_`.
fn capabilities() -> Vec<&'static str> {
    let listed = CHART
        .lines()
        .map(str::trim)
        .skip_while(|line| *line != "add:");
    let names: Vec<_> = listed
        .skip(1)
        .map_while(|line| line.strip_prefix("- ")?.split(' ').next())
        .collect();
    assert!(names.contains(&"NET_RAW"), "the chart lists {names:?}");
    names
}

fn start(namespace: &Namespace, folder: &Path, capabilities: &[&str]) -> Child {
    let kept: String = capabilities
        .iter()
        .map(|name| format!(",+{}", name.to_lowercase()))
        .collect();
    namespace.run(|| {
        Command::new("setpriv")
            .args(["--no-new-privs", "--inh-caps=-all"])
            .arg(format!("--bounding-set=-all{kept}"))
            .arg(env!("CARGO_BIN_EXE_turnpike-gate"))
            .args(["--node-name=node-a", "--controller=127.0.0.1:1"])
            .args(["--upstream-dns=127.0.0.1:1", "--cluster-dns=127.0.0.1:1"])
            .args([
                "--token-file=/none",
                "--root-file=/none",
                "--feed-socket=/none",
            ])
            .arg("--spool-dir")
            .arg(folder.join("spool"))
            .args(["--start-seconds=1", "--drain-seconds=0"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    })
}

fn healthy(namespace: &Namespace) -> bool {
    namespace.run(|| {
        let Ok(mut stream) = TcpStream::connect("127.0.0.1:15022") else {
            return false;
        };
        stream
            .write_all(b"GET /healthz/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).is_ok() && answer.starts_with("HTTP/1.1 200")
    })
}

fn wait_for_health(namespace: &Namespace, gate: &mut Child) {
    let deadline = Instant::now() + PATIENCE;
    while !healthy(namespace) {
        assert!(gate.try_wait().unwrap().is_none(), "{}", said(gate));
        assert!(Instant::now() < deadline, "the gate is not healthy");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Of one that has ended.
fn said(gate: &mut Child) -> String {
    let mut text = String::new();
    gate.stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    text
}

fn end(mut gate: Child) {
    kill(Pid::from_raw(gate.id() as i32), Signal::SIGTERM).unwrap();
    let status = gate.wait().unwrap();
    assert!(status.success(), "{status}: {}", said(&mut gate));
}

fn status(gate: &Child, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/status", gate.id())).unwrap();
    let mut lines = text.lines();
    let line = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap().trim().to_owned()
}

#[test]
fn it_binds_becomes_its_user_and_serves_and_does_so_again() {
    let namespace = Namespace::new("tpt-gate-container");
    namespace.sh("ip address add 169.254.20.10/32 dev lo");
    let folder = tempfile::tempdir().unwrap();
    // As kubelet makes a hostPath.
    let spool = folder.path().join("spool");
    fs::create_dir(&spool).unwrap();
    for start_number in ["first", "second"] {
        let mut gate = start(&namespace, folder.path(), &capabilities());
        wait_for_health(&namespace, &mut gate);
        assert_eq!(status(&gate, "Uid"), "1338\t1338\t1338\t1338");
        assert_eq!(status(&gate, "Gid"), "1338\t1338\t1338\t1338");
        assert_eq!(status(&gate, "NoNewPrivs"), "1");
        for set in ["CapEff", "CapPrm"] {
            let held = u64::from_str_radix(&status(&gate, set), 16).unwrap();
            assert_eq!(held, NET_RAW, "{set} at the {start_number} start");
        }
        let spool = fs::metadata(&spool).unwrap();
        assert_eq!((spool.uid(), spool.mode() & 0o777), (1338, 0o700));
        assert!(answers_dns(&namespace), "at the {start_number} start");
        end(gate);
    }
}

fn answers_dns(namespace: &Namespace) -> bool {
    // ID 7, recursion desired, one question: a A.
    let question = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x01a\0\0\x01\0\x01";
    namespace.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send_to(question, "169.254.20.10:53").unwrap();
        let mut answer = [0; 512];
        let length = socket.recv(&mut answer).unwrap_or(0);
        length > 12 && answer[..2] == [0, 7]
    })
}

#[test]
fn each_capability_is_needed_and_named_where_it_is_missing() {
    let namespace = Namespace::new("tpt-gate-capability");
    let folder = tempfile::tempdir().unwrap();
    // Once with all of them: the record is the gate's user's from then on.
    let mut gate = start(&namespace, folder.path(), &capabilities());
    wait_for_health(&namespace, &mut gate);
    end(gate);
    for missing in capabilities() {
        let mut others = capabilities();
        others.retain(|name| *name != missing);
        let mut gate = start(&namespace, folder.path(), &others);
        let deadline = Instant::now() + PATIENCE;
        while gate.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                gate.kill().unwrap();
                gate.wait().unwrap();
                panic!("it runs without {missing}");
            }
            thread::sleep(Duration::from_millis(20));
        }
        let said = said(&mut gate);
        assert!(
            said.contains(&format!("CAP_{missing}")),
            "{missing}: {said}"
        );
    }
}
