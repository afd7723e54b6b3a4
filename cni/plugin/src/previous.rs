//! `prevResult`: what ADD answered, as a runtime gives it back.

use std::net::IpAddr;

use serde_json::Value;

/// The addresses that a result gives to the container's interface of this name. Those of other
/// interfaces are other plugins' business. The error is for people.
pub fn addresses(result: &Value, ifname: &str) -> Result<Vec<IpAddr>, String> {
    let list = |field: &str| match &result[field] {
        Value::Null => Ok(&[][..]),
        Value::Array(list) => Ok(list.as_slice()),
        _ => Err(format!("`prevResult.{field}` is not a list")),
    };
    let interfaces = list("interfaces")?;
    let ours = |interface: &Value| {
        interface["name"] == ifname && interface["sandbox"].as_str().is_some_and(|s| !s.is_empty())
    };
    let mut found = Vec::new();
    for (index, ip) in list("ips")?.iter().enumerate() {
        let belongs = match &ip["interface"] {
            Value::Null => true,
            number => {
                let interface = number.as_u64().and_then(|at| usize::try_from(at).ok());
                let interface = interface.and_then(|at| interfaces.get(at));
                ours(interface.ok_or_else(|| {
                    format!("`prevResult.ips[{index}].interface` is {number}, which is not listed")
                })?)
            }
        };
        let text = ip["address"].as_str().unwrap_or_default();
        let address = text.split('/').next().unwrap_or_default();
        let address = address.parse().map_err(|_| {
            format!("`prevResult.ips[{index}].address` is `{text}`: expected ADDRESS/LENGTH")
        })?;
        if belongs {
            found.push(address);
        }
    }
    Ok(found)
}
