//! What reached the pretended internet, one JSON object a line, written as it happens.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use hickory_proto::rr::RecordType;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// How much of what a peer sent is kept.
pub(super) const FIRST: usize = 64;

/// One line. A connection has two with the same `id`: `open` at once, `close` with what it
/// carried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// RFC 3339, UTC.
    pub time: String,
    pub id: u64,
    pub event: Event,
    /// The host's name, or the address where no host has it.
    pub host: String,
    /// `http`, `https`, `tcp`, `udp`, `icmp`, `dns`.
    pub protocol: String,
    pub address: IpAddr,
    pub port: u16,
    /// As seen from there: behind NAT, the gateway's address.
    pub peer: SocketAddr,
    /// The name in the ClientHello, or the one asked for by DNS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// In hexadecimal, as it came over the wire.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub first: String,
    #[serde(default)]
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    Open,
    Close,
    /// A UDP datagram, an ICMP message or a question by DNS.
    Datagram,
}

/// Where something arrived, and from whom.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    pub(crate) host: String,
    pub(crate) protocol: &'static str,
    pub(crate) local: SocketAddr,
    pub(crate) peer: SocketAddr,
}

#[derive(Debug)]
pub(crate) struct Log {
    file: Mutex<File>,
    next: AtomicU64,
}

impl Log {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .open(path)?;
        Ok(Self {
            file: Mutex::new(file),
            next: AtomicU64::new(1),
        })
    }

    pub(super) fn open(&self, arrival: &Arrival) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.write(&record(id, Event::Open, arrival, None, &[], 0));
        id
    }

    pub(super) fn close(
        &self,
        id: u64,
        arrival: &Arrival,
        name: Option<String>,
        first: &[u8],
        bytes: u64,
    ) {
        self.write(&record(id, Event::Close, arrival, name, first, bytes));
    }

    pub(super) fn datagram(&self, arrival: &Arrival, payload: &[u8]) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let bytes = u64::try_from(payload.len()).unwrap_or(u64::MAX);
        self.write(&record(id, Event::Datagram, arrival, None, payload, bytes));
    }

    /// A question that would have reached the host's own name server.
    pub(crate) fn question(&self, host: &str, peer: SocketAddr, name: &str, kind: RecordType) {
        let local = SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 53);
        let arrival = Arrival {
            host: host.into(),
            protocol: "dns",
            local,
            peer,
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let asked = Some(format!("{name} {kind}"));
        self.write(&record(id, Event::Datagram, &arrival, asked, &[], 0));
    }

    fn write(&self, record: &Record) {
        let written = serde_json::to_vec(record)
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                // One write, so that a reader never sees half a line of a living box.
                self.file.lock().write_all(&line)
            });
        if let Err(error) = written {
            tracing::error!(%error, "the internet's log is incomplete");
        }
    }
}

fn record(
    id: u64,
    event: Event,
    arrival: &Arrival,
    name: Option<String>,
    first: &[u8],
    bytes: u64,
) -> Record {
    Record {
        time: OffsetDateTime::now_utc()
            .format(&Rfc3339)
            .unwrap_or_default(),
        id,
        event,
        host: arrival.host.clone(),
        protocol: arrival.protocol.into(),
        address: arrival.local.ip(),
        port: arrival.local.port(),
        peer: arrival.peer,
        name,
        first: first
            .iter()
            .take(FIRST)
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        bytes,
    }
}
