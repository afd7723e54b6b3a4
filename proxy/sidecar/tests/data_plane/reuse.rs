//! An address that becomes another pod's while a client still uses it.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use turnpike_rules::{
    traffic::{Retry, RetryConditions},
    workload::Workload,
};

use turnpike_sidecar::mesh::ServiceView;

use crate::{
    apps::http1,
    world::{Setup, Sidecar, Trust, VIP, identity, key, web},
};

/// What each connection to an address began with.
type Firsts = Arc<Mutex<Vec<Vec<u8>>>>;

/// Answers plaintext HTTP on each connection; or, where `silent`, nothing at all.
async fn recording(silent: bool) -> (SocketAddr, Firsts) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let firsts = Firsts::default();
    let record = firsts.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let record = record.clone();
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    record.lock().unwrap().push(buffer[..count].to_vec());
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                    if !silent && buffer.starts_with(b"GET") {
                        stream.write_all(answer).await.unwrap();
                    }
                }
            });
        }
    });
    (address, firsts)
}

fn pod(uid: &str, address: SocketAddr, account: Option<&str>) -> Workload {
    Workload {
        uid: uid.into(),
        namespace: "shop".into(),
        name: uid.into(),
        address: address.ip(),
        identity: account.map(identity),
        service: None,
        ports: Vec::new(),
        names: None,
    }
}

fn caller_of(address: SocketAddr) -> Sidecar {
    let setup = Setup {
        outbound_to: address,
        ..Setup::caller()
    };
    setup.start(&Trust::new())
}

fn plaintext(firsts: &Firsts) -> usize {
    let firsts = firsts.lock().unwrap();
    firsts
        .iter()
        .filter(|bytes| bytes.starts_with(b"GET"))
        .count()
}

#[tokio::test]
async fn the_next_request_of_a_kept_connection_is_not_sent_in_plaintext() {
    let (address, firsts) = recording(false).await;
    let caller = caller_of(address);
    caller.known.set_workload(pod("old", address, None));
    let mut client = http1(caller.outbound()).await;
    assert_eq!(client.get("/").await.0, 200);
    // Gone, and its address is a pod's with a sidecar.
    caller.known.set_workload(pod("new", address, Some("web")));
    let (status, body) = client.get("/").await;
    assert_eq!(status, 503, "{body}");
    assert_eq!(plaintext(&firsts), 1);
    let hello = firsts.lock().unwrap().last().unwrap()[0];
    assert_eq!(hello, 0x16, "mutual TLS was tried");
    // And back: what the connection leads to follows what stands there.
    caller.known.set_workload(pod("third", address, None));
    assert_eq!(client.get("/").await.0, 200);
}

#[tokio::test]
async fn a_pod_that_nobody_can_be_asked_about_is_not_called_in_plaintext() {
    let (address, firsts) = recording(false).await;
    let caller = caller_of(address);
    caller.known.set_workload(pod("old", address, None));
    let mut client = http1(caller.outbound()).await;
    assert_eq!(client.get("/").await.0, 200);
    caller.known.set_unanswered(address.ip());
    let (status, body) = client.get("/").await;
    assert!(status == 503 && body.contains("control plane"), "{body}");
    assert_eq!(plaintext(&firsts), 1);
}

/// A Service at `address` whose first try is given up after a while and repeated.
fn repeated(address: SocketAddr, account: Option<&str>) -> ServiceView {
    let mut view = web(&[(address, account)]);
    view.service.traffic.timeouts.per_try = Some(Duration::from_millis(600));
    view.service.traffic.retry = Retry {
        attempts: 1,
        conditions: RetryConditions {
            reset: true,
            ..RetryConditions::default()
        },
        ..Retry::default()
    };
    view
}

#[tokio::test]
async fn the_next_try_is_not_sent_in_plaintext() {
    for by_address in [true, false] {
        let (address, firsts) = recording(true).await;
        let caller = caller_of(if by_address {
            address
        } else {
            VIP.parse().unwrap()
        });
        let now_stands = |account: Option<&str>| {
            let mut workload = pod(account.unwrap_or("old"), address, account);
            workload.service = Some(key());
            caller.known.set_workload(workload);
            caller.known.set_service(repeated(address, account));
        };
        now_stands(None);
        let mut client = http1(caller.outbound()).await;
        let asked = tokio::spawn(async move { client.get("/").await });
        while firsts.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        now_stands(Some("web"));
        assert_eq!(asked.await.unwrap().0, 504);
        let tries = firsts.lock().unwrap().len();
        assert_eq!((tries, plaintext(&firsts)), (2, 1), "{by_address}");
    }
}
