//! The executable itself, in a network namespace of its own: needs root.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use tokio::time::timeout;

use crate::{
    admin::ask,
    controller::{PATIENCE, TestController},
    rig::*,
};

/// Runs `test` on a thread whose network is its own, so that the proxy's fixed ports are free.
fn in_own_network<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    assert!(
        geteuid().is_root(),
        "this test makes a network namespace: run it as root"
    );
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status()
            .unwrap();
        assert!(up.success());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test());
    });
    thread.join().unwrap();
}

struct Proxy(Option<Child>);

impl Proxy {
    fn start(server: &TestController, state_dir: &Path) -> Self {
        Self::start_as(command(), server, state_dir)
    }

    fn start_as(mut command: Command, server: &TestController, state_dir: &Path) -> Self {
        let client = server.client();
        let child = command
            .env("TURNPIKE_CONTROLLER", &client.address)
            .env("TURNPIKE_CONTROLLER_NAME", &client.server_name)
            .env("TURNPIKE_TOKEN_FILE", &client.token_file)
            .env("TURNPIKE_ROOT_FILE", &client.root_file)
            .env("TURNPIKE_STATE_DIR", state_dir)
            .env("POD_NAME", "web-1")
            .env("POD_NAMESPACE", "shop")
            .env("POD_UID", UID)
            .env("POD_IP", "10.0.0.1")
            .env("SERVICE_ACCOUNT", "web")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self(Some(child))
    }

    async fn terminate(mut self) -> Output {
        let child = self.0.take().unwrap();
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
        let output = tokio::task::spawn_blocking(move || child.wait_with_output());
        timeout(PATIENCE, output)
            .await
            .expect("must end")
            .unwrap()
            .unwrap()
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.kill();
    }
}

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_turnpike-proxy"));
    command.env_clear();
    command
}

fn port(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// Waits until readiness answers like this.
async fn readiness(status: u16, text: &str) {
    let mut last = None;
    let wait = async {
        loop {
            if std::net::TcpStream::connect(port(15021)).is_ok() {
                let answer = ask(port(15021), "GET /healthz/ready").await;
                if answer.0 == status && answer.1.contains(text) {
                    return;
                }
                last = Some(answer);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert!(
        timeout(PATIENCE, wait).await.is_ok(),
        "not {status} {text}: {last:?}"
    );
}

#[test]
fn a_proxy_starts_serves_restarts_and_ends() {
    in_own_network(|| async {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("state");
        let mut server = TestController::start().await;
        let mut proxy = Proxy::start(&server, &state_dir);
        readiness(503, "waiting for this pod's configuration").await;
        assert!(
            std::net::TcpStream::connect(port(15001)).is_err(),
            "no traffic before that"
        );
        server.put(UID, "1", &own());
        readiness(200, "ready").await;
        for captured in [15001, 15006] {
            std::net::TcpStream::connect(port(captured)).unwrap();
        }
        let (_, certs) = ask(port(15000), "GET /certs").await;
        assert!(
            certs.contains("spiffe://cluster.local/ns/shop/sa/web"),
            "{certs}"
        );
        assert_eq!(ask(port(15020), "GET /metrics").await.0, 200);
        assert_eq!(ask(port(15000), "POST /logging?level=debug").await.0, 200);
        let file = state_dir.join("mesh.snapshot");
        until("the state is kept", || file.exists()).await;

        // Killed and started again without a controller: it knows itself, and has no key.
        proxy.kill();
        server.kill().await;
        let proxy = Proxy::start(&server, &state_dir);
        readiness(503, "waiting for a certificate").await;
        let (_, dump) = ask(port(15000), "GET /config_dump").await;
        assert!(dump.contains(r#""workload": "web""#), "{dump}");
        let authority = turnpike_certs::Authority::from_pem(
            server.authority.certificate_pem(),
            &server.authority.key_pem(),
        );
        server.revive(authority.unwrap()).await;
        readiness(200, "ready").await;

        let output = proxy.terminate().await;
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(
            log.contains("draining") && !log.contains("PRIVATE"),
            "{log}"
        );
    });
}

#[test]
fn a_collector_that_is_away_does_not_hold_up_the_end() {
    in_own_network(|| async {
        let dir = tempfile::tempdir().unwrap();
        let server = TestController::start().await;
        // Connections to it are made, and nobody answers.
        let collector = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", collector.local_addr().unwrap());
        let mut command = command();
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
        server.put(UID, "1", &own());
        let begun = Instant::now();
        let proxy = Proxy::start_as(command, &server, dir.path());
        readiness(200, "ready").await;
        assert!(begun.elapsed() < Duration::from_secs(5), "{begun:?}");
        let begun = Instant::now();
        let output = proxy.terminate().await;
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(begun.elapsed() < Duration::from_secs(4), "{begun:?}");
    });
}

#[test]
fn settings_that_cannot_work_are_named() {
    let output = command().output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("--controller") && text.contains("--pod-uid"),
        "{text}"
    );

    let output = command()
        .env("TURNPIKE_CONTROLLER", "127.0.0.1:1")
        .env("POD_NAME", "web-1")
        .env("POD_NAMESPACE", "Shop")
        .env("POD_UID", UID)
        .env("POD_IP", "10.0.0.1")
        .env("SERVICE_ACCOUNT", "web")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("POD_NAMESPACE") && text.contains("/ns/Shop/"),
        "{text}"
    );
}
