//! Opaque bytes: through the mesh, past it, and when the server speaks first.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use turnpike_rules::{
    authz::{Authorization, Policy, Rule, Source, TextPattern},
    service::Protocol,
    workload::MtlsMode,
};
use turnpike_sidecar::{config::Bounds, observe::RefusalReason};

use crate::{
    apps::{exchange, nowhere, raw, to_end},
    world::{Pair, Setup, Trust, identity, web},
};

/// Greets before anything is asked, then echoes.
async fn server_first() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                stream.write_all(b"220 hello\r\n").await.unwrap();
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

async fn converse(address: std::net::SocketAddr) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut greeting = [0; 11];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 hello\r\n");
    stream.write_all(b"EHLO x\r\n").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(to_end(&mut stream).await, "EHLO x\r\n");
}

#[tokio::test]
async fn servers_may_speak_first_declared_or_not() {
    let app = server_first().await;
    for protocol in [Protocol::Detect, Protocol::Tcp] {
        let pair = Pair::with(app, |view| view.service.ports[0].protocol = protocol);
        for _ in 0..3 {
            converse(pair.caller.outbound()).await;
        }
        let line = pair.callee.seen.line(0).await;
        assert_eq!(
            (line.received, line.sent, line.peer),
            (8, 19, Some(identity("caller")))
        );
    }
}

#[tokio::test]
async fn a_caller_without_a_sidecar_may_wait_for_the_server() {
    let pair = Pair::new(server_first().await);
    converse(pair.callee.inbound()).await;
}

#[tokio::test]
async fn a_mesh_peer_that_is_slow_to_begin_is_not_taken_for_plaintext() {
    let (app, connections) = raw(b"unexpected").await;
    let trust = Trust::new();
    let callee = Setup::callee("web", app).start(&trust);
    let mut stream = TcpStream::connect(callee.inbound()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    // A ClientHello whose server name is another pod's.
    let hello = crate::bounds::client_hello("p80.other.shop.cluster.svc.turnpike", "turnpike/tcp");
    stream.write_all(&hello).await.unwrap();
    assert_eq!(to_end(&mut stream).await, "");
    callee.seen.refusal(RefusalReason::ServerName).await;
    let _ = connections;
}

/// Nor do two ends that both wait for the other hold a connection to a pod outside the mesh for good.
#[tokio::test]
async fn two_silent_ends_are_parted_at_the_idle_timeout() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let caller = Setup::caller().start(&Trust::new());
    let mut view = web(&[(silent.local_addr().unwrap(), None)]);
    let idle = Duration::from_secs(5);
    view.service.traffic.timeouts.idle = Some(idle);
    caller.known.set_service(view);
    let mut client = TcpStream::connect(caller.outbound()).await.unwrap();
    let ended = timeout(2 * idle, to_end(&mut client)).await;
    assert_eq!(ended.expect("nobody ends it"), "");
    assert_eq!(caller.seen.line(0).await.flags, "SI");
}

#[tokio::test]
async fn unknown_destinations_are_passed_through() {
    let app = server_first().await;
    let caller = Setup {
        outbound_to: app,
        ..Setup::caller()
    }
    .start(&Trust::new());
    converse(caller.outbound()).await;
    let tcp = caller
        .seen
        .wait(|recorded| recorded.tcp.get(2).map(|_| recorded.tcp.clone()))
        .await;
    assert_eq!(tcp, ["opened", "8/19", "closed -"]);
}

#[tokio::test]
async fn an_unreachable_destination_fails_at_once() {
    let nowhere = nowhere();
    let caller = Setup {
        outbound_to: nowhere,
        ..Setup::caller()
    }
    .start(&Trust::new());
    assert_eq!(exchange(caller.outbound(), b"x").await, "");
    let tcp = caller
        .seen
        .wait(|recorded| recorded.tcp.get(1).map(|_| recorded.tcp.clone()))
        .await;
    assert_eq!(tcp, ["opened", "closed UF"]);
    // As if the application had connected itself, so that it tries its next address.
    let error = match TcpStream::connect(caller.outbound()).await {
        Ok(mut stream) => stream.read(&mut [0]).await.unwrap_err(),
        // The reset may come before the connection is looked at.
        Err(error) => error,
    };
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let details = caller.seen.refusal(RefusalReason::NoRoute).await;
    assert!(details.contains(&nowhere.to_string()), "{details}");
}

#[tokio::test]
async fn the_applications_own_tls_is_not_touched() {
    let (app, _) = raw(b"\x15\x03\x03\0\x02\x02\x28").await;
    let pair = Pair::new(app);
    let hello = crate::bounds::client_hello("web.shop", "h2");
    let answer = exchange(pair.caller.outbound(), &hello).await;
    assert_eq!(answer.as_bytes()[0], 0x15, "the application's own alert");
    pair.callee.set_own(|own| own.mtls = MtlsMode::Strict);
    assert_eq!(exchange(pair.callee.inbound(), &hello).await, "");
    pair.callee.seen.refusal(RefusalReason::Strict).await;
}

#[tokio::test]
async fn a_loop_is_closed() {
    let caller = Setup {
        outbound_to: "127.0.0.1:15006".parse().unwrap(),
        inbound_to: "127.0.0.1:15001".parse().unwrap(),
        ..Setup::caller()
    };
    let caller = caller.start(&Trust::new());
    for address in [caller.outbound(), caller.inbound()] {
        assert_eq!(exchange(address, b"GET / HTTP/1.1\r\n\r\n").await, "");
    }
    caller.seen.refusal(RefusalReason::Loop).await;
}

/// Accepts one connection, says so, greets when told to, and says when the connection has ended.
struct Held {
    address: std::net::SocketAddr,
    accepted: tokio::sync::oneshot::Receiver<()>,
    greet: tokio::sync::oneshot::Sender<()>,
    ended: tokio::sync::oneshot::Receiver<()>,
}

async fn held() -> Held {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (accept, accepted) = tokio::sync::oneshot::channel();
    let (greet, mut greeted) = tokio::sync::oneshot::channel();
    let (end, ended) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        accept.send(()).unwrap();
        let mut byte = [0];
        tokio::select! {
            Ok(()) = &mut greeted => {
                let _ = stream.write_all(b"220 hello\r\n").await;
                let _ = stream.read(&mut byte).await;
            }
            _ = stream.read(&mut byte) => {}
        }
        let _ = end.send(());
    });
    Held {
        address,
        accepted,
        greet,
        ended,
    }
}

#[tokio::test]
async fn a_policy_tightened_while_both_are_silent_holds_for_the_first_word() {
    let app = held().await;
    let setup = Setup {
        bounds: brief(),
        ..Setup::callee("web", app.address)
    };
    let callee = setup.start(&Trust::new());
    let mut stream = TcpStream::connect(callee.inbound()).await.unwrap();
    app.accepted.await.unwrap();
    callee.set_own(|own| own.mtls = MtlsMode::Strict);
    // Not heard where the connection has already been given up.
    let _ = app.greet.send(());
    assert_eq!(to_end(&mut stream).await, "");
    callee.seen.refusal(RefusalReason::Strict).await;
}

/// Bounds that a test can wait for.
fn brief() -> Bounds {
    Bounds {
        head: Duration::from_millis(500),
        ..Bounds::default()
    }
}

#[tokio::test]
async fn an_application_is_let_go_when_policy_forbids_a_caller_that_has_not_spoken() {
    let app = held().await;
    let callee = Setup::callee("web", app.address).start(&Trust::new());
    let mut stream = TcpStream::connect(callee.inbound()).await.unwrap();
    app.accepted.await.unwrap();
    callee.set_own(|own| own.mtls = MtlsMode::Strict);
    let ended = timeout(Duration::from_secs(20), app.ended).await;
    ended
        .expect("the application's connection is ended")
        .unwrap();
    stream.write_all(b"EHLO x\r\n").await.unwrap();
    assert_eq!(to_end(&mut stream).await, "");
    callee.seen.refusal(RefusalReason::Strict).await;
}

#[tokio::test]
async fn silence_on_both_sides_has_an_end() {
    let app = held().await;
    let bounds = Bounds {
        idle: Duration::from_millis(300),
        ..brief()
    };
    let setup = Setup {
        bounds,
        ..Setup::callee("web", app.address)
    };
    let callee = setup.start(&Trust::new());
    let mut stream = TcpStream::connect(callee.inbound()).await.unwrap();
    assert_eq!(to_end(&mut stream).await, "");
    let ended = timeout(Duration::from_secs(20), app.ended).await;
    ended
        .expect("the application's connection is ended")
        .unwrap();
    callee.seen.refusal(RefusalReason::Slow).await;
}

/// Connects at once, and passes bytes on only later.
async fn late(to: std::net::SocketAddr) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(to).await.unwrap();
        tokio::time::sleep(Duration::from_millis(400)).await;
        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
    });
    address
}

#[tokio::test]
async fn a_mesh_peer_that_is_slow_to_begin_is_judged_by_its_certificate() {
    let trust = Trust::new();
    let mut setup = Setup::callee("web", server_first().await);
    setup.own.authorization = allow(Source {
        principals: vec![TextPattern::Exact("cluster.local/ns/shop/sa/caller".into())],
        ..Source::default()
    });
    setup.bounds = brief();
    setup.bounds.head = Duration::from_secs(5);
    let callee = setup.start(&trust);
    let caller = Setup::caller().start(&trust);
    let between = late(callee.inbound()).await;
    caller.known.set_service(web(&[(between, Some("web"))]));
    converse(caller.outbound()).await;
    // Nobody in particular is still refused.
    assert_eq!(exchange(callee.inbound(), b"EHLO x\r\n").await, "");
    callee.seen.refusal(RefusalReason::Authorization).await;
}

fn allow(from: Source) -> Authorization {
    let rule = Rule {
        from: vec![from],
        to: Vec::new(),
    };
    let policy = Policy {
        name: "shop/callers".into(),
        rules: vec![rule],
    };
    Authorization {
        deny: Vec::new(),
        allow: vec![policy],
    }
}
