//! What is sent to a pod's port that is neither good HTTP nor good TLS, or too slowly.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use turnpike_rig::{World, http, wait_for};

use super::{SOON, served, world};

/// Callers that never finish their request.
const SLOW: usize = 40;
/// The sidecar waits ten seconds for a head.
const CUT: Duration = Duration::from_secs(20);

/// What is sent, and whether the sidecar can judge it: what is no HTTP goes on as the bytes it is.
type Case = (&'static str, Vec<u8>, bool);

fn cases() -> [Case; 8] {
    let line = |head: &str| format!("{head}\r\n\r\n").into_bytes();
    let huge = format!(
        "GET / HTTP/1.1\r\nHost: w\r\nX-Big: {}",
        "a".repeat(512 * 1024)
    );
    // None of them too long, all of them too much.
    let fields: String = (0..20)
        .map(|n| format!("\r\nX-{n}: {}", "a".repeat(6 * 1024)))
        .collect();
    let long = format!("GET /bad HTTP/1.1\r\nHost: w{fields}");
    [
        (
            "smuggling",
            line(
                "POST /bad HTTP/1.1\r\nHost: w\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0",
            ),
            true,
        ),
        ("huge header", line(&huge), true),
        ("huge head", line(&long), true),
        (
            "two Hosts",
            line("GET /bad HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close"),
            true,
        ),
        (
            "space before colon",
            line("GET /bad HTTP/1.1\r\nHost : a\r\nConnection: close"),
            true,
        ),
        (
            "CONNECT without authority",
            line("CONNECT /bad HTTP/1.1\r\nHost: a\r\nConnection: close"),
            true,
        ),
        (
            "TLS garbage",
            [&[0x16, 3, 1, 0xff, 0xff][..], &[0xff; 300]].concat(),
            false,
        ),
        ("zeros", vec![0; 4096], false),
    ]
}

#[test]
fn garbage_on_the_wire_is_closed_counted_and_neighbours_are_served() {
    let world = world("bad-wire");
    let web = world.pod("shop", "web-1").unwrap();
    let process = web.sidecar.as_ref().unwrap().pid();
    let target = SocketAddr::new(web.address, 8080);
    let caller = &world.pod("legacy", "caller").unwrap().namespace;
    for (name, bytes, judged) in cases() {
        let before = malformed(&world);
        // Refused by a 4xx answer or by closing; never answered 200.
        if let Ok(response) = http::exchange(caller, target, &bytes) {
            assert!(
                (400..500).contains(&response.status),
                "{name}: {}",
                response.status
            );
        }
        // It counts when the connection has ended, a little after the answer.
        let counted = || malformed(&world) - before;
        wait_for(SOON, || (counted() == u64::from(judged)).then_some(()));
        assert_eq!(counted(), u64::from(judged), "{name}");
        assert!(served(&world), "after {name}");
    }
    let seen = std::fs::read_to_string(web.scratch().join("access.log")).unwrap();
    assert!(!seen.contains("/bad"), "passed on to nginx: {seen}");

    let before = slow(&world);
    let held = slow_peers(&world, target);
    let begun = Instant::now();
    for _ in 0..5 {
        assert!(
            served(&world),
            "neighbours are not served beside slow peers"
        );
    }
    for stream in held {
        assert!(is_cut(stream, begun), "a slow peer is still held");
    }
    let counted = || slow(&world) - before;
    wait_for(SOON, || (counted() == SLOW as u64).then_some(()));
    assert_eq!(counted(), SLOW as u64);
    let sidecar = web.sidecar.as_ref().unwrap();
    assert_eq!(sidecar.pid(), process);
    assert!(sidecar.log().lines().all(|line| !line.contains("panicked")));
}

/// What the sidecar has refused as malformed: before it was a request, or as one, answered 400.
fn malformed(world: &World) -> u64 {
    let refused = count(world, &["turnpike_refused_total{", "reason=\"malformed\""]);
    refused + count(world, &["istio_requests_total{", "response_flags=\"DPE\""])
}

fn slow(world: &World) -> u64 {
    count(world, &["turnpike_refused_total{", "reason=\"slow\""])
}

/// The sum of the series of nginx's sidecar that have all these words.
fn count(world: &World, words: &[&str]) -> u64 {
    let metrics = world.pod("shop", "web-1").unwrap().metrics().unwrap();
    let series = metrics
        .lines()
        .filter(|line| words.iter().all(|word| line.contains(word)));
    let value = |line: &str| {
        line.rsplit(' ')
            .next()
            .and_then(|value| value.parse::<u64>().ok())
    };
    series.map(|line| value(line).unwrap()).sum()
}

fn slow_peers(world: &World, target: SocketAddr) -> Vec<TcpStream> {
    let caller = &world.pod("legacy", "caller").unwrap().namespace;
    let open = || -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect(target)?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: w\r\nX-Slow: ")?;
        Ok(stream)
    };
    let held = caller.run(|| (0..SLOW).map(|_| open()).collect::<Result<_, _>>());
    held.unwrap().unwrap()
}

/// Whether the peer ends the connection in time, be it after an answer.
fn is_cut(mut stream: TcpStream, since: Instant) -> bool {
    let left = CUT.saturating_sub(since.elapsed());
    stream
        .set_read_timeout(Some(left.max(Duration::from_millis(1))))
        .unwrap();
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}
