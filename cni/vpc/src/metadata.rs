//! The instance metadata service, version 2: a token first, then a tree of text.
//!
//! Which instance asks is told by the packet's source, which the fabric has checked. The answers'
//! hop limit is set by the router, so that an answer reaches a node and no pod behind it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, Method, Request, Response};
use hyper::body::Incoming;
use parking_lot::Mutex;
use serde_json::json;
use time::format_description::well_known::Rfc3339;

use crate::{
    cloud::Cloud,
    http::{Body, respond},
    world::{Instance, InstanceId, Interface, Now, World},
};

/// The one role of every instance.
pub(crate) const ROLE: &str = "turnpike-node";

const MAX_TTL: u32 = 21_600;
/// Tokens of one instance that are good at a time; the oldest goes first.
const MAX_TOKENS: usize = 1_000;

#[derive(Debug)]
pub(crate) struct Metadata {
    cloud: Arc<Cloud>,
    tokens: Mutex<BTreeMap<InstanceId, Vec<(String, Now)>>>,
}

impl Metadata {
    pub(crate) fn new(cloud: Arc<Cloud>) -> Self {
        Self {
            cloud,
            tokens: Mutex::default(),
        }
    }

    pub(crate) fn answer(&self, peer: SocketAddr, request: &Request<Incoming>) -> Response<Body> {
        let IpAddr::V4(source) = peer.ip() else {
            return text(403, "ask from an instance");
        };
        // Who asks is a fact of the fabric; only what is told may lag.
        let current = self.cloud.current();
        let Some(instance) = current.instance_of_address(source) else {
            return text(403, "ask from an instance");
        };
        let path = request.uri().path();
        match *request.method() {
            Method::PUT if path == "/latest/api/token" => {
                self.give_token(instance, request.headers())
            }
            Method::GET | Method::HEAD => self.tell(instance, path, request.headers()),
            _ => text(405, "Method Not Allowed"),
        }
    }

    fn give_token(&self, instance: &Instance, headers: &HeaderMap) -> Response<Body> {
        // A proxy's request may stem from anywhere.
        if headers.contains_key("x-forwarded-for") {
            return text(403, "Forbidden");
        }
        const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
        let ttl = headers
            .get(TTL)
            .and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
        let Some(ttl) = ttl.filter(|ttl| (1..=MAX_TTL).contains(ttl)) else {
            return text(400, "Bad Request");
        };
        let token = format!("AQAE{}==", uuid::Uuid::new_v4().simple());
        let now = self.cloud.now();
        let mut all = self.tokens.lock();
        let tokens = all.entry(instance.id.clone()).or_default();
        tokens.retain(|(_, end)| *end > now);
        if tokens.len() >= MAX_TOKENS {
            tokens.remove(0);
        }
        tokens.push((token.clone(), now + Duration::from_secs(ttl.into())));
        let mut response = text(200, token);
        response.headers_mut().insert(TTL, ttl.into());
        response
    }

    fn tell(&self, instance: &Instance, path: &str, headers: &HeaderMap) -> Response<Body> {
        let given = headers
            .get("x-aws-ec2-metadata-token")
            .and_then(|value| value.to_str().ok());
        if !given.is_some_and(|token| self.is_good(&instance.id, token)) {
            return text(401, "Unauthorized");
        }
        let world = self.cloud.metadata();
        let tree = self.tree(&world, instance);
        match lookup(&tree, path) {
            Some(found) => text(200, found),
            None => text(404, "Not Found"),
        }
    }

    fn is_good(&self, instance: &InstanceId, token: &str) -> bool {
        let now = self.cloud.now();
        let all = self.tokens.lock();
        all.get(instance)
            .is_some_and(|tokens| tokens.iter().any(|(t, end)| t == token && *end > now))
    }

    /// Every leaf of the tree, by path.
    fn tree(&self, world: &World, instance: &Instance) -> BTreeMap<String, String> {
        let mut tree = instance_tree(world, instance);
        let credentials = self.cloud.credentials.issue(&instance.id, self.cloud.now());
        let at = |now| {
            self.cloud
                .wall(now)
                .replace_nanosecond(0)
                .ok()?
                .format(&Rfc3339)
                .ok()
        };
        let document = json!({
            "Code": "Success",
            "LastUpdated": at(credentials.issued),
            "Type": "AWS-HMAC",
            "AccessKeyId": credentials.access_key,
            "SecretAccessKey": credentials.secret,
            "Token": credentials.token,
            "Expiration": at(credentials.expires),
        });
        let path = format!("meta-data/iam/security-credentials/{ROLE}");
        tree.insert(path, document.to_string());
        let identity = json!({
            "accountId": world.owner,
            "architecture": "x86_64",
            "availabilityZone": tree.get("meta-data/placement/availability-zone"),
            "imageId": "ami-0b0c0",
            "instanceId": instance.id.as_str(),
            "instanceType": instance.limits.name,
            "pendingTime": at(Now::ZERO),
            "privateIp": tree.get("meta-data/local-ipv4"),
            "region": world.region,
            "version": "2017-09-30",
        });
        tree.insert(
            "dynamic/instance-identity/document".into(),
            identity.to_string(),
        );
        tree
    }
}

fn instance_tree(world: &World, instance: &Instance) -> BTreeMap<String, String> {
    let mut tree = BTreeMap::new();
    let mut put = |key: String, value: String| tree.insert(format!("meta-data/{key}"), value);
    let zone = world
        .subnet(&instance.subnet)
        .map_or_else(|_| String::new(), |s| s.zone.clone());
    put("instance-id".into(), instance.id.to_string());
    put("instance-type".into(), instance.limits.name.into());
    put("ami-id".into(), "ami-0b0c0".into());
    put("placement/availability-zone".into(), zone);
    put("placement/region".into(), world.region.clone());
    put("services/domain".into(), "amazonaws.com".into());
    put("services/partition".into(), "aws".into());
    let plugged = world.ports();
    for (interface, attachment) in world.attached_to(&instance.id) {
        // Shown while it is plugged in, as the guest would see it.
        if !plugged.contains_key(&interface.id) {
            continue;
        }
        if attachment.device == 0 {
            let name = crate::ec2::private_name(world, interface.primary());
            put("mac".into(), interface.mac.to_string());
            put("local-ipv4".into(), interface.primary().to_string());
            put("local-hostname".into(), name.clone());
            put("hostname".into(), name);
            put(
                "security-groups".into(),
                lines(interface.groups.iter().map(|g| world.group_name(g))),
            );
        }
        for (key, value) in interface_tree(world, interface, attachment.device) {
            put(
                format!("network/interfaces/macs/{}/{key}", interface.mac),
                value,
            );
        }
    }
    tree
}

/// Only keys that exist: no prefixes, no key for them.
fn interface_tree(
    world: &World,
    interface: &Interface,
    device: u32,
) -> Vec<(&'static str, String)> {
    let mut keys = vec![
        ("device-number", device.to_string()),
        ("network-card", "0".into()),
        ("interface-id", interface.id.to_string()),
        ("mac", interface.mac.to_string()),
        ("owner-id", world.owner.clone()),
        (
            "local-hostname",
            crate::ec2::private_name(world, interface.primary()),
        ),
        ("local-ipv4s", lines(&interface.addresses)),
        ("security-group-ids", lines(&interface.groups)),
        (
            "security-groups",
            lines(interface.groups.iter().map(|g| world.group_name(g))),
        ),
        ("subnet-id", interface.subnet.clone()),
        ("vpc-id", world.vpc.clone()),
        ("vpc-ipv4-cidr-block", world.cidr.to_string()),
        ("vpc-ipv4-cidr-blocks", world.cidr.to_string()),
    ];
    if let Ok(subnet) = world.subnet(&interface.subnet) {
        keys.push(("subnet-ipv4-cidr-block", subnet.cidr.to_string()));
        keys.extend(
            subnet
                .ipv6_cidr
                .map(|net| ("subnet-ipv6-cidr-blocks", net.to_string())),
        );
    }
    if !interface.prefixes.is_empty() {
        keys.push(("ipv4-prefix", lines(&interface.prefixes)));
    }
    keys.extend(interface.ipv6.map(|v6| ("ipv6s", v6.to_string())));
    keys.extend(
        interface
            .ipv6_prefix
            .map(|net| ("ipv6-prefix", net.to_string())),
    );
    keys
}

/// A leaf's text, or what lies directly below a path: branches end with `/`.
fn lookup(tree: &BTreeMap<String, String>, path: &str) -> Option<String> {
    let path = path.strip_prefix("/latest/")?.trim_end_matches('/');
    if let Some(leaf) = tree.get(path) {
        return Some(leaf.clone());
    }
    let above = if path.is_empty() {
        String::new()
    } else {
        format!("{path}/")
    };
    let mut below: Vec<String> = tree
        .keys()
        .filter_map(|key| key.strip_prefix(&above))
        .map(|rest| match rest.split_once('/') {
            // The role is a leaf that is listed without a slash; branches have one.
            Some((branch, _)) => format!("{branch}/"),
            None => rest.into(),
        })
        .collect();
    below.dedup();
    (!below.is_empty()).then(|| below.join("\n"))
}

fn lines<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items
        .into_iter()
        .map(|item| item.to_string())
        .collect::<Vec<_>>()
        .join("\n")
}

fn text(status: u16, body: impl Into<bytes::Bytes>) -> Response<Body> {
    respond(status, "text/plain", body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_a_leaf_a_listing_or_absent() {
        let leaf = |key: &str| (key.to_owned(), "v".to_owned());
        let tree = BTreeMap::from(
            [
                "meta-data/mac",
                "meta-data/network/interfaces/macs/02:aa/mac",
                "dynamic/x",
            ]
            .map(leaf),
        );
        assert_eq!(lookup(&tree, "/latest/meta-data/mac").unwrap(), "v");
        assert_eq!(
            lookup(&tree, "/latest/meta-data/").unwrap(),
            "mac\nnetwork/"
        );
        assert_eq!(lookup(&tree, "/latest/meta-data").unwrap(), "mac\nnetwork/");
        assert_eq!(lookup(&tree, "/latest/").unwrap(), "dynamic/\nmeta-data/");
        assert_eq!(
            lookup(&tree, "/latest/meta-data/network/interfaces/macs/").unwrap(),
            "02:aa/"
        );
        for absent in [
            "/",
            "/latest/meta-data/ma",
            "/1.0/meta-data",
            "/latest/meta-data/mac/x",
        ] {
            assert_eq!(lookup(&tree, absent), None, "{absent}");
        }
    }
}
