//! The admin ports, asked over real sockets.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
};
use turnpike_sidecar::{
    admin::{Admin, AdminConfig, Phase, State},
    mesh::Directory,
    telemetry::{Own, Telemetry, access_log::AccessLog},
};

use crate::rig::*;

pub(crate) async fn ask(address: SocketAddr, request: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

#[tokio::test]
async fn people_kubelet_and_prometheus_get_their_answers() {
    let pod = Pod::start(None).await;
    pod.put_service("1", "web", &[("0", &[1])]);
    pod.control.store().service(&key("web")).await.unwrap();
    let level = Arc::new(Mutex::new(String::new()));
    let set = level.clone();
    let state = Arc::new(State {
        store: pod.control.store().clone(),
        credentials: pod.control.credentials().clone(),
        telemetry: OnceLock::new(),
        phase: watch::Sender::new(Phase::Starting),
        set_level: Box::new(move |level| {
            if level == "nonsense=" {
                return Err("no".into());
            }
            level.clone_into(&mut set.lock().unwrap());
            Ok(())
        }),
    });
    let local: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let config = AdminConfig {
        admin: local,
        metrics: local,
        ready: local,
    };
    let admin = Admin::bind(&config).unwrap();
    let [admin_at, metrics_at, ready_at] = admin.addresses().unwrap();
    let serving = tokio::spawn(admin.serve(state.clone()));

    let (status, text) = ask(ready_at, "GET /healthz/ready").await;
    assert_eq!((status, text.as_str()), (503, "not ready: starting\n"));
    assert_eq!(
        ask(metrics_at, "GET /metrics").await.0,
        200,
        "before there is anything to tell"
    );
    let own_now = pod.control.store().own_now().unwrap();
    let log = AccessLog::start(std::io::sink()).unwrap();
    let telemetry = Telemetry::new(Own::new(&own_now, "cluster"), log, None);
    state.telemetry.set(telemetry).unwrap();
    state.phase.send_replace(Phase::Serving);
    assert_eq!(ask(ready_at, "GET /healthz/ready").await.0, 200);
    let (_, text) = ask(metrics_at, "GET /stats/prometheus").await;
    assert!(text.contains("turnpike_controller_connected 1\n"), "{text}");
    assert!(text.ends_with("# EOF\n"));

    let (status, dump) = ask(admin_at, "GET /config_dump").await;
    assert_eq!(status, 200);
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    assert_eq!(
        dump["self"]["identity"],
        "spiffe://cluster.local/ns/shop/sa/web"
    );
    assert_eq!(
        dump["services"]["cluster/shop/web"]["endpoints"][0]["address"],
        "10.0.0.1"
    );
    assert!(!dump.to_string().contains("PRIVATE"));
    let (_, clusters) = ask(admin_at, "GET /clusters").await;
    assert!(
        clusters.contains("cluster/shop/web::10.0.0.1::state::serving\n"),
        "{clusters}"
    );
    let (_, certs) = ask(admin_at, "GET /certs").await;
    let certs: serde_json::Value = serde_json::from_str(&certs).unwrap();
    let current = pod.control.credentials().load().unwrap();
    assert_eq!(certs["certificates"][0]["serial"], current.serial());

    assert_eq!(ask(admin_at, "POST /logging?level=debug").await.0, 200);
    assert_eq!(*level.lock().unwrap(), "debug");
    assert_eq!(ask(admin_at, "POST /logging?level=nonsense=").await.0, 400);
    assert_eq!(ask(admin_at, "GET /logging?level=trace").await.0, 405);
    assert_eq!(ask(admin_at, "POST /quitquitquit").await.0, 404);
    // What the network reaches gives away nothing else.
    assert_eq!(ask(metrics_at, "GET /config_dump").await.0, 404);
    assert_eq!(ask(ready_at, "GET /config_dump").await.0, 404);

    state.phase.send_replace(Phase::Draining);
    let (status, text) = ask(ready_at, "GET /healthz/ready").await;
    assert_eq!((status, text.as_str()), (503, "not ready: draining\n"));
    serving.abort();
}
