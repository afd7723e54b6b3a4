//! A fault in the proxy itself: one connection's is its own, a worker's is told.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use http::HeaderMap;
use tokio::{net::TcpStream, sync::watch, time::timeout};
use turnpike_rules::ServiceKey;
use turnpike_sidecar::{
    DataPlane,
    capture::OriginalDestination,
    config::{Bounds, Config, Listen},
    mesh::Mesh,
    observe::{
        AccessRecord, Direction, Flags, HttpSeries, Labels, Mirrored, Observer, Refusal, Silent,
        Span, TcpSeries,
    },
};

use crate::{
    apps::{exchange, get, serve},
    world::{Known, LOOPBACK, Trust, VIP, own, web},
};

/// Panics where it is told to, as if there were a fault in it.
#[derive(Debug, Default)]
struct Faulty {
    log: AtomicBool,
    refused: AtomicBool,
}

impl Observer for Faulty {
    fn http(&self, labels: &Labels) -> Arc<dyn HttpSeries> {
        Silent.http(labels)
    }
    fn tcp(&self, _: &Labels) -> Arc<dyn TcpSeries> {
        Arc::new(FaultyInSweep)
    }
    fn span(&self, _: Direction, _: &mut HeaderMap) -> Option<Box<dyn Span>> {
        None
    }
    fn logs(&self) -> bool {
        true
    }
    fn log(&self, _: &AccessRecord<'_>) {
        assert!(!self.log.load(SeqCst), "as if there were a fault in it");
    }
    fn ejected(&self, _: &ServiceKey) {}
    fn out(&self, _: &ServiceKey, _: usize) {}
    fn mirrored(&self, _: &ServiceKey, _: Mirrored) {}
    fn refused(&self, _: &Refusal<'_>) {
        assert!(!self.refused.load(SeqCst), "as if there were a fault in it");
    }
}

/// Its bytes are reported by the sweep, after five seconds of a connection's life.
#[derive(Debug)]
struct FaultyInSweep;

impl TcpSeries for FaultyInSweep {
    fn opened(&self) {}
    fn transferred(&self, _: u64, _: u64) {
        panic!("as if there were a fault in it");
    }
    fn closed(&self, _: Flags) {}
}

struct Proxy {
    plane: DataPlane,
    known: Arc<Known>,
    faulty: Arc<Faulty>,
}

fn proxy(outbound_to: std::net::SocketAddr, connections: u32) -> Proxy {
    let (known, faulty) = (Arc::new(Known::default()), Arc::new(Faulty::default()));
    let own = watch::channel(Arc::new(own("caller", 9))).1;
    let mesh = Mesh::new(own, known.clone(), Trust::new().store("caller"), "cluster");
    let listen = Listen {
        addresses: vec![LOOPBACK.parse().unwrap()],
        original: OriginalDestination::Fixed(outbound_to),
    };
    let config = Config {
        outbound: listen.clone(),
        inbound: listen,
        pod_addresses: Vec::new(),
        workers: 2,
        bounds: Bounds {
            connections,
            ..Bounds::default()
        },
    };
    let plane = DataPlane::start(config, mesh, faulty.clone()).unwrap();
    Proxy {
        plane,
        known,
        faulty,
    }
}

async fn hello(_: http::Request<hyper::body::Incoming>) -> http::Response<crate::apps::Body> {
    http::Response::new(crate::apps::full("hello"))
}

#[tokio::test]
async fn a_fault_in_one_connection_is_not_its_neighbours() {
    let mut proxy = proxy(VIP.parse().unwrap(), 100);
    let outbound = proxy.plane.outbound_addresses()[0];
    proxy.known.set_service(web(&[(serve(hello).await, None)]));
    proxy.faulty.log.store(true, SeqCst);
    let request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    for _ in 0..10 {
        exchange(outbound, request).await;
    }
    proxy.faulty.log.store(false, SeqCst);
    assert_eq!(get(outbound, "/").await.0, 200);
    let early = timeout(Duration::from_millis(100), proxy.plane.ended()).await;
    assert!(early.is_err(), "{early:?}");
    let mut left = proxy.plane.open_connections();
    for _ in 0..100 {
        left = proxy.plane.open_connections();
        if left == (0, 0) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(left, (0, 0), "those that failed are not counted for good");
}

#[tokio::test]
async fn a_fault_in_accepting_ends_the_worker_and_is_told() {
    let mut proxy = proxy(VIP.parse().unwrap(), 1);
    proxy.faulty.refused.store(true, SeqCst);
    let outbound = proxy.plane.outbound_addresses()[0];
    let _over_the_limit = [
        TcpStream::connect(outbound).await.unwrap(),
        TcpStream::connect(outbound).await.unwrap(),
    ];
    let ended = timeout(Duration::from_secs(20), proxy.plane.ended()).await;
    let ended = ended.expect("its end is noticed").to_string();
    assert!(ended.contains("accepting: it panicked: as if"), "{ended}");
}

#[tokio::test]
async fn a_fault_in_the_sweep_ends_the_worker_and_is_told() {
    let listener = tokio::net::TcpListener::bind(LOOPBACK).await.unwrap();
    let mut proxy = proxy(listener.local_addr().unwrap(), 100);
    let _held = TcpStream::connect(proxy.plane.outbound_addresses()[0]).await;
    let ended = timeout(Duration::from_secs(20), proxy.plane.ended()).await;
    let ended = ended.expect("its end is noticed").to_string();
    assert!(ended.contains("the sweep: it panicked: as if"), "{ended}");
}
