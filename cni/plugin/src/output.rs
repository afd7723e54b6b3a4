//! Answers in the form of each version of the specification.

use std::net::IpAddr;

use serde_json::{Value, json};
use turnpike_wire::node::{AddReply, CheckReply};

use crate::{
    error::{CniError, Code},
    input::{Attachment, Invocation, NEWEST, VERSIONS},
};

pub fn versions(asked: &str) -> Value {
    json!({"cniVersion": asked, "supportedVersions": VERSIONS})
}

/// The result of ADD: what the agent made, after what an earlier plugin of the chain made.
pub fn added(
    invocation: &Invocation,
    attachment: &Attachment,
    reply: &AddReply,
) -> Result<Value, CniError> {
    let version = invocation.cni_version.as_str();
    let mut result = match &invocation.config.previous {
        Some(previous) => previous.clone(),
        None => json!({}),
    };
    result["cniVersion"] = version.into();
    let earlier = result["interfaces"].as_array().map_or(0, Vec::len);

    let mut pod_side = json!({
        "name": attachment.ifname, "mac": reply.pod_mac, "sandbox": attachment.netns,
    });
    let mut host_side = json!({"name": reply.host_interface, "mac": reply.host_mac});
    if version == NEWEST {
        pod_side["mtu"] = reply.mtu.into();
        host_side["mtu"] = reply.mtu.into();
    }
    let mut address = json!({
        "address": reply.address, "gateway": reply.gateway, "interface": earlier + 1,
    });
    if version == "0.4.0" {
        let family = if reply.address.contains(':') {
            "6"
        } else {
            "4"
        };
        address["version"] = family.into();
    }
    let everywhere = if reply.address.contains(':') {
        "::/0"
    } else {
        "0.0.0.0/0"
    };
    let default = json!({"dst": everywhere, "gw": reply.gateway});

    append(&mut result, "interfaces", [host_side, pod_side])?;
    append(&mut result, "ips", [address])?;
    append(&mut result, "routes", [default])?;
    if result["dns"].is_null() {
        result["dns"] = json!({});
    }
    Ok(result)
}

/// Whether the interface still has the address that ADD told the runtime of. That links, routes
/// and rules are as they were made, the agent has looked at already.
pub fn checked(
    invocation: &Invocation,
    attachment: &Attachment,
    expected: &[IpAddr],
    reply: &CheckReply,
) -> Result<(), CniError> {
    let address = reply.address.split('/').next().unwrap_or_default();
    let found = address.parse::<IpAddr>();
    if found.is_ok_and(|found| expected.contains(&found)) {
        return Ok(());
    }
    let listed: Vec<_> = expected.iter().map(ToString::to_string).collect();
    let message = format!(
        "{} has the address `{address}`; `prevResult` has for it: {}",
        attachment.ifname,
        if listed.is_empty() {
            "none".to_owned()
        } else {
            listed.join(", ")
        },
    );
    let error = CniError::new(Code::DIFFERS, message, "");
    Err(error.for_version(&invocation.cni_version))
}

fn append<const N: usize>(
    result: &mut Value,
    field: &str,
    items: [Value; N],
) -> Result<(), CniError> {
    if result[field].is_null() {
        result[field] = json!([]);
    }
    let Some(list) = result[field].as_array_mut() else {
        let message = format!("`prevResult.{field}` is not a list");
        return Err(CniError::new(Code::INVALID_CONFIG, message, ""));
    };
    list.extend(items);
    Ok(())
}
