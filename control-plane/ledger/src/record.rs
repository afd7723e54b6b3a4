//! What is written down.
//!
//! The canonical encoding of a record is JSON without white space, members in the order of the
//! fields here, absent options and empty lists left out, text in UTF-8 with control characters
//! escaped (a line never contains a line break, whatever a client sent). Hashes are taken over the
//! bytes as stored; nothing is ever re-encoded to verify it.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;

/// One entry's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Unix time, milliseconds. Order is by sequence; a clock may step.
    pub time_ms: i64,
    pub node: String,
    pub event: Event,
}

/// Why a body is not a record.
#[derive(Debug, thiserror::Error)]
#[error("not a record of this version: {0}")]
pub struct InvalidRecord(#[from] serde_json::Error);

impl Record {
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record holds only text keys and finite numbers")
    }

    pub fn decode(body: &[u8]) -> Result<Self, InvalidRecord> {
        Ok(serde_json::from_slice(body)?)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// A connection is allowed; committed before its first payload byte leaves.
    Opened(Attempt),
    /// A further request of an open connection, for another host or under another rule.
    Request(Attempt),
    /// The end of an opened connection.
    Closed(Closed),
    /// Something that did not leave.
    Denied(Attempt),
    /// A name a selected pod asked for; committed in the order of the answers.
    Dns(Lookup),
    /// The gate began (again) at this point of the chain.
    Restart {
        boot: String,
        version: String,
    },
    /// A connection that was open when the gate died: its end and its bytes are not known.
    Lost {
        connection: String,
    },
    /// Entries that should stand here could not be kept.
    Gap {
        entries: u64,
        reason: String,
    },
    Checkpoint(Checkpoint),
}

/// A connection or request that was judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Ties opened, request and closed together; unique on its node.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub connection: String,
    /// None: the source address belongs to no pod known here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub protocol: Protocol,
    pub verdict: Verdict,
    /// Why it was denied, or would have been.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The policy and rule that decided; none where no rule matched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<RuleRef>,
    /// The name this pod asked of DNS that led to the destination.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The aliases between that name and the address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answer_chain: Vec<String>,
    /// What the client claimed: SNI, or Host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claimed: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<Request>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assurance: Option<Assurance>,
    /// How many alike this entry stands for (packets the node's rules refused).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub count: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pod {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    /// The workload's SPIFFE URI; absent while its policy is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleRef {
    /// `namespace/name`.
    pub policy: String,
    pub version: String,
    /// `allow[0]`.
    pub id: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub method: String,
    /// In normal form, without the query.
    pub path: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    Tls,
    Http,
    Tcp,
    Udp,
    Icmp,
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Allowed,
    Denied,
    /// Let through by a policy in audit mode.
    AuditWouldDeny,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::AuditWouldDeny => "audit-would-deny",
        }
    }
}

/// How sure the record is of who was reached. In rising order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Assurance {
    /// By address alone.
    L3,
    /// The pod resolved an allowed name to the address.
    DnsBound,
    /// And the client named that name in SNI.
    SniDns,
    /// And the server's certificate was verified for it.
    CertificateVerified,
    /// And each request was judged.
    HttpVerified,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Closed {
    pub connection: String,
    /// Payload bytes from the pod that were sent on.
    pub bytes_out: u64,
    /// Payload bytes received for the pod.
    pub bytes_in: u64,
    pub duration_ms: u64,
    pub end: End,
    /// What was wrong, where something was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Requests forwarded; 0 where the gate sees none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub requests: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    Finished,
    /// Never connected; nothing was sent.
    NotConnected,
    /// One side broke off.
    Broken,
    /// Policy or pod changed and the gate cut it.
    Revoked,
    /// The gate stopped before it ended.
    GateStopped,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lookup {
    pub pod: Pod,
    pub name: String,
    pub query_type: String,
    pub verdict: Verdict,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<RuleRef>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answer_chain: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ttl_seconds: u64,
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub count: u64,
}

fn one() -> u64 {
    1
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_one(count: &u64) -> bool {
    *count == 1
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt() -> Attempt {
        Attempt {
            connection: "b0-1".into(),
            pod: Some(Pod {
                uid: "u".into(),
                namespace: "shop".into(),
                name: "pay".into(),
                identity: Some("spiffe://cluster.local/ns/shop/sa/pay".into()),
            }),
            source: "10.0.1.5:40000".parse().unwrap(),
            destination: "[2001:db8:113::10]:443".parse().unwrap(),
            protocol: Protocol::Tls,
            verdict: Verdict::Allowed,
            reason: None,
            rule: Some(RuleRef {
                policy: "shop/pay".into(),
                version: "7".into(),
                id: "allow[0]".into(),
            }),
            name: Some("api.payments.example".into()),
            answer_chain: vec![],
            claimed: Some("api.payments.example".into()),
            request: None,
            assurance: Some(Assurance::SniDns),
            count: 1,
        }
    }

    #[test]
    fn the_canonical_encoding_is_fixed() {
        let record = Record {
            time_ms: 1,
            node: "node-a".into(),
            event: Event::Opened(attempt()),
        };
        assert_eq!(
            String::from_utf8(record.encode()).unwrap(),
            concat!(
                r#"{"time_ms":1,"node":"node-a","event":{"kind":"opened","connection":"b0-1","#,
                r#""pod":{"uid":"u","namespace":"shop","name":"pay","#,
                r#""identity":"spiffe://cluster.local/ns/shop/sa/pay"},"#,
                r#""source":"10.0.1.5:40000","destination":"[2001:db8:113::10]:443","#,
                r#""protocol":"tls","verdict":"allowed","#,
                r#""rule":{"policy":"shop/pay","version":"7","id":"allow[0]"},"#,
                r#""name":"api.payments.example","claimed":"api.payments.example","#,
                r#""assurance":"sni-dns"}}"#
            )
        );
        assert_eq!(Record::decode(&record.encode()).unwrap(), record);
    }

    #[test]
    fn what_a_client_sent_stays_on_its_line() {
        let mut denied = attempt();
        denied.claimed = Some("evil\r\n{\"kind\":\"opened\"}\u{0}\u{1b}[2J".into());
        let record = Record {
            time_ms: 1,
            node: "n".into(),
            event: Event::Denied(denied),
        };
        let line = record.encode();
        assert!(
            line.iter().all(|b| *b >= 0x20),
            "control characters are escaped"
        );
        assert_eq!(Record::decode(&line).unwrap(), record);
    }

    #[test]
    fn assurance_rises() {
        assert!(Assurance::L3 < Assurance::DnsBound);
        assert!(Assurance::SniDns < Assurance::CertificateVerified);
        assert!(Assurance::CertificateVerified < Assurance::HttpVerified);
    }
}
