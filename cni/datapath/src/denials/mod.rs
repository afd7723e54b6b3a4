//! Which packets the rules refused, as the kernel logs them.
//!
//! The rules log to one netlink group, at a limited rate for each pod, with a prefix that tells why
//! ([`Cause`]). [`packet`] reads addresses and ports from the start of each packet, [`merge`] reports
//! a flow at once and its repetitions once a second. What is beyond the rate is counted: see
//! [`Datapath::refusals`](crate::Datapath::refusals).

mod merge;
mod packet;

use std::{
    collections::{HashMap, VecDeque},
    fmt, io,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload, Nla as _};
use netlink_packet_netfilter::{
    NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nflog::{ConfigCmd, ConfigMode, PacketHdr, PacketNla, Timeout, ULogMessage, config_request},
};
use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, TokioSocket, protocols::NETLINK_NETFILTER,
};
use nix::net::if_::if_indextoname;
use tokio::time::Instant;
use tracing::warn;

use self::{
    merge::Merge,
    packet::{Flow, Logged},
};
use crate::{Error, marks};

/// Why the rules refused it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// A selected pod sent it where only the gate may send.
    Refused,
    /// A pod sent a frame that is not its own: another sender's address, IP options, a protocol or an
    /// address family that it was not given.
    Spoofed,
    /// Nobody of the cluster sent it to a selected pod, or in its name.
    Uninvited,
}

impl Cause {
    /// As the rules write it.
    pub(crate) const fn prefix(self) -> &'static str {
        match self {
            Self::Refused => "turnpike deny ",
            Self::Spoofed => "turnpike spoof ",
            Self::Uninvited => "turnpike alien ",
        }
    }

    fn of(prefix: &str) -> Self {
        let known = [Self::Spoofed, Self::Uninvited];
        let found = known
            .into_iter()
            .find(|cause| prefix.trim_end() == cause.prefix().trim_end());
        found.unwrap_or(Self::Refused)
    }
}

/// Packets of one flow that the rules refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    pub time: SystemTime,
    pub cause: Cause,
    /// What kind of frame it was: 0x0800 is IPv4, 0x86dd IPv6. For any other, the rest says as much as
    /// the frame did: ARP names two addresses, most name none (0.0.0.0).
    pub ethertype: u16,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// 0 where the protocol has none or the fragment does not carry them.
    pub source_port: u16,
    pub destination_port: u16,
    /// Where it came in: the host's end of the pod's veth pair, or an ENI; empty if the link is gone.
    pub interface: String,
    pub count: u64,
}

/// The reader; one at a time in a network namespace.
pub struct Denials {
    socket: TokioSocket,
    merge: Merge,
    sweep: Instant,
    /// Of interfaces seen, for one that is gone when its last packets are told.
    names: HashMap<u32, String>,
    /// Ready to be returned: at most what one datagram or one sweep gives.
    ready: VecDeque<Denied>,
    /// Times that the kernel had to drop what was not read, not yet told.
    overruns: u64,
}

/// How long the kernel may gather packets before it wakes us.
const GATHER: Duration = Duration::from_millis(20);
const SWEEP: Duration = Duration::from_secs(1);
/// The rules log 50 packets a second and pod at most, 96 bytes of each: this holds some seconds of
/// what a hundred pods can cause.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Names of interfaces kept.
const NAMES: usize = 4096;

impl Denials {
    /// Binds to the rules' log group. Needs CAP_NET_ADMIN, and a tokio runtime.
    pub fn open() -> Result<Self, Error> {
        let socket = bind().map_err(Error::kernel("binding to the log of denied packets"))?;
        let sweep = Instant::now() + SWEEP;
        Ok(Self {
            socket,
            merge: Merge::default(),
            sweep,
            names: HashMap::new(),
            ready: VecDeque::new(),
            overruns: 0,
        })
    }

    /// The next flow to report: at once when its first packet is refused, and then once a second
    /// with the count of those that followed. Safe to drop and call again.
    pub async fn next(&mut self) -> Result<Denied, Error> {
        loop {
            if let Some(denied) = self.ready.pop_front() {
                return Ok(denied);
            }
            tokio::select! {
                received = self.socket.recv_from_full() => match received {
                    Ok((datagram, _)) => self.take(&datagram),
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                        warn!("denied packets came faster than they were read; some are not told");
                        self.overruns += 1;
                    }
                    Err(error) => return Err(Error::kernel("reading denied packets")(error)),
                },
                () = tokio::time::sleep_until(self.sweep) => {
                    self.sweep = Instant::now() + SWEEP;
                    let now = SystemTime::now();
                    for (flow, count) in self.merge.sweep() {
                        self.tell(flow, now, count);
                    }
                }
            }
        }
    }

    fn take(&mut self, datagram: &[u8]) {
        let now = SystemTime::now();
        for flow in flows(datagram) {
            if self.merge.is_first(&flow) {
                self.tell(flow, now, 1);
            }
        }
    }

    fn tell(&mut self, flow: Flow, time: SystemTime, count: u64) {
        let interface = self.name(flow.index);
        self.ready.push_back(describe(flow, time, interface, count));
    }

    fn name(&mut self, index: u32) -> String {
        let found = if_indextoname(index).ok();
        let Some(name) = found.and_then(|name| name.into_string().ok()) else {
            return self.names.get(&index).cloned().unwrap_or_default();
        };
        if self.names.len() >= NAMES {
            self.names.clear();
        }
        self.names.insert(index, name.clone());
        name
    }

    /// How often, since this was last asked, the kernel lost packets that it should have told of.
    pub fn overruns(&mut self) -> u64 {
        std::mem::take(&mut self.overruns)
    }
}

impl fmt::Debug for Denials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Denials")
            .field("merge", &self.merge)
            .finish_non_exhaustive()
    }
}

fn bind() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    socket.socket_ref().set_rx_buf_sz(RECEIVE_BUFFER)?;
    let settings = vec![
        ConfigCmd::Bind.into(),
        ConfigMode::new_packet(packet::SNAP).into(),
        Timeout::from(GATHER).into(),
    ];
    let request = config_request(NetfilterProtoFamily::Unspec, marks::NFLOG_GROUP, settings);
    let mut buffer = vec![0; request.buffer_len()];
    request.serialize(&mut buffer);
    // The kernel answers while it is being told, so the answer is there without waiting.
    socket.socket_ref().send(&buffer, 0)?;
    let (answer, _) = socket.socket_ref().recv_from_full()?;
    match message(&answer)?.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(socket),
    }
}

fn message(bytes: &[u8]) -> io::Result<NetlinkMessage<NetfilterMessage>> {
    NetlinkMessage::deserialize(bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
}

/// The flows in a datagram; what cannot be read is passed over.
fn flows(datagram: &[u8]) -> Vec<Flow> {
    let mut flows = Vec::new();
    let mut rest = datagram;
    while rest.len() >= 16 {
        let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        if length < 16 {
            break;
        }
        if let Ok(message) = message(&rest[..length.min(rest.len())]) {
            flows.extend(logged(message));
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    flows
}

fn logged(message: NetlinkMessage<NetfilterMessage>) -> Option<Flow> {
    let NetlinkPayload::InnerMessage(message) = message.payload else {
        return None;
    };
    let NetfilterMessageInner::ULog(ULogMessage::Packet(attributes)) = message.inner else {
        return None;
    };
    let (mut payload, mut logged) = (
        Vec::new(),
        Logged {
            index: 0,
            ethertype: 0,
            cause: Cause::Refused,
        },
    );
    for attribute in attributes {
        match attribute {
            PacketNla::PacketHdr(header) => logged.ethertype = ethertype(&header),
            PacketNla::IfIndexInDev(value) => logged.index = value,
            PacketNla::Payload(bytes) => payload = bytes,
            PacketNla::Prefix(text) => logged.cause = Cause::of(&text.to_string_lossy()),
            _ => {}
        }
    }
    Some(packet::read(&payload, logged))
}

/// The crate keeps the field to itself, but writes it down: first, in network order.
fn ethertype(header: &PacketHdr) -> u16 {
    let mut bytes = vec![0; header.value_len()];
    header.emit_value(&mut bytes);
    bytes
        .first_chunk()
        .map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

fn describe(flow: Flow, time: SystemTime, interface: String, count: u64) -> Denied {
    let Flow {
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        index: _,
        ethertype,
        cause,
    } = flow;
    Denied {
        time,
        cause,
        ethertype,
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        interface,
        count,
    }
}
