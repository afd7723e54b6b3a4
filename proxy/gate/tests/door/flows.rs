//! Many connections, and the same one again.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use hickory_proto::rr::RecordType;
use socket2::{Domain, Socket, Type};
use turnpike_ledger::Event;

use crate::{
    DNS, at,
    namespace::Namespace,
    outside::{self, ask},
    web, world,
    world::{connect, eventually, pod4, tls},
};

#[test]
fn many_connections_at_once_all_pass_and_all_are_on_record() {
    const EACH: usize = 25;
    let world = world("many");
    let web = web();
    let payments = outside::tls(&world.outside, at("203.0.113.66:443"), &web);
    for pod in &world.pods {
        ask(pod, at(DNS), "api.payments.example", RecordType::A).unwrap();
    }
    std::thread::scope(|scope| {
        for n in 0..8 {
            let (pod, web) = (&world.pods[n % 2], &web);
            scope.spawn(move || {
                for _ in 0..EACH {
                    let to = at("203.0.113.66:443");
                    let mut stream = tls(pod, to, "api.payments.example", true, web).unwrap();
                    stream.write_all(b"ping").unwrap();
                    let mut pong = [0; 4];
                    stream.read_exact(&mut pong).unwrap();
                    assert_eq!(&pong, b"ping");
                }
            });
        }
    });
    let closed = |event: &Event| match event {
        Event::Closed(closed) => Some((closed.bytes_out, closed.end)),
        _ => None,
    };
    eventually("all are closed on record", || {
        world.events().iter().filter_map(closed).count() == 8 * EACH
    });
    let sent: u64 = world
        .events()
        .iter()
        .filter_map(closed)
        .map(|(out, _)| out)
        .sum();
    assert_eq!(sent, payments.bytes(), "the record's sum is what arrived");
    assert!(world.report().holds());
    assert_eq!(world.unrecorded(), 0);
}

/// Whoever closes first keeps the connection for a minute, lest late segments meet a new one. Here that is
/// the gate: the pod's kernel knows nothing of it, and may use the port again for the same server.
#[test]
fn a_port_used_again_is_connected_at_the_first_attempt() {
    let world = world("again");
    let pod = &world.pods[0];
    let to = at("203.0.113.66:80");
    outside::http(&world.outside, to);
    ask(pod, at(DNS), "partner.example", RecordType::A).unwrap();
    let own = SocketAddr::new(pod4(5), 40_000);
    for turn in 0..5 {
        let before = sent_again(pod);
        let mut stream = pod.run(|| connect_from(own, to));
        assert_eq!(sent_again(pod), before, "turn {turn}: of the SYN");
        let request = b"GET / HTTP/1.1\r\nHost: partner.example\r\nConnection: close\r\n\r\n";
        stream.write_all(request).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "turn {turn}: {answer}");
    }
    assert_eq!(world.unrecorded(), 0);
}

#[test]
fn connections_that_ask_nothing_leave_room_for_questions() {
    let world = world("idle");
    let pod = &world.pods[0];
    let held: Vec<_> = (0..80).map(|_| connect(pod, at(DNS)).unwrap()).collect();
    let mut last = &held[79];
    // More than it may have: closed at once.
    assert_eq!(last.read(&mut [0; 1]).unwrap(), 0);
    ask(pod, at(DNS), "partner.example", RecordType::A).unwrap();
}

fn connect_from(own: SocketAddr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&own.into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// Segments that the namespace's kernel had to send once more.
fn sent_again(pod: &Namespace) -> u64 {
    let table = pod.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut rows = table.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let names = rows.next().unwrap().split(' ');
    let mut columns = names.zip(rows.next().unwrap().split(' '));
    let (_, count) = columns.find(|(name, _)| *name == "RetransSegs").unwrap();
    count.parse().unwrap()
}
