//! Pods get a network, lose it, and nothing is left.

mod rig;

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use rig::{NODE, Namespace, World, pod4, pod6};

const PATIENCE: Duration = Duration::from_secs(3);

/// Says hello to whoever connects, and whom it saw.
fn greet(namespace: &Namespace, at: SocketAddr) {
    let listener = namespace.run(move || TcpListener::bind(at).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = write!(stream, "{}", stream.peer_addr().unwrap().ip());
        }
    });
}

fn ask(namespace: &Namespace, at: SocketAddr) -> std::io::Result<String> {
    namespace.run(move || {
        let mut stream = TcpStream::connect_timeout(&at, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
}

#[test]
fn pods_reach_each_other_the_node_and_the_outside_with_their_own_addresses() {
    let world = World::new("reach");
    let datapath = world.open();
    let (one, two) = (world.pod(5), world.pod(6));
    let applied = [&one, &two].map(|pod| pod.apply(&world, &datapath));

    for pod in [&one, &two] {
        let any: IpAddr = "::".parse().unwrap();
        greet(&pod.netns, (any, 80).into());
    }
    greet(&world.node, (NODE, 80).into());
    greet(
        &world.outside,
        ("203.0.113.66".parse::<IpAddr>().unwrap(), 80).into(),
    );
    greet(
        &world.outside,
        ("2001:db8::66".parse::<IpAddr>().unwrap(), 80).into(),
    );

    let calls: [(&Namespace, IpAddr, IpAddr); 9] = [
        (&one.netns, pod4(6).into(), pod4(5).into()),
        (&two.netns, pod4(5).into(), pod4(6).into()),
        (&one.netns, pod6(6).into(), pod6(5).into()),
        (&two.netns, pod6(5).into(), pod6(6).into()),
        (&one.netns, NODE.into(), pod4(5).into()),
        (&world.node, pod4(6).into(), NODE.into()),
        (&one.netns, "203.0.113.66".parse().unwrap(), pod4(5).into()),
        (&two.netns, "203.0.113.66".parse().unwrap(), pod4(6).into()),
        (&two.netns, "2001:db8::66".parse().unwrap(), pod6(6).into()),
    ];
    for (from, to, seen) in calls {
        let text = ask(from, (to, 80).into()).unwrap_or_else(|error| panic!("{to}: {error}"));
        let text = text.strip_prefix("::ffff:").unwrap_or(&text);
        assert_eq!(text.parse::<IpAddr>().unwrap(), seen, "to {to}");
    }
    for (pod, applied) in [&one, &two].into_iter().zip(&applied) {
        let differences = world.wait(datapath.check(&pod.plan, applied)).unwrap();
        assert_eq!(differences, Vec::<String>::new());
    }
    let spoofed = world.wait(datapath.counts()).unwrap().spoofed;
    assert_eq!(spoofed.packets, 0, "an honest pod counts as spoofing");
}
