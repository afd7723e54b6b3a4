//! The EC2 API and instance metadata as a client meets them. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{io::Write, net::SocketAddr};

use turnpike_vpc::netns::Command;

use common::{
    Vpc, connect,
    ec2::{Client, Metadata},
    eventually, http,
};

#[test]
fn a_request_is_signed_with_what_metadata_gave_or_refused() {
    let vpc = Vpc::start("signed");
    let client = Client::new(&vpc, "node-a");
    let unsigned = client.send("", "DescribeSubnets", &[]);
    assert_eq!(
        (unsigned.status, unsigned.code()),
        (403, "UnauthorizedOperation".into())
    );
    let foreign = client.signed_by("AKIAIOSFODNN7EXAMPLE", "t", "DescribeSubnets", &[]);
    assert_eq!(foreign.code(), "UnauthorizedOperation");
    let tokenless = client.send(
        "Authorization: AWS4-HMAC-SHA256 x\r\n",
        "DescribeSubnets",
        &[],
    );
    assert_eq!(tokenless.code(), "UnauthorizedOperation");
    assert_eq!(
        client
            .call("DescribeSubnets", &[])
            .ok()
            .all("subnetId")
            .len(),
        2
    );
    assert_eq!(
        client.call("TerminateInstances", &[]).code(),
        "InvalidAction"
    );
}

#[test]
fn the_world_is_described() {
    let vpc = Vpc::start("described");
    let client = Client::new(&vpc, "node-a");
    let node = vpc.instance("node-a");
    let instances = client
        .call("DescribeInstances", &[("InstanceId.1", &node.id)])
        .ok();
    assert_eq!(instances.get("instanceType").unwrap(), "m5.large");
    assert_eq!(instances.get("availabilityZone").unwrap(), "eu-west-1a");
    assert_eq!(
        instances.all("privateIpAddress")[0],
        node.address.to_string()
    );
    let types = client
        .call("DescribeInstanceTypes", &[("InstanceType.1", "t3.medium")])
        .ok();
    assert_eq!(types.get("maximumNetworkInterfaces").unwrap(), "3");
    assert_eq!(types.get("ipv4AddressesPerInterface").unwrap(), "6");
    let subnet = |client: &Client| {
        let answer = client
            .call("DescribeSubnets", &[("SubnetId.1", "subnet-0a")])
            .ok();
        answer
            .get("availableIpAddressCount")
            .unwrap()
            .parse::<u32>()
            .unwrap()
    };
    let before = subnet(&client);
    client.create(&[("SubnetId", "subnet-0a"), ("Ipv4PrefixCount", "2")]);
    assert_eq!(subnet(&client), before - 1 - 32);
    assert_eq!(
        client
            .call("DescribeNetworkInterfaces", &[("Filter.1.Name", "colour")])
            .code(),
        "InvalidParameterValue"
    );
    let missing = client.interface("eni-0123456789abcdef0");
    assert_eq!(missing.code(), "InvalidNetworkInterfaceID.NotFound");
    assert!(
        missing
            .get("Message")
            .unwrap()
            .contains("'eni-0123456789abcdef0'")
    );
}

#[test]
fn limits_and_states_are_ec2s() {
    let vpc = Vpc::start("limits");
    let client = Client::new(&vpc, "node-b");
    let node = vpc.instance("node-b").id.clone();
    let eni = client.primary(&node);
    let over = [
        ("NetworkInterfaceId", eni.as_str()),
        ("SecondaryPrivateIpAddressCount", "6"),
    ];
    assert_eq!(
        client.call("AssignPrivateIpAddresses", &over).code(),
        "PrivateIpAddressLimitExceeded"
    );
    assert_eq!(client.assign(&eni, 5).len(), 5);

    let mut attached = Vec::new();
    for device in ["1", "2", "3"] {
        let id = client.create(&[("SubnetId", "subnet-0b")]);
        let params = [
            ("NetworkInterfaceId", id.as_str()),
            ("InstanceId", &node),
            ("DeviceIndex", device),
        ];
        let answer = client.call("AttachNetworkInterface", &params);
        if device == "3" {
            assert_eq!(answer.code(), "AttachmentLimitExceeded");
            let message = answer.get("Message").unwrap();
            assert_eq!(message, "Interface count 4 exceeds the limit for t3.medium");
        } else {
            attached.push((id, answer.ok().get("attachmentId").unwrap()));
        }
    }
    let (id, attachment) = &attached[0];
    client.settled(id, "attached");
    let delete = [("NetworkInterfaceId", id.as_str())];
    assert_eq!(
        client.call("DeleteNetworkInterface", &delete).code(),
        "InvalidNetworkInterface.InUse"
    );
    let keep = [
        ("NetworkInterfaceId", id.as_str()),
        ("Attachment.AttachmentId", attachment),
        ("Attachment.DeleteOnTermination", "true"),
    ];
    assert_eq!(
        client.interface(id).get("deleteOnTermination").unwrap(),
        "false"
    );
    client.call("ModifyNetworkInterfaceAttribute", &keep).ok();
    assert_eq!(
        client.interface(id).get("deleteOnTermination").unwrap(),
        "true"
    );
    client
        .call("DetachNetworkInterface", &[("AttachmentId", attachment)])
        .ok();
    client.settled(id, "available");
    client.call("DeleteNetworkInterface", &delete).ok();
    let primary = client.interface(&eni).get("attachmentId").unwrap();
    let detach = client.call("DetachNetworkInterface", &[("AttachmentId", &primary)]);
    assert_eq!(detach.code(), "OperationNotPermitted");
}

#[test]
fn creation_is_idempotent_tagged_and_rehearsed() {
    let vpc = Vpc::start("create");
    let client = Client::new(&vpc, "node-a");
    let params = [
        ("SubnetId", "subnet-0a"),
        ("Description", "aws-K8S-<node>&co"),
        ("ClientToken", "7b1e"),
        ("TagSpecification.1.ResourceType", "network-interface"),
        (
            "TagSpecification.1.Tag.1.Key",
            "cluster.k8s.amazonaws.com/name",
        ),
        ("TagSpecification.1.Tag.1.Value", "box"),
    ];
    let dry = client.call(
        "CreateNetworkInterface",
        &[&params[..], &[("DryRun", "true")]].concat(),
    );
    assert_eq!(dry.code(), "DryRunOperation");
    let id = client.create(&params);
    assert_eq!(client.create(&params), id);
    let found = client.call(
        "DescribeNetworkInterfaces",
        &[
            ("Filter.1.Name", "tag:cluster.k8s.amazonaws.com/name"),
            ("Filter.1.Value.1", "box"),
            ("Filter.2.Name", "description"),
            ("Filter.2.Value.1", "aws-K8S-*"),
        ],
    );
    assert_eq!(found.ok().all("networkInterfaceId").concat(), id);
    assert_eq!(
        client.interface(&id).get("description").unwrap(),
        "aws-K8S-&lt;node&gt;&amp;co"
    );
    let tag = [
        ("ResourceId.1", id.as_str()),
        ("Tag.1.Key", "owner"),
        ("Tag.1.Value", "node-a"),
    ];
    client.call("CreateTags", &tag).ok();
    assert!(client.interface(&id).all("key").contains(&"owner".into()));
    for (params, code) in [
        (vec![("SubnetId", "subnet-9")], "InvalidSubnetID.NotFound"),
        (
            vec![("SubnetId", "subnet-0a"), ("SecurityGroupId.1", "sg-9")],
            "InvalidSecurityGroupID.NotFound",
        ),
        (
            vec![("SubnetId", "subnet-0a"), ("PrivateIpAddress", "10.0.0.1")],
            "InvalidParameterValue",
        ),
        (
            vec![("SubnetId", "subnet-0a"), ("PrivateIpAddress", "10.0.0.10")],
            "InvalidIPAddress.InUse",
        ),
        (
            vec![
                ("SubnetId", "subnet-0a"),
                ("SecondaryPrivateIpAddressCount", "-1"),
            ],
            "InvalidParameterValue",
        ),
        (vec![], "MissingParameter"),
    ] {
        assert_eq!(
            client.call("CreateNetworkInterface", &params).code(),
            code,
            "{params:?}"
        );
    }
}

#[test]
fn pages_follow_each_other() {
    let vpc = Vpc::start("pages");
    let client = Client::new(&vpc, "control");
    for _ in 0..9 {
        client
            .call("CreateNetworkInterface", &[("SubnetId", "subnet-0a")])
            .ok();
    }
    let (mut seen, mut token) = (Vec::new(), None::<String>);
    loop {
        let mut params = vec![("MaxResults", "5")];
        params.extend(token.as_deref().map(|token| ("NextToken", token)));
        let answer = client.call("DescribeNetworkInterfaces", &params).ok();
        let ids = answer.all("networkInterfaceId");
        assert!(ids.len() <= 5);
        seen.extend(ids);
        token = answer.get("nextToken");
        if token.is_none() {
            break;
        }
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 12);
    let both = [
        ("MaxResults", "5"),
        ("NetworkInterfaceId.1", seen[0].as_str()),
    ];
    assert_eq!(
        client.call("DescribeNetworkInterfaces", &both).code(),
        "InvalidParameterCombination"
    );
    let forged = client.call("DescribeNetworkInterfaces", &[("NextToken", "%%%")]);
    assert_eq!(forged.code(), "InvalidParameterValue");
}

#[test]
fn too_many_calls_are_throttled_each_action_for_itself() {
    let faults = "\nfaults:\n  throttle: {describeBurst: 20, describePerSecond: 0, mutateBurst: 3, mutatePerSecond: 0}\n";
    let vpc = Vpc::with_spec(
        "throttle",
        &(turnpike_vpc::spec::DEFAULT.to_owned() + faults),
    );
    let client = Client::new(&vpc, "node-a");
    for _ in 0..20 {
        client.call("DescribeSubnets", &[]).ok();
    }
    let over = client.call("DescribeSubnets", &[]);
    assert_eq!(
        (over.status, over.code()),
        (503, "RequestLimitExceeded".into())
    );
    for _ in 0..3 {
        client
            .call("CreateNetworkInterface", &[("SubnetId", "subnet-0a")])
            .ok();
    }
    let over = client.call("CreateNetworkInterface", &[("SubnetId", "subnet-0a")]);
    assert_eq!(over.status, 503);
    client.call("DescribeInstances", &[]).ok();
}

#[test]
fn describes_and_metadata_lag_behind_and_calls_fail_on_request() {
    // Longer than this test takes: what was before the box began to change is all there is.
    let faults = "\nfaults: {describeLag: {minMs: 600000, maxMs: 600000}, metadataLag: {minMs: 600000, maxMs: 600000}}\n";
    let vpc = Vpc::with_spec("lag", &(turnpike_vpc::spec::DEFAULT.to_owned() + faults));
    let client = Client::new(&vpc, "node-a");
    let made = client
        .call("CreateNetworkInterface", &[("SubnetId", "subnet-0a")])
        .ok();
    let id = made.get("networkInterfaceId").unwrap();
    assert_eq!(
        client.interface(&id).code(),
        "InvalidNetworkInterfaceID.NotFound"
    );
    let eni = client.primary(&vpc.instance("node-a").id);
    let given = client.assign(&eni, 2);
    let metadata = Metadata::new(vpc.namespace("node-a"));
    let mac = metadata.get("meta-data/mac").unwrap();
    let path = format!("meta-data/network/interfaces/macs/{mac}/local-ipv4s");
    assert_eq!(
        metadata.get(&path).unwrap(),
        vpc.instance("node-a").address.to_string()
    );
    // The fabric does not lag.
    assert_eq!(given.len(), 2);

    let failing = turnpike_vpc::spec::DEFAULT.to_owned() + "\nfaults: {failures: 1.0}\n";
    let vpc = Vpc::with_spec("failing", &failing);
    let answer = Client::new(&vpc, "node-a").call("DescribeSubnets", &[]);
    assert_eq!(
        (answer.status, answer.code()),
        (500, "InternalError".into())
    );
}

#[test]
fn metadata_needs_a_token_and_shows_what_exists() {
    let vpc = Vpc::start("metadata");
    let node = vpc.instance("node-a");
    let metadata = Metadata::new(vpc.namespace("node-a"));
    let bare = metadata
        .request("GET", "meta-data/instance-id", "")
        .unwrap();
    assert_eq!(bare.0, 401);
    let forged = "X-aws-ec2-metadata-token: AQAEAAAA==\r\n";
    assert_eq!(
        metadata
            .request("GET", "meta-data/instance-id", forged)
            .unwrap()
            .0,
        401
    );
    // A token of another instance is none here.
    let (_, other) = Metadata::new(vpc.namespace("node-b")).token("60");
    let other = format!("X-aws-ec2-metadata-token: {other}\r\n");
    assert_eq!(
        metadata
            .request("GET", "meta-data/instance-id", &other)
            .unwrap()
            .0,
        401
    );
    for ttl in ["0", "21601", "soon", ""] {
        assert_eq!(metadata.token(ttl).0, 400, "{ttl:?}");
    }
    assert_eq!(metadata.request("PUT", "api/token", "").unwrap().0, 400);
    let proxied = "X-aws-ec2-metadata-token-ttl-seconds: 60\r\nX-Forwarded-For: 10.0.0.9\r\n";
    assert_eq!(
        metadata.request("PUT", "api/token", proxied).unwrap().0,
        403
    );
    assert_eq!(metadata.request("DELETE", "api/token", "").unwrap().0, 405);

    let get = |path: &str| metadata.get(&format!("meta-data/{path}"));
    assert_eq!(get("instance-id").unwrap(), node.id);
    assert_eq!(get("local-ipv4").unwrap(), node.address.to_string());
    assert_eq!(get("placement/region").unwrap(), "eu-west-1");
    let mac = get("mac").unwrap();
    assert_eq!(get("network/interfaces/macs/").unwrap(), format!("{mac}/"));
    let of = |key: &str| get(&format!("network/interfaces/macs/{mac}/{key}"));
    assert_eq!(of("device-number").unwrap(), "0");
    assert_eq!(of("subnet-ipv4-cidr-block").unwrap(), "10.0.0.0/18");
    assert_eq!(of("vpc-ipv4-cidr-blocks").unwrap(), "10.0.0.0/16");
    assert_eq!(of("security-group-ids").unwrap(), "sg-0default");
    assert_eq!(of("ipv4-prefix"), None);
    assert_eq!(get("no/such/key"), None);
    let document = metadata.get("dynamic/instance-identity/document").unwrap();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["instanceType"], "m5.large");

    // It follows the API, primary first.
    let client = Client::new(&vpc, "node-a");
    let given = client.assign(&client.primary(&node.id), 2);
    let expected = format!("{}\n{}", node.address, given.join("\n"));
    assert_eq!(of("local-ipv4s").unwrap(), expected);
    let id = client.create(&[("SubnetId", "subnet-0a"), ("Ipv4PrefixCount", "1")]);
    let attach = [
        ("NetworkInterfaceId", id.as_str()),
        ("InstanceId", &node.id),
        ("DeviceIndex", "2"),
    ];
    client.call("AttachNetworkInterface", &attach).ok();
    let mac = client.settled(&id, "attached").get("macAddress").unwrap();
    let at = |key: &str| get(&format!("network/interfaces/macs/{mac}/{key}"));
    assert_eq!(at("device-number").unwrap(), "2");
    assert!(at("ipv4-prefix").unwrap().ends_with("/28"));
}

#[test]
fn bad_requests_are_bounded_and_neighbours_unaffected() {
    let vpc = Vpc::start("bad");
    let client = Client::new(&vpc, "node-a");
    let node = vpc.namespace("node-a");
    let api: SocketAddr = vpc
        .ready
        .ec2
        .strip_prefix("http://")
        .unwrap()
        .parse()
        .unwrap();
    let mut open = Vec::new();
    for garbage in [
        &b"\0\0\0\0"[..],
        &[0xff; 9000],
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HT",
    ] {
        let mut stream = connect(&node, None, api).unwrap();
        stream.write_all(garbage).unwrap();
        open.push(stream);
    }
    let large = format!(
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        5 << 20
    );
    let body = "a".repeat(5 << 20);
    // Refused with 413, or cut off while it still sends.
    if let Ok((status, _)) = http(&node, api, &(large + &body)) {
        assert_eq!(status, 413);
    }
    let delete = "DELETE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    assert_eq!(http(&node, api, delete).unwrap().0, 405);
    client.call("DescribeSubnets", &[]).ok();
}

#[test]
fn callers_that_go_away_leave_world_and_fabric_agreed() {
    let vpc = Vpc::start("away");
    let client = Client::new(&vpc, "node-a");
    let eni = client.primary(&vpc.instance("node-a").id);
    for _ in 0..10 {
        let params = [
            ("NetworkInterfaceId", eni.as_str()),
            ("SecondaryPrivateIpAddressCount", "1"),
        ];
        client.call_and_leave("AssignPrivateIpAddresses", &params);
        let params = [("SubnetId", "subnet-0a")];
        client.call_and_leave("CreateNetworkInterface", &params);
    }
    // Changes are carried out one after another: this one is the last.
    let last = client.create(&[("SubnetId", "subnet-0a")]);
    client
        .call("DeleteNetworkInterface", &[("NetworkInterfaceId", &last)])
        .ok();
    let mut described = client.interface(&eni).all("privateIpAddress");
    described.sort();
    described.dedup();
    let router = vpc.router();
    let listed = eventually("a listing", || {
        let list = Command::new("nft").args(["list", "set", "inet", "vpc", "owned4"]);
        let output = list.output(&router).unwrap();
        output
            .status
            .success()
            .then(|| String::from_utf8(output.stdout).unwrap())
    });
    let mut carried: Vec<String> = listed
        .split("\"eni")
        .skip(1)
        .filter_map(|element| element.split(" . ").nth(1)?.split([',', ' ', '}']).next())
        .map(String::from)
        .collect();
    let others = ["control", "node-b"].map(|name| vpc.instance(name).address.to_string());
    carried.retain(|address| !others.contains(address));
    carried.sort();
    assert_eq!(carried, described);
}
