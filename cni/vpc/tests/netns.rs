//! Namespaces and the processes in them, on the real kernel. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, io::Read, net::TcpListener, path::Path, time::Duration};

use turnpike_vpc::netns::{Command, Error, Namespace, Output, processes};

/// A namespace that goes when the test ends, and that an earlier run may have left.
struct Scratch(Namespace);

impl Scratch {
    fn new(name: &str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test makes namespaces: run it as root"
        );
        let name = format!("tpt-ns-{name}");
        Namespace::handle(&name)
            .unwrap()
            .remove(Duration::ZERO)
            .unwrap();
        Self(Namespace::create(&name).unwrap())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.0.remove(Duration::ZERO).unwrap();
    }
}

fn shell(script: &str) -> Command {
    Command::new("/bin/sh").args(["-c", script])
}

fn text(namespace: &Namespace, command: &Command) -> String {
    let output = command.output(namespace).unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_new_namespace_is_alone_and_forwards_nothing() {
    let ns = Scratch::new("alone");
    let links = text(
        &ns.0,
        &shell("ip -o link | wc -l; ip route; ip -6 route show default"),
    );
    assert_eq!(links, "1");
    assert_eq!(
        text(&ns.0, &shell("cat /proc/sys/net/ipv4/ip_forward")),
        "0"
    );
    assert_eq!(
        text(&ns.0, &shell("cat /proc/sys/net/ipv6/conf/all/forwarding")),
        "0"
    );
    assert!(
        text(&ns.0, &shell("ip -br link show lo")).contains("UP"),
        "loopback is down"
    );
    assert!(matches!(
        Namespace::create(ns.0.name()),
        Err(Error::Exists(_))
    ));
}

#[test]
fn a_socket_made_inside_stays_inside() {
    let ns = Scratch::new("socket");
    let listener =
        ns.0.run(|| TcpListener::bind("127.0.0.1:0"))
            .unwrap()
            .unwrap();
    let address = listener.local_addr().unwrap();
    assert!(
        ns.0.run(|| std::net::TcpStream::connect(address))
            .unwrap()
            .is_ok()
    );
    assert!(
        std::net::TcpStream::connect(address).is_err(),
        "reached from outside"
    );
}

#[test]
fn a_process_has_its_own_files_user_and_environment() {
    let ns = Scratch::new("files");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("resolv.conf"), "nameserver 169.254.20.10\n").unwrap();
    fs::create_dir_all(dir.path().join("secrets/token")).unwrap();
    fs::write(dir.path().join("secrets/token/token"), "let me in").unwrap();
    let command = shell(
        "id -u; id -G; echo $GREETING; echo ${HOME-unset}; cat /etc/resolv.conf; \
         cat /var/run/secrets/turnpike/token/token; echo; pwd; ls /run; \
         touch /var/run/secrets/turnpike/x 2>&1 || true",
    )
    .env_clear()
    .env("GREETING", "hello")
    .env("PATH", "/usr/bin:/bin")
    .user(1337, 1337)
    .cwd("/run/secrets")
    .tmpfs("/run")
    .bind(dir.path().join("resolv.conf"), "/etc/resolv.conf")
    .bind_read_only(dir.path().join("secrets"), "/var/run/secrets/turnpike");
    let said = text(&ns.0, &command);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(
        lines[..8],
        [
            "1337",
            "1337",
            "hello",
            "unset",
            "nameserver 169.254.20.10",
            "let me in",
            "/run/secrets",
            "secrets"
        ]
    );
    assert!(lines[8].contains("Read-only"), "{said}");
    assert!(
        !Path::new("/run/secrets/turnpike").exists(),
        "a mount leaked to the machine"
    );
}

#[test]
fn a_mount_point_that_is_missing_is_named() {
    let ns = Scratch::new("missing");
    let command = shell("true").bind("/etc/hostname", "/etc/no-such-file");
    let error = command.spawn(&ns.0).unwrap_err().to_string();
    assert!(error.contains("/etc/no-such-file"), "{error}");
    assert!(!Path::new("/etc/no-such-file").exists());
}

#[test]
fn capabilities_outside_the_bounding_set_cannot_be_had() {
    let ns = Scratch::new("caps");
    let net_bind = 1 << 10;
    let command = shell("grep -E 'CapEff|NoNewPrivs' /proc/self/status")
        .capabilities(net_bind)
        .no_new_privileges();
    let said = text(&ns.0, &command);
    assert!(
        said.contains("0000000000000400") && said.ends_with('1'),
        "{said}"
    );
}

#[test]
fn those_left_inside_are_found_and_killed() {
    let ns = Scratch::new("kill");
    let log = tempfile::NamedTempFile::new().unwrap();
    // Ignores SIGTERM, and has a child in a session of its own.
    let command = shell("trap '' TERM; setsid sleep 1000 & echo up; wait; sleep 1000")
        .new_session()
        .stdout(Output::File(log.path().into()));
    let mut child = command.spawn(&ns.0).unwrap();
    let mut said = String::new();
    while !said.contains("up") {
        said.clear();
        fs::File::open(log.path())
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
    }
    assert!(
        processes(&ns.0)
            .unwrap()
            .iter()
            .any(|p| p.pid == i32::try_from(child.id()).unwrap())
    );
    ns.0.remove(Duration::from_millis(50)).unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(!ns.0.path().exists());
}

#[test]
fn a_child_that_dies_with_its_parent_outlives_the_thread_that_asked_for_it() {
    let ns = Scratch::new("parent");
    let inner = ns.0.clone();
    let asking = std::thread::spawn(move || {
        let command = shell("echo up; sleep 0.3; echo done")
            .die_with_parent()
            .stdout(Output::Piped);
        command.spawn(&inner).unwrap()
    });
    let mut child = asking.join().unwrap();
    let mut said = String::new();
    let stdout = child.stdout.as_mut().unwrap();
    stdout.read_to_string(&mut said).unwrap();
    assert_eq!(said, "up\ndone\n");
    assert!(child.wait().unwrap().success());
}
