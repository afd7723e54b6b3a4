//! A gate that starts: what comes before it knows the pods.

use std::{
    io::{ErrorKind, Read},
    net::TcpStream,
    time::Duration,
};

use hickory_proto::{op::ResponseCode, rr::RecordType};
use turnpike_ledger::{
    Event,
    record::{Lookup, Verdict},
};

use crate::{
    DNS, at, denied, denied_because,
    outside::{self, ask},
    world,
    world::connect,
};

/// Allowed by its address.
const MAIL: &str = "203.0.113.10:25";
const GREETING: &[u8] = b"220 ready\r\n";

/// Whether the connection stands and nothing has come, after a time in which a gate that does not wait
/// would have refused it.
fn waits(stream: &mut TcpStream) -> bool {
    stream
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let nothing = stream.read(&mut [0; 1]);
    nothing.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

fn refused_lookup(event: &Event) -> Option<&Lookup> {
    match event {
        Event::Dns(lookup) => (lookup.verdict == Verdict::Denied).then_some(lookup),
        _ => None,
    }
}

#[test]
fn what_comes_before_the_pods_are_known_waits_and_is_not_refused() {
    let mut world = world("start");
    outside::greeter(&world.outside, at(MAIL));
    assert!(world.stop_gate());
    world.control.set_agent_away(true);
    world.begin_gate(&["--start-seconds", "600"]);
    let before = world.events().len();

    let pod = world.pods[0].clone();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| ask(&pod, at(DNS), "partner.example", RecordType::A));
        let mut stream = connect(&pod, at(MAIL)).unwrap();
        assert!(waits(&mut stream), "refused by a gate that knows no pod");
        world.control.set_agent_away(false);
        let mut greeting = [0; GREETING.len()];
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting, GREETING);
        assert_eq!(asked.join().unwrap().unwrap(), [at("203.0.113.66:0").ip()]);
    });
    world.event("opened", |event| match event {
        Event::Opened(it) => (it.destination == at(MAIL)).then_some(()),
        _ => None,
    });
    let events = world.events().split_off(before);
    let refused = events
        .iter()
        .find(|event| denied(event).is_some() || refused_lookup(event).is_some());
    assert_eq!(refused, None);
    assert_eq!(world.unrecorded(), 0);
}

#[test]
fn who_is_not_known_in_time_is_refused() {
    let mut world = world("patience");
    let mail = outside::greeter(&world.outside, at(MAIL));
    assert!(world.stop_gate());
    world.control.set_agent_away(true);
    world.begin_gate(&["--start-seconds", "1"]);
    let pod = &world.pods[0];
    let mut stream = connect(pod, at(MAIL)).unwrap();
    assert!(!matches!(stream.read(&mut [0; 1]), Ok(1..)));
    world.event("the stranger", denied_because("belongs to no pod known"));
    let refused = ask(pod, at(DNS), "partner.example", RecordType::A);
    assert_eq!(refused, Err(ResponseCode::Refused));
    assert_eq!(mail.last_peer(), None);
}
