//! How connections end: to the last byte on record, and to the last byte delivered.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use hickory_proto::rr::RecordType;
use turnpike_ledger::{
    Event,
    record::{Closed, End},
};

use crate::{
    DNS, at,
    outside::{self, ask},
    world,
    world::{World, connect, eventually, exchange, policies},
};

/// As [`outside`]'s slow readers have it, which Linux doubles.
const RECEIVE_BUFFER: u64 = 8192;
/// The one destination that is allowed by its address, whatever is said.
const MAIL: &str = "203.0.113.10:25";

fn closed(world: &World, to: SocketAddr) -> Closed {
    let connection = world.event("opened", |event| match event {
        Event::Opened(it) if it.destination == to => Some(it.connection.clone()),
        _ => None,
    });
    world.event("closed", |event| match event {
        Event::Closed(it) if it.connection == connection => Some(it.clone()),
        _ => None,
    })
}

/// At the time of the record the destination's host has all of it, and its program but for what waits in
/// a small receive buffer.
fn taken(closed: &Closed, bytes: impl Fn() -> u64) {
    let missing = closed.bytes_out - bytes();
    assert!(
        missing <= RECEIVE_BUFFER,
        "{missing} bytes are on their way"
    );
    eventually("all of it is read", || bytes() == closed.bytes_out);
}

#[test]
fn what_the_destination_has_yet_to_take_is_on_record_before_the_end() {
    const SIZE: usize = 1 << 20;
    let world = world("drain");
    let free = Arc::new(AtomicBool::new(true));
    let mail = outside::slow_reader(&world.outside, at(MAIL), 0, &free);
    let mut stream = connect(&world.pods[0], at(MAIL)).unwrap();
    stream.write_all(&vec![b'x'; SIZE]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    let closed = closed(&world, at(MAIL));
    assert_eq!((closed.bytes_out, closed.end), (SIZE as u64, End::Finished));
    taken(&closed, || mail.bytes());
}

#[test]
fn revocation_reaches_what_the_destination_has_yet_to_take() {
    const SIZE: usize = 40_000;
    let world = world("late");
    let free = Arc::new(AtomicBool::new(false));
    let mail = outside::slow_reader(&world.outside, at(MAIL), 1, &free);
    let mut stream = connect(&world.pods[0], at(MAIL)).unwrap();
    stream.write_all(&vec![b'x'; SIZE]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    // For the gate to have taken all of it.
    std::thread::sleep(Duration::from_millis(300));
    let mut tightened = policies();
    for egress in &mut tightened {
        egress.policies[0]
            .rules
            .retain(|rule| &*rule.id != "allow[2]");
    }
    world.control.set_egress(tightened);
    let closed = closed(&world, at(MAIL));
    free.store(true, SeqCst);
    assert_eq!(closed.end, End::Revoked, "{closed:?}");
    assert!(closed.bytes_out < SIZE as u64, "{closed:?}");
    std::thread::sleep(Duration::from_millis(300));
    assert!(mail.bytes() <= closed.bytes_out, "{}", mail.bytes());
}

#[test]
fn an_answer_that_comes_before_the_end_of_the_question_is_delivered() {
    let world = world("early");
    outside::refuser(&world.outside, at(MAIL));
    for turn in 0..20 {
        let mut stream = connect(&world.pods[0], at(MAIL)).unwrap();
        // The pod notices only when it has written all that it can.
        let _ = stream.write_all(&vec![b'x'; 1 << 20]);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, outside::REFUSAL, "turn {turn}");
    }
}

#[test]
fn a_request_that_is_revoked_during_its_dial_has_its_end_on_record() {
    let world = world("hole");
    let pod = &world.pods[0];
    ask(pod, at(DNS), "partner.example", RecordType::A).unwrap();
    // Nothing answers, not even a refusal.
    world.outside.sh("nft 'add table inet hole; \
         add chain inet hole in { type filter hook input priority 0; }; \
         add rule inet hole in tcp dport 80 drop'");
    let mut stream = connect(pod, at("203.0.113.66:80")).unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: partner.example\r\n\r\n")
        .unwrap();
    world.event("opened", |event| match event {
        Event::Opened(it) => (it.destination == at("203.0.113.66:80")).then_some(()),
        _ => None,
    });
    let mut tightened = policies();
    for egress in &mut tightened {
        egress.policies[0]
            .rules
            .retain(|rule| &*rule.id != "allow[1]");
    }
    world.control.set_egress(tightened);
    let closed = closed(&world, at("203.0.113.66:80"));
    assert_eq!((closed.end, closed.bytes_out), (End::NotConnected, 0));
}

#[test]
fn what_a_server_has_yet_to_take_of_a_request_is_on_record_before_the_end() {
    const SIZE: usize = 300_000;
    let world = world("body");
    let pod = &world.pods[0];
    ask(pod, at(DNS), "partner.example", RecordType::A).unwrap();
    let to = at("203.0.113.66:80");
    let partner = outside::hasty(&world.outside, to);
    let mut stream = connect(pod, to).unwrap();
    let head =
        format!("POST / HTTP/1.1\r\nHost: partner.example\r\nContent-Length: {SIZE}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&vec![b'x'; SIZE]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    let closed = closed(&world, to);
    assert!(closed.bytes_out > SIZE as u64, "{closed:?}");
    taken(&closed, || partner.bytes());
}

#[test]
fn a_server_that_closes_an_idle_connection_just_then_is_asked_on_another() {
    let world = world("alive");
    let pod = &world.pods[0];
    ask(pod, at(DNS), "partner.example", RecordType::A).unwrap();
    let to = at("203.0.113.66:80");
    outside::once(&world.outside, to);
    let request = b"GET / HTTP/1.1\r\nHost: partner.example\r\n\r\n".repeat(30);
    let last = b"GET / HTTP/1.1\r\nHost: partner.example\r\nConnection: close\r\n\r\n";
    let answer = exchange(pod, to, &[&request, &last[..]].concat());
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 31, "{answer}");
}
