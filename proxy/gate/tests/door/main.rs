//! The gate on a node with the real rules: pods in namespaces, an outside that counts.

#![allow(clippy::unwrap_used, reason = "a test fails where it panics")]

mod control;
mod ends;
mod flows;
mod namespace;
mod outside;
mod start;
mod world;

use std::{
    io::{Read, Write},
    net::SocketAddr,
    sync::atomic::Ordering::SeqCst,
};

use hickory_proto::{op::ResponseCode, rr::RecordType};
use turnpike_ledger::{
    Event,
    record::{Assurance, Attempt, End, Protocol, Verdict},
};

use outside::{Web, ask};
use world::{World, connect, eventually, exchange, pod4, pod6, policies, tls};

const NAMES: &[(&str, &[&str])] = &[
    (
        "api.payments.example",
        &["203.0.113.66", "2001:db8:113::66"],
    ),
    ("partner.example", &["203.0.113.66"]),
    ("inside.example", &["10.0.0.5"]),
    ("attacker.example", &["203.0.113.99"]),
];

/// What a pod would have in resolv.conf: turned to the gate by the node's rules.
const DNS: &str = "10.96.0.10:53";

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

fn web() -> Web {
    Web::new(&[
        "api.payments.example",
        "partner.example",
        "attacker.example",
    ])
}

fn world(name: &str) -> World {
    let world = World::new(name);
    outside::dns(&world.outside, at("203.0.113.53:53"), NAMES);
    world.control.set_egress(policies());
    eventually("policy takes effect", || {
        ask(
            &world.pods[0],
            at(DNS),
            "api.payments.example",
            RecordType::A,
        )
        .is_ok()
    });
    world
}

fn denied(event: &Event) -> Option<&Attempt> {
    match event {
        Event::Denied(attempt) => Some(attempt),
        _ => None,
    }
}

fn denied_because(part: &'static str) -> impl Fn(&Event) -> Option<Attempt> {
    move |event| {
        let attempt = denied(event)?;
        attempt
            .reason
            .as_ref()?
            .contains(part)
            .then(|| attempt.clone())
    }
}

#[test]
fn an_allowed_name_passes_with_the_pods_own_address_and_is_on_record() {
    let world = world("pass");
    let web = web();
    let payments = outside::tls(&world.outside, at("203.0.113.66:443"), &web);
    let payments6 = outside::tls(&world.outside, at("[2001:db8:113::66]:443"), &web);
    let status = world.gate_status();
    assert!(status.contains("Uid:\t1338\t1338\t1338\t1338"), "{status}");
    assert!(
        status.contains("CapEff:\t0000000000002000"),
        "CAP_NET_RAW alone: {status}"
    );

    for (n, pod) in [5, 6].into_iter().zip(&world.pods) {
        let addresses = ask(pod, at(DNS), "Api.Payments.EXAMPLE", RecordType::A).unwrap();
        assert_eq!(addresses, [at("203.0.113.66:0").ip()]);
        let addresses = ask(pod, at(DNS), "api.payments.example", RecordType::AAAA).unwrap();
        assert_eq!(addresses, [at("[2001:db8:113::66]:0").ip()]);
        for (to, seen, own) in [
            ("203.0.113.66:443", &payments, pod4(n)),
            ("[2001:db8:113::66]:443", &payments6, pod6(n)),
        ] {
            let mut stream = tls(pod, at(to), "api.payments.example", true, &web).unwrap();
            let local = stream.sock.local_addr().unwrap();
            assert_eq!(local.ip(), own);
            stream.write_all(&[b'x'; 100_000]).unwrap();
            stream.read_exact(&mut vec![0; 100_000]).unwrap();
            assert_eq!(
                seen.last_peer(),
                Some(local),
                "address and port are the pod's own"
            );
        }
    }
    let opened = world.event("opened", |event| match event {
        Event::Opened(attempt) if attempt.source.ip() == pod4(5) => Some(attempt.clone()),
        _ => None,
    });
    assert_eq!(opened.verdict, Verdict::Allowed);
    assert_eq!(opened.claimed.as_deref(), Some("api.payments.example"));
    assert_eq!(opened.name.as_deref(), Some("api.payments.example"));
    assert_eq!(opened.assurance, Some(Assurance::SniDns));
    assert_eq!(opened.rule.unwrap().id, "allow[0]");
    let pod = opened.pod.unwrap();
    assert_eq!(
        pod.identity.as_deref(),
        Some("spiffe://cluster.local/ns/shop/sa/pay")
    );
    let closed = world.event("closed", |event| match event {
        Event::Closed(closed) if closed.connection == opened.connection => Some(closed.clone()),
        _ => None,
    });
    assert!(
        closed.bytes_out > 100_000 && closed.bytes_in > 100_000,
        "{closed:?}"
    );
    assert_eq!(world.unrecorded(), 0);
}

#[test]
fn what_lies_or_says_nothing_is_refused_and_the_attacker_gets_no_byte() {
    let world = world("lie");
    let (web, pod) = (web(), &world.pods[0]);
    let payments = outside::tls(&world.outside, at("203.0.113.66:443"), &web);
    let evil = outside::tls(&world.outside, at("203.0.113.99:443"), &web);
    let evil_port = outside::tls(&world.outside, at("203.0.113.99:8443"), &web);

    let refused = ask(pod, at(DNS), "attacker.example", RecordType::A);
    assert_eq!(refused, Err(ResponseCode::Refused));
    let refused = ask(pod, at(DNS), "c2VjcmV0.attacker.example", RecordType::TXT);
    assert_eq!(refused, Err(ResponseCode::Refused));
    let rebound = ask(pod, at(DNS), "inside.example", RecordType::A);
    assert_eq!(
        rebound,
        Err(ResponseCode::Refused),
        "a public name must not lead inside"
    );

    let own = "api.payments.example";
    assert!(
        tls(pod, at("203.0.113.99:443"), own, true, &web).is_err(),
        "a lying SNI passed"
    );
    world.event("the lie", denied_because("never got 203.0.113.99"));
    assert!(tls(pod, at("203.0.113.99:443"), "attacker.example", true, &web).is_err());
    world.event(
        "the attacker by name",
        denied_because("no rule allows attacker.example"),
    );
    assert!(
        tls(pod, at("203.0.113.66:443"), own, false, &web).is_err(),
        "no SNI passed"
    );
    world.event("no SNI", denied_because("names no host"));
    assert!(tls(pod, at("203.0.113.99:8443"), own, true, &web).is_err());
    assert_eq!(exchange(pod, at("203.0.113.66:443"), b"SSH-2.0-x\r\n"), "");
    world.event("not TLS", |event| {
        denied(event)
            .filter(|attempt| attempt.protocol == Protocol::Tcp)
            .map(drop)
    });
    let http = exchange(
        pod,
        at("203.0.113.66:443"),
        b"GET / HTTP/1.1\r\nhost: a.example\r\n\r\n",
    );
    assert!(http.starts_with("HTTP/1.1 403"), "{http}");

    // The other pod has not asked for the name itself.
    let other = &world.pods[1];
    assert!(tls(other, at("203.0.113.66:443"), own, true, &web).is_err());
    ask(other, at(DNS), own, RecordType::A).unwrap();
    assert!(
        tls(other, at("203.0.113.66:443"), own, true, &web).is_ok(),
        "the rig works"
    );
    assert!(payments.bytes() > 0);
    assert_eq!((evil.bytes(), evil_port.bytes()), (0, 0));
    assert_eq!(world.unrecorded(), 0);
}

#[test]
fn plaintext_http_is_judged_request_by_request() {
    let world = world("http");
    let pod = &world.pods[0];
    ask(pod, at(DNS), "partner.example", RecordType::A).unwrap();
    let to = at("203.0.113.66:80");

    let request = b"GET / HTTP/1.1\r\nHost: partner.example\r\n\r\n";
    let answer = exchange(pod, to, request);
    assert!(
        answer.starts_with("HTTP/1.1 502"),
        "nobody listens yet: {answer}"
    );
    let not_connected = |event: &Event| match event {
        Event::Closed(closed) => (closed.end == End::NotConnected).then_some(closed.bytes_out),
        _ => None,
    };
    assert_eq!(world.event("the refused dial", not_connected), 0);

    let partner = outside::http(&world.outside, to);
    let answer = exchange(
        pod,
        to,
        b"GET /a/../v1?q=1 HTTP/1.1\r\nHost: PARTNER.example.\r\nX-Case: kept\r\n\
          Connection: x-hop\r\nX-Hop: 1\r\n\r\n\
          GET /2 HTTP/1.1\r\nHost: partner.example\r\n\r\n\
          GET /3 HTTP/1.1\r\nHost: attacker.example\r\n\r\n\
          GET /4 HTTP/1.1\r\nHost: partner.example\r\n\r\n",
    );
    assert!(answer.contains("GET /v1?q=1 HTTP/1.1\r\n"), "{answer}");
    let lower = answer.to_ascii_lowercase();
    assert!(lower.contains("host: partner.example\r\n") && answer.contains("X-Case: kept"));
    assert!(!lower.contains("x-hop"), "{answer}");
    assert!(answer.contains("GET /2 HTTP/1.1"), "{answer}");
    assert!(answer.contains("HTTP/1.1 403") && answer.contains("no rule allows attacker.example"));
    assert!(!answer.contains("/3") && !answer.contains("/4"), "{answer}");
    world.event(
        "the pipelined request",
        denied_because("no rule allows attacker.example"),
    );
    let closed = world.event("closed", |event| match event {
        Event::Closed(closed) if closed.requests > 0 => Some(closed.clone()),
        _ => None,
    });
    assert_eq!((closed.requests, closed.end), (2, End::Finished));
    assert_eq!(
        closed.bytes_out,
        partner.bytes(),
        "the kernel's count is the server's"
    );

    assert_eq!(world.unrecorded(), 0);
}

#[test]
fn plaintext_that_two_servers_could_read_in_two_ways_is_not_sent_on() {
    let world = world("ways");
    let pod = &world.pods[0];
    let to = at("203.0.113.66:80");
    let partner = outside::http(&world.outside, to);
    ask(pod, at(DNS), "partner.example", RecordType::A).unwrap();
    let answer = exchange(
        pod,
        to,
        b"GET / HTTP/1.1\r\nHost: partner.example\r\nConnection: close\r\n\r\n",
    );
    assert!(
        answer.starts_with("HTTP/1.1 200"),
        "the rig works: {answer}"
    );
    let before = partner.bytes();
    for (name, request, status) in [
        (
            "smuggling",
            &b"POST / HTTP/1.1\r\nHost: partner.example\r\nContent-Length: 4\r\n\
               Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"[..],
            "HTTP/1.1 400",
        ),
        (
            "two hosts",
            b"GET / HTTP/1.1\r\nHost: partner.example\r\nHost: attacker.example\r\n\r\n",
            "HTTP/1.1 400",
        ),
        (
            "another host in the line",
            b"GET http://attacker.example/ HTTP/1.1\r\nHost: partner.example\r\n\r\n",
            "HTTP/1.1 400",
        ),
        ("bare LF", b"GET / HTTP/1.1\nHost: partner.example\n\n", "HTTP/1.1 400"),
        (
            "CONNECT",
            b"CONNECT attacker.example:443 HTTP/1.1\r\nHost: partner.example\r\n\r\n",
            "HTTP/1.1 403",
        ),
        (
            "upgrade",
            b"GET / HTTP/1.1\r\nHost: partner.example\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
            "HTTP/1.1 403",
        ),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ""),
    ] {
        let answer = exchange(pod, to, request);
        assert!(answer.starts_with(status), "{name}: {answer}");
        assert!(!status.is_empty() || answer.is_empty(), "{name}: {answer}");
    }
    world.event(
        "smuggling",
        denied_because("both Content-Length and Transfer-Encoding"),
    );
    world.event("CONNECT", denied_because("tunnel"));
    assert_eq!(partner.bytes(), before, "none of these was sent on");
    assert_eq!(world.unrecorded(), 0);
}

#[test]
fn a_change_of_policy_or_pod_cuts_what_is_open() {
    let world = world("cut");
    let (web, pod) = (web(), &world.pods[0]);
    outside::tls(&world.outside, at("203.0.113.66:443"), &web);
    outside::greeter(&world.outside, at("203.0.113.10:25"));

    let mut mail = connect(pod, at("203.0.113.10:25")).unwrap();
    let mut greeting = [0; 11];
    mail.read_exact(&mut greeting).unwrap();
    assert_eq!(
        &greeting, b"220 ready\r\n",
        "who speaks first is not waited for"
    );

    let mut stream = tls(
        pod,
        at("203.0.113.66:443"),
        "api.payments.example",
        true,
        &web,
    )
    .unwrap();
    stream.write_all(b"before").unwrap();
    stream.read_exact(&mut [0; 6]).unwrap();
    let mut tightened = policies();
    for egress in &mut tightened {
        egress.policies[0].rules.remove(0);
        egress.policies[0].version = "8".into();
    }
    world.control.set_egress(tightened);
    let result = stream.read(&mut [0; 1]);
    assert!(
        !matches!(result, Ok(1..)),
        "a revoked connection goes on: {result:?}"
    );
    let cut = |event: &Event| match event {
        Event::Closed(closed) if closed.end == End::Revoked => closed.reason.clone(),
        _ => None,
    };
    let reason = world.event("the cut", cut);
    assert!(
        reason.contains("no rule allows api.payments.example"),
        "{reason}"
    );
    mail.write_all(b"still").unwrap();
    mail.read_exact(&mut [0; 5]).unwrap();

    world.control.set_pods(vec![]);
    let result = mail.read(&mut [0; 1]);
    assert!(
        !matches!(result, Ok(1..)),
        "the pod is gone, its connection is not: {result:?}"
    );
    let report = world.report();
    assert!(report.holds(), "{report:?}");
}

#[test]
fn without_the_gate_there_is_no_door_and_the_record_goes_on_after_it() {
    let mut world = world("kill");
    let web = web();
    let payments = outside::tls(&world.outside, at("203.0.113.66:443"), &web);
    let pod = world.pods[0].clone();
    let mut stream = tls(
        &pod,
        at("203.0.113.66:443"),
        "api.payments.example",
        true,
        &web,
    )
    .unwrap();
    stream.write_all(b"before").unwrap();
    stream.read_exact(&mut [0; 6]).unwrap();

    world.kill_gate();
    assert!(!matches!(stream.read(&mut [0; 1]), Ok(1..)));
    let before = payments.bytes();
    assert!(
        connect(&pod, at("203.0.113.66:443")).is_err(),
        "a door without a gate"
    );
    assert_eq!(payments.bytes(), before);

    world.start_gate();
    // The pod keeps the answer it has for its TTL, and so does the gate.
    tls(
        &pod,
        at("203.0.113.66:443"),
        "api.payments.example",
        true,
        &web,
    )
    .unwrap();
    let events = world.events();
    assert_eq!(
        events
            .iter()
            .filter(|e| matches!(e, Event::Restart { .. }))
            .count(),
        2
    );
    assert_eq!(
        events
            .iter()
            .filter(|e| matches!(e, Event::Lost { .. }))
            .count(),
        1
    );
    eventually("it has a certificate to seal with", || {
        world.control.issued.load(SeqCst) == 2 && world.health("/healthz/live").is_some()
    });
    assert!(world.stop_gate(), "SIGTERM ends with status 0");
    let report = world.report();
    assert!(report.holds(), "{:?}", report.problems);
    assert!(
        report.checkpoints > 0 && report.unsealed() == 1,
        "sealed at its end: {report:?}"
    );
    assert_eq!(world.unrecorded(), 0);
}

#[test]
fn what_cannot_be_recorded_does_not_leave() {
    let mut world = world("full");
    let web = web();
    let payments = outside::tls(&world.outside, at("203.0.113.66:443"), &web);
    let partner = outside::http(&world.outside, at("203.0.113.66:80"));
    let pod = world.pods[0].clone();
    assert!(world.stop_gate());
    // Smaller than what is there already.
    world.start_gate_with(&["--spool-max-bytes", "4096"]);
    ask(&pod, at(DNS), "api.payments.example", RecordType::A).unwrap();
    ask(&pod, at(DNS), "partner.example", RecordType::A).unwrap();
    let result = tls(
        &pod,
        at("203.0.113.66:443"),
        "api.payments.example",
        true,
        &web,
    );
    assert!(result.is_err(), "an unrecorded connection passed");
    let request = b"GET / HTTP/1.1\r\nHost: partner.example\r\n\r\n";
    let answer = exchange(&pod, at("203.0.113.66:80"), request);
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("unrecorded"),
        "{answer}"
    );
    assert_eq!((payments.bytes(), partner.bytes()), (0, 0));

    assert!(world.stop_gate());
    world.start_gate();
    ask(&pod, at(DNS), "api.payments.example", RecordType::A).unwrap();
    tls(
        &pod,
        at("203.0.113.66:443"),
        "api.payments.example",
        true,
        &web,
    )
    .unwrap();
    assert!(world.report().holds());
    assert!(
        world.report().noted_gaps > 0,
        "what was not recorded is counted"
    );
}
