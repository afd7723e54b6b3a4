//! Reading single fields, with the place of what is wrong.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use turnpike_rules::{
    Identity, ServiceKey,
    service::{PortMapping, Protocol},
    workload::WorkloadPort,
};

use super::InvalidResource;
use crate::mesh as pb;

/// What is wrong, and where, as far as is known at this depth.
#[derive(Debug)]
pub(super) struct FieldError {
    field: String,
    reason: String,
}

pub(super) type Read<T> = Result<T, FieldError>;

impl FieldError {
    pub(super) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(super) fn into_invalid(self, kind: &'static str, name: &str) -> InvalidResource {
        let field = if self.field.is_empty() {
            "message".to_owned()
        } else {
            self.field
        };
        InvalidResource {
            kind,
            name: name.to_owned(),
            field,
            reason: self.reason,
        }
    }

    fn under(mut self, outer: &str) -> Self {
        self.field = if self.field.is_empty() {
            outer.to_owned()
        } else {
            format!("{outer}.{}", self.field)
        };
        self
    }
}

/// Names the field that `read` was about.
pub(super) fn within<T>(field: &str, read: Read<T>) -> Read<T> {
    read.map_err(|error| error.under(field))
}

/// Reads each element of a list.
pub(super) fn each<T, U>(
    field: &str,
    items: impl IntoIterator<Item = T>,
    read: impl Fn(T) -> Read<U>,
) -> Read<Vec<U>> {
    items
        .into_iter()
        .enumerate()
        .map(|(index, item)| read(item).map_err(|error| error.under(&format!("{field}[{index}]"))))
        .collect()
}

/// A message that must be there.
pub(super) fn required<T, U>(
    field: &str,
    message: Option<T>,
    read: impl FnOnce(T) -> Read<U>,
) -> Read<U> {
    match message {
        Some(message) => within(field, read(message)),
        None => Err(FieldError::new(field, "is missing")),
    }
}

/// A message that may be there.
pub(super) fn optional<T, U>(
    field: &str,
    message: Option<T>,
    read: impl FnOnce(T) -> Read<U>,
) -> Read<Option<U>> {
    within(field, message.map(read).transpose())
}

/// For values without a name of their own.
pub(super) fn bad<T>(reason: impl Into<String>) -> Read<T> {
    Err(FieldError::new("", reason))
}

pub(super) fn text(field: &str, text: String) -> Read<Arc<str>> {
    if text.is_empty() {
        Err(FieldError::new(field, "is empty"))
    } else {
        Ok(text.into())
    }
}

pub(super) fn port(port: u32) -> Read<u16> {
    match u16::try_from(port) {
        Ok(port) if port != 0 => Ok(port),
        _ => bad(format!("{port} is no port; allowed are 1 to 65535")),
    }
}

pub(super) fn ports(field: &str, ports: Vec<u32>) -> Read<Vec<u16>> {
    each(field, ports, port)
}

pub(super) fn ip(bytes: Vec<u8>) -> Read<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Ok(v4.into());
    }
    match <[u8; 16]>::try_from(bytes.as_slice()) {
        Ok(v6) => Ok(v6.into()),
        Err(_) => bad(format!("an address has 4 or 16 bytes, not {}", bytes.len())),
    }
}

pub(super) fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

pub(super) fn prefix(prefix: pb::Prefix) -> Read<IpNet> {
    let address = within("address", ip(prefix.address))?;
    u8::try_from(prefix.length)
        .ok()
        .and_then(|length| IpNet::new(address, length).ok())
        .ok_or_else(|| FieldError::new("length", format!("{} is too long", prefix.length)))
}

pub(super) fn prefix_message(net: &IpNet) -> pb::Prefix {
    pb::Prefix {
        address: ip_bytes(net.addr()),
        length: net.prefix_len().into(),
    }
}

pub(super) fn prefix_messages(nets: &[IpNet]) -> Vec<pb::Prefix> {
    nets.iter().map(prefix_message).collect()
}

pub(super) fn identity(identity: pb::Identity) -> Read<Identity> {
    let pb::Identity {
        trust_domain,
        namespace,
        service_account,
    } = identity;
    Identity::new(trust_domain, namespace, service_account)
        .map_err(|error| FieldError::new("", error.to_string()))
}

impl From<&Identity> for pb::Identity {
    fn from(identity: &Identity) -> Self {
        Self {
            trust_domain: identity.trust_domain().to_owned(),
            namespace: identity.namespace().to_owned(),
            service_account: identity.service_account().to_owned(),
        }
    }
}

pub(super) fn key(key: pb::ServiceKey) -> Read<ServiceKey> {
    let text = format!("{}/{}/{}", key.cluster, key.namespace, key.name);
    match text.parse() {
        Ok(key) if !text.contains('@') => Ok(key),
        _ => bad(format!("`{text}` is not cluster/namespace/name")),
    }
}

impl From<&ServiceKey> for pb::ServiceKey {
    fn from(key: &ServiceKey) -> Self {
        Self {
            cluster: key.cluster.to_string(),
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
        }
    }
}

pub(super) fn mapping(mapping: pb::PortMapping) -> Read<PortMapping> {
    Ok(PortMapping {
        service_port: within("service_port", port(mapping.service_port))?,
        target_port: within("target_port", port(mapping.target_port))?,
    })
}

impl From<&PortMapping> for pb::PortMapping {
    fn from(mapping: &PortMapping) -> Self {
        Self {
            service_port: mapping.service_port.into(),
            target_port: mapping.target_port.into(),
        }
    }
}

/// One that is not known is found out from the bytes, as if it were not declared.
pub(super) fn protocol(protocol: i32) -> Protocol {
    match pb::Protocol::try_from(protocol).unwrap_or_default() {
        pb::Protocol::Detect => Protocol::Detect,
        pb::Protocol::Http1 => Protocol::Http1,
        pb::Protocol::Http2 => Protocol::Http2,
        pb::Protocol::Tls => Protocol::Tls,
        pb::Protocol::Tcp => Protocol::Tcp,
    }
}

pub(super) fn protocol_number(protocol: Protocol) -> i32 {
    let protocol = match protocol {
        Protocol::Detect => pb::Protocol::Detect,
        Protocol::Http1 => pb::Protocol::Http1,
        Protocol::Http2 => pb::Protocol::Http2,
        Protocol::Tls => pb::Protocol::Tls,
        Protocol::Tcp => pb::Protocol::Tcp,
    };
    protocol.into()
}

pub(super) fn workload_port(message: pb::WorkloadPort) -> Read<WorkloadPort> {
    let port = within("port", port(message.port))?;
    Ok(WorkloadPort {
        port,
        protocol: protocol(message.protocol),
    })
}

impl From<&WorkloadPort> for pb::WorkloadPort {
    fn from(port: &WorkloadPort) -> Self {
        Self {
            port: port.port.into(),
            protocol: protocol_number(port.protocol),
        }
    }
}

/// A header name in the form that is matched: lower case.
pub(super) fn header_name(name: &str) -> Read<Arc<str>> {
    match http::HeaderName::from_bytes(name.as_bytes()) {
        Ok(valid) if valid.as_str() == name => Ok(name.into()),
        _ => bad(format!("`{name}` is no header name in lower case")),
    }
}

pub(super) fn header_value(value: &str) -> Read<Arc<str>> {
    match http::HeaderValue::from_str(value) {
        Ok(_) => Ok(value.into()),
        Err(_) => bad("the value has characters that no header may have"),
    }
}

/// A request method in the form that is matched: upper case.
pub(super) fn method(name: &str) -> Read<Arc<str>> {
    match http::Method::from_bytes(name.as_bytes()) {
        Ok(_) if !name.bytes().any(|b| b.is_ascii_lowercase()) => Ok(name.into()),
        _ => bad(format!("`{name}` is no request method in upper case")),
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn messages<'a, T: 'a, M: From<&'a T>>(
    items: impl IntoIterator<Item = &'a T>,
) -> Vec<M> {
    items.into_iter().map(M::from).collect()
}

pub(super) fn strings<'a, T: AsRef<str> + 'a>(
    items: impl IntoIterator<Item = &'a T>,
) -> Vec<String> {
    items
        .into_iter()
        .map(|item| item.as_ref().to_owned())
        .collect()
}

pub(super) fn port_numbers(ports: &[u16]) -> Vec<u32> {
    ports.iter().map(|port| (*port).into()).collect()
}
