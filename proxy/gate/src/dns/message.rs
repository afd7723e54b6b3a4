//! DNS messages: what a pod asks and what a server answers, each taken apart and built anew.
//!
//! Nothing of a pod's query travels on but one question in lower case; nothing of a server's answer
//! travels back but the records that answer that question. So neither options, nor spelling, nor
//! extra sections carry anything through the gate.

use std::net::IpAddr;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::svcb::{SVCB, SvcParamKey},
    },
};
use turnpike_rules::host::HostName;

/// Aliases followed from the name asked for.
const MAX_CHAIN: usize = 8;
/// Records of one answer; a server that sends more gives these.
const MAX_RECORDS: usize = 64;
pub const MIN_TTL: u32 = 1;
pub const MAX_TTL: u32 = 300;
/// For answers that say there is nothing.
const MAX_NEGATIVE_TTL: u32 = 30;
/// What we say we take over UDP: no fragment on any path that matters (DNS flag day 2020).
const UDP_PAYLOAD: u16 = 1232;
/// Without EDNS.
const PLAIN_PAYLOAD: u16 = 512;

/// The one question of a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub id: u16,
    /// As asked; a client may compare its case.
    asked: Query,
    /// In lower case, without the final dot.
    pub name: String,
    pub kind: RecordType,
    recursion_desired: bool,
    edns: bool,
    /// The longest answer over UDP.
    payload: usize,
}

/// Why a query gets no answer of substance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadQuery {
    /// Not a query at all: silence.
    Ignore,
    /// The answer to send.
    Answer(Vec<u8>),
}

/// An answer, reduced to what answers the question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub code: Code,
    /// Seconds, clamped.
    pub ttl: u32,
    /// The aliases, from the name asked for onwards.
    pub chain: Vec<String>,
    /// Owner and content of the records at the chain's end; of the asked type alone.
    pub records: Vec<RData>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Code {
    #[default]
    Ok,
    NoSuchName,
    Failed,
    Refused,
    NotSupported,
}

impl Code {
    fn wire(self) -> ResponseCode {
        match self {
            Self::Ok => ResponseCode::NoError,
            Self::NoSuchName => ResponseCode::NXDomain,
            Self::Failed => ResponseCode::ServFail,
            Self::Refused => ResponseCode::Refused,
            Self::NotSupported => ResponseCode::NotImp,
        }
    }
}

/// Why a server's message is not taken as the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadReply {
    #[error("it is no answer to the question that was asked")]
    NotOurs,
    #[error("it is malformed")]
    Malformed,
    #[error("it was cut short")]
    Truncated,
    #[error("its aliases do not end")]
    Loop,
}

impl Question {
    /// Takes a pod's query apart.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadQuery> {
        let Some(id) = bytes.first_chunk().map(|id| u16::from_be_bytes(*id)) else {
            return Err(BadQuery::Ignore);
        };
        let is_response = bytes.get(2).is_none_or(|flags| flags & 0x80 != 0);
        if is_response {
            return Err(BadQuery::Ignore); // never answer an answer
        }
        let refuse = |op_code, code| {
            let answer = Message::error_msg(id, op_code, code);
            answer.to_vec().map_or(BadQuery::Ignore, BadQuery::Answer)
        };
        let message =
            Message::from_vec(bytes).map_err(|_| refuse(OpCode::Query, ResponseCode::FormErr))?;
        if message.metadata.op_code != OpCode::Query {
            return Err(refuse(message.metadata.op_code, ResponseCode::NotImp));
        }
        let [asked] = &message.queries[..] else {
            return Err(refuse(OpCode::Query, ResponseCode::FormErr));
        };
        let content = !message.answers.is_empty() || !message.authorities.is_empty();
        if content || asked.query_class() != DNSClass::IN {
            return Err(refuse(OpCode::Query, ResponseCode::FormErr));
        }
        let payload = message
            .edns
            .as_ref()
            .map_or(PLAIN_PAYLOAD, Edns::max_payload);
        Ok(Self {
            id,
            asked: asked.clone(),
            name: text(asked.name()),
            kind: asked.query_type(),
            recursion_desired: message.metadata.recursion_desired,
            edns: message.edns.is_some(),
            payload: payload.clamp(PLAIN_PAYLOAD, UDP_PAYLOAD).into(),
        })
    }

    /// A question of our own.
    #[cfg(test)]
    pub(super) fn new(name: &str, kind: RecordType) -> Self {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        Self::parse(&message.to_vec().unwrap()).unwrap()
    }

    /// The query that is sent on: this question and nothing else.
    pub fn upstream(&self, id: u16) -> Option<Vec<u8>> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        let name = self.asked.name().to_lowercase();
        message.add_query(Query::query(name, self.kind));
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_PAYLOAD);
        message.set_edns(edns);
        message.to_vec().ok()
    }

    /// Takes a server's answer apart.
    pub fn read_reply(&self, id: u16, bytes: &[u8]) -> Result<Reply, BadReply> {
        let message = Message::from_vec(bytes).map_err(|_| BadReply::Malformed)?;
        let ours = message.metadata.id == id
            && message.metadata.message_type == MessageType::Response
            && matches!(&message.queries[..], [query]
                if query.query_type() == self.kind
                    && query.query_class() == DNSClass::IN
                    && text(query.name()) == self.name);
        if !ours {
            return Err(BadReply::NotOurs);
        }
        if message.metadata.truncation {
            return Err(BadReply::Truncated);
        }
        let code = match message.metadata.response_code {
            ResponseCode::NoError => Code::Ok,
            ResponseCode::NXDomain => Code::NoSuchName,
            ResponseCode::Refused => Code::Refused,
            ResponseCode::NotImp => Code::NotSupported,
            _ => Code::Failed,
        };
        self.reduce(code, &message)
    }

    fn reduce(&self, code: Code, message: &Message) -> Result<Reply, BadReply> {
        let mut reply = Reply {
            code,
            ttl: MAX_TTL,
            ..Reply::default()
        };
        let mut owner = self.name.clone();
        loop {
            let mine =
                |record: &&Record| record.dns_class == DNSClass::IN && text(&record.name) == owner;
            let records: Vec<_> = message.answers.iter().filter(mine).collect();
            let wanted = records
                .iter()
                .filter(|record| record.record_type() == self.kind);
            for record in wanted.take(MAX_RECORDS) {
                reply.ttl = reply.ttl.min(record.ttl);
                reply.records.extend(clean(&record.data));
            }
            let alias = records.iter().find_map(|record| match &record.data {
                RData::CNAME(target) => Some((text(&target.0), record.ttl)),
                _ => None,
            });
            let Some((target, ttl)) = alias.filter(|_| reply.records.is_empty()) else {
                break;
            };
            if reply.chain.len() == MAX_CHAIN || target == self.name {
                return Err(BadReply::Loop);
            }
            reply.ttl = reply.ttl.min(ttl);
            reply.chain.push(target.clone());
            owner = target;
        }
        let ceiling = if reply.records.is_empty() {
            MAX_NEGATIVE_TTL
        } else {
            MAX_TTL
        };
        reply.ttl = reply.ttl.clamp(MIN_TTL, ceiling);
        Ok(reply)
    }

    /// The message for the pod.
    pub fn answer(&self, reply: &Reply) -> Vec<u8> {
        let failed = || self.encode(&Reply::failure(Code::Failed), false);
        self.encode(reply, false)
            .or_else(failed)
            .unwrap_or_default()
    }

    /// The same for UDP: cut short, with the bit that says so, where it does not fit.
    pub fn answer_udp(&self, reply: &Reply) -> Vec<u8> {
        let whole = self.answer(reply);
        if whole.len() <= self.payload {
            return whole;
        }
        self.encode(
            &Reply {
                code: reply.code,
                ttl: reply.ttl,
                ..Reply::default()
            },
            true,
        )
        .unwrap_or_default()
    }

    fn encode(&self, reply: &Reply, truncated: bool) -> Option<Vec<u8>> {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.response_code = reply.code.wire();
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.truncation = truncated;
        message.add_query(self.asked.clone());
        let mut owner = self.asked.name().clone();
        for alias in &reply.chain {
            let target = Name::from_ascii(format!("{alias}.")).ok()?;
            let data = RData::CNAME(hickory_proto::rr::rdata::CNAME(target.clone()));
            message.add_answer(Record::from_rdata(owner, reply.ttl, data));
            owner = target;
        }
        for data in &reply.records {
            message.add_answer(Record::from_rdata(owner.clone(), reply.ttl, data.clone()));
        }
        if self.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_PAYLOAD);
            message.set_edns(edns);
        }
        message.to_vec().ok()
    }

    /// The name in the form that rules judge.
    pub fn host(&self) -> Option<HostName> {
        HostName::parse(&self.name).ok()
    }

    /// The address that a PTR question is about.
    pub fn reversed_address(&self) -> Option<IpAddr> {
        let net = self.asked.name().parse_arpa_name().ok()?;
        let whole = net.prefix_len() == net.max_prefix_len();
        whole.then(|| net.addr())
    }
}

impl Reply {
    pub fn failure(code: Code) -> Self {
        Self {
            code,
            ttl: MIN_TTL,
            ..Self::default()
        }
    }

    pub fn addresses(&self) -> Vec<IpAddr> {
        self.records.iter().filter_map(RData::ip_addr).collect()
    }

    /// Without the addresses that `refused` says.
    pub fn without(mut self, refused: impl Fn(IpAddr) -> bool) -> Self {
        self.records
            .retain(|data| !data.ip_addr().is_some_and(&refused));
        self
    }
}

/// A name as text that compares byte by byte.
fn text(name: &Name) -> String {
    let text = name.to_ascii().to_ascii_lowercase();
    text.strip_suffix('.').unwrap_or(&text).to_owned()
}

/// Takes out of service bindings what leads around the gate: keys for encrypting the server's name,
/// addresses that were not asked for, and whatever is not known.
fn clean(data: &RData) -> Option<RData> {
    match data {
        RData::SVCB(svcb) => clean_svcb(svcb).map(RData::SVCB),
        RData::HTTPS(https) => {
            clean_svcb(&https.0).map(|svcb| RData::HTTPS(hickory_proto::rr::rdata::HTTPS(svcb)))
        }
        other => Some(other.clone()),
    }
}

/// None where the record means nothing without what is taken out.
fn clean_svcb(svcb: &SVCB) -> Option<SVCB> {
    use hickory_proto::rr::rdata::svcb::SvcParamValue;
    let kept = |key: &SvcParamKey| {
        matches!(
            key,
            SvcParamKey::Alpn | SvcParamKey::NoDefaultAlpn | SvcParamKey::Port
        )
    };
    let mandatory = svcb.svc_params.iter().find_map(|(_, value)| match value {
        SvcParamValue::Mandatory(mandatory) => Some(&mandatory.0),
        _ => None,
    });
    if mandatory.is_some_and(|keys| !keys.iter().all(kept)) {
        return None;
    }
    let params = svcb
        .svc_params
        .iter()
        .filter(|(key, _)| kept(key) || *key == SvcParamKey::Mandatory)
        .cloned()
        .collect();
    Some(SVCB::new(
        svcb.svc_priority,
        svcb.target_name.clone(),
        params,
    ))
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
