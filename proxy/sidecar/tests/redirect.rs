//! Where a redirected connection was going, as the kernel tells it, in both families.
//!
//! Needs root: it runs itself once more in a network namespace of its own, which ends with it.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends with what it did not expect"
)]
#![allow(dead_code, reason = "shares the worlds of the data plane's tests")]

#[path = "data_plane/apps.rs"]
mod apps;
#[path = "data_plane/world.rs"]
mod world;

use std::{
    net::{IpAddr, SocketAddr},
    process::Command,
    sync::Arc,
};

use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
};
use turnpike_sidecar::{DataPlane, config::Config, mesh::Mesh, observe::RefusalReason};

use crate::{
    apps::to_end,
    world::{Known, Recorder, Trust, own},
};

const INSIDE: &str = "TURNPIKE_TEST_INSIDE_NAMESPACE";

#[test]
fn the_kernel_tells_the_original_destination() {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        return runtime.block_on(inside());
    }
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes a namespace: run it as root"
    );
    let inside = Command::new("unshare")
        .args(["--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "the_kernel_tells_the_original_destination",
            "--nocapture",
        ])
        .env(INSIDE, "1")
        .status();
    assert!(inside.unwrap().success());
}

fn run(command: &str) {
    let status = Command::new("sh").args(["-c", command]).status().unwrap();
    assert!(status.success(), "{command}");
}

/// What the node lays for a pod, as far as it matters here: what the application's address sends
/// is turned to the proxy, and what the proxy sends itself is not.
fn redirect() {
    run("ip link set lo up && ip addr add 10.9.9.8/32 dev lo && ip addr add 10.9.9.9/32 dev lo");
    run("ip -6 addr add fd09::8/128 dev lo nodad && ip -6 addr add fd09::9/128 dev lo nodad");
    run(
        "nft 'table inet t { chain out { type nat hook output priority -100; \
         ip saddr 10.9.9.8 tcp dport 8080 redirect to :15001; \
         ip6 saddr fd09::8 tcp dport 8080 redirect to :15001; }; }'",
    );
}

async fn greet(address: &str) {
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let greeting = format!("this is {}", stream.local_addr().unwrap());
            let _ = stream.write_all(greeting.as_bytes()).await;
        }
    });
}

async fn call(from: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = if to.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }
    .unwrap();
    socket.bind(SocketAddr::new(from, 0)).unwrap();
    socket.connect(to).await.unwrap()
}

async fn inside() {
    redirect();
    let store = Trust::new().store("caller");
    let (_own, own_watch) = watch::channel(Arc::new(own("caller", 9)));
    let mesh = Mesh::new(own_watch, Arc::new(Known::default()), store, "cluster");
    let seen = Recorder::default();
    let plane = DataPlane::start(Config::default(), mesh, Arc::new(seen.clone())).unwrap();
    for (from, to) in [("10.9.9.8", "10.9.9.9:8080"), ("fd09::8", "[fd09::9]:8080")] {
        greet(to).await;
        let mut stream = call(from.parse().unwrap(), to.parse().unwrap()).await;
        assert_eq!(to_end(&mut stream).await, format!("this is {to}"));
    }
    let carried = seen.get(|recorded| recorded.tcp.iter().filter(|e| *e == "opened").count());
    assert_eq!(carried, 2, "both went through the proxy");
    // Nothing turned this one: it is the proxy's own port that was called.
    let mut direct = TcpStream::connect("127.0.0.1:15001").await.unwrap();
    assert_eq!(to_end(&mut direct).await, "");
    seen.wait(|recorded| {
        let refused = |reason| recorded.refusals.iter().any(|(why, _)| *why == reason);
        (refused(RefusalReason::Loop) || refused(RefusalReason::NotCaptured)).then_some(())
    })
    .await;
    drop(plane);
}
