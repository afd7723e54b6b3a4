//! Which packets the rules refused, as the kernel logs them.
//!
//! The rules log to one netlink group, at a limited rate. [`packet`] reads addresses and ports from
//! the start of each packet, [`merge`] reports a flow at once and its repetitions once a second.

mod merge;
mod packet;

use std::{
    collections::VecDeque,
    fmt, io,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::{
    NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nflog::{ConfigCmd, ConfigMode, PacketNla, Timeout, ULogMessage, config_request},
};
use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, TokioSocket, protocols::NETLINK_NETFILTER,
};
use nix::net::if_::if_indextoname;
use tokio::time::Instant;
use tracing::warn;

use self::{merge::Merge, packet::Flow};
use crate::{Error, marks};

/// Packets of one flow that the rules refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    pub time: SystemTime,
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
    /// Ready to be returned: at most what one datagram or one sweep gives.
    ready: VecDeque<Denied>,
}

/// How long the kernel may gather packets before it wakes us.
const GATHER: Duration = Duration::from_millis(20);
const SWEEP: Duration = Duration::from_secs(1);
/// The rules log 200 packets a second at most, 96 bytes of each: this holds ten seconds of it.
const RECEIVE_BUFFER: usize = 1 << 20;

impl Denials {
    /// Binds to the rules' log group. Needs CAP_NET_ADMIN, and a tokio runtime.
    pub fn open() -> Result<Self, Error> {
        let socket = bind().map_err(Error::kernel("binding to the log of denied packets"))?;
        let sweep = Instant::now() + SWEEP;
        Ok(Self {
            socket,
            merge: Merge::default(),
            sweep,
            ready: VecDeque::new(),
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
                    }
                    Err(error) => return Err(Error::kernel("reading denied packets")(error)),
                },
                () = tokio::time::sleep_until(self.sweep) => {
                    self.sweep = Instant::now() + SWEEP;
                    let (now, repeated) = (SystemTime::now(), self.merge.sweep());
                    self.ready.extend(repeated.into_iter().map(|(flow, n)| describe(flow, now, n)));
                }
            }
        }
    }

    fn take(&mut self, datagram: &[u8]) {
        let now = SystemTime::now();
        for flow in flows(datagram) {
            if self.merge.is_first(&flow) {
                self.ready.push_back(describe(flow, now, 1));
            }
        }
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
    let (mut index, mut payload) = (0, None);
    for attribute in attributes {
        match attribute {
            PacketNla::IfIndexInDev(value) => index = value,
            PacketNla::Payload(bytes) => payload = Some(bytes),
            _ => {}
        }
    }
    packet::read(&payload?, index)
}

fn describe(flow: Flow, time: SystemTime, count: u64) -> Denied {
    let Flow {
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        index,
    } = flow;
    let name = if_indextoname(index)
        .ok()
        .and_then(|name| name.into_string().ok());
    let interface = name.unwrap_or_default();
    Denied {
        time,
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        interface,
        count,
    }
}
