//! What the wire carried: tcpdump at the fabric's router, and a search in what it wrote.
//!
//! Text is looked for in the frames as they passed and in what each TCP connection said: a
//! ClientHello with a post-quantum key share is longer than a frame, and its extensions come in any
//! order, so that a name in it may lie across two.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::{NetSlice, SlicedPacket, TcpSlice, TransportSlice};
use pcap_parser::{LegacyPcapReader, PcapBlockOwned, PcapError, traits::PcapReaderIterator as _};
use turnpike_vpc::netns::{Command, Namespace};

use crate::{
    daemon::Daemon,
    wait_for,
    world::{OTLP_PORT, World},
};

/// Longer than any frame of the fabric with its headers.
const BUFFER: usize = 256 << 10;

/// A capture in progress.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Daemon,
    namespace: Namespace,
    file: PathBuf,
}

/// A finished capture.
#[derive(Clone, Debug, Default)]
pub struct Wire {
    /// Every frame, headers and payload alike.
    frames: Vec<Vec<u8>>,
    /// Where packets of any protocol were bound for.
    destinations: BTreeSet<IpAddr>,
    /// What each direction of each connection said, without its headers.
    streams: BTreeMap<Direction, Vec<Stream>>,
}

/// Source and destination.
type Direction = (SocketAddr, SocketAddr);

/// One direction of one connection: payloads by their distance from its first sequence number.
#[derive(Clone, Debug)]
struct Stream {
    first: u32,
    payloads: BTreeMap<u32, Vec<u8>>,
}

impl Capture {
    /// Captures every packet that crosses the router, in and out.
    pub fn start(world: &World) -> Result<Self> {
        Self::begin(&world.namespace("router")?, &world.folder)
    }

    /// Captures in any namespace; `folder` is the world's. What sidecars export is left out: it says
    /// of requests, to a collector in plaintext, what the requests themselves may keep to themselves.
    pub fn begin(namespace: &Namespace, folder: &Path) -> Result<Self> {
        let folder = folder.join("capture");
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)?;
        let file = folder.join("wire.pcap");
        let command = Command::new("tcpdump")
            .args([
                "--immediate-mode",
                "-U",
                "-n",
                // A thousand frames of any size may wait: in immediate mode each has room for the largest.
                "-s",
                "65535",
                "-B",
                "65536",
                "-i",
                "any",
                "-y",
                "LINUX_SLL",
                "-Z",
                "root",
                "-w",
            ])
            .arg(&file)
            .arg(format!("not tcp port {OTLP_PORT}"));
        let capture = Self {
            tcpdump: Daemon::start("tcpdump", command, namespace, &folder, false)?,
            namespace: namespace.clone(),
            file,
        };
        capture.mark("turnpike: the capture begins")?;
        Ok(capture)
    }

    pub fn finish(mut self) -> Result<Wire> {
        self.mark("turnpike: the capture ends")?;
        self.tcpdump.stop(Duration::from_secs(5))?;
        let log = self.tcpdump.log();
        ensure!(
            log.contains("\n0 packets dropped by kernel"),
            "the capture is not whole: {log}"
        );
        Wire::read(&self.file)
    }

    /// Sends a text over loopback until it is in the file. Then packets are taken, which tcpdump's
    /// "listening" does not say, and all that came before are there.
    fn mark(&self, text: &str) -> Result<()> {
        let send = || -> std::io::Result<()> {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            socket.send_to(text.as_bytes(), "127.0.0.1:9").map(drop)
        };
        let taken = wait_for(Duration::from_secs(10), || {
            let sent = self.namespace.run(send).is_ok_and(|sent| sent.is_ok());
            let file = std::fs::read(&self.file).unwrap_or_default();
            (sent && holds(&file, text)).then_some(())
        });
        let log = || format!("tcpdump takes nothing: {}", self.tcpdump.log());
        taken.with_context(log)
    }
}

impl Wire {
    fn read(file: &Path) -> Result<Self> {
        let opened = File::open(file).with_context(|| format!("opening {}", file.display()))?;
        let mut reader = LegacyPcapReader::new(BUFFER, opened)
            .map_err(|error| anyhow::anyhow!("{} is no capture: {error:?}", file.display()))?;
        let mut wire = Self::default();
        loop {
            match reader.next() {
                Ok((length, block)) => {
                    if let PcapBlockOwned::Legacy(frame) = block {
                        wire.take(frame.data);
                    }
                    reader.consume(length);
                }
                Err(PcapError::Eof) => return Ok(wire),
                Err(PcapError::Incomplete(_)) => {
                    if let Err(error) = reader.refill() {
                        bail!("{}: {error:?}", file.display());
                    }
                }
                Err(error) => bail!("{}: {error:?}", file.display()),
            }
        }
    }

    fn take(&mut self, frame: &[u8]) {
        let Ok(packet) = SlicedPacket::from_linux_sll(frame) else {
            return self.frames.push(frame.to_vec());
        };
        let (source, destination): (IpAddr, IpAddr) = match &packet.net {
            Some(NetSlice::Ipv4(ip)) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            Some(NetSlice::Ipv6(ip)) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            _ => return self.frames.push(frame.to_vec()),
        };
        // Our own marks.
        if destination.is_loopback() {
            return;
        }
        self.frames.push(frame.to_vec());
        self.destinations.insert(destination);
        if let Some(TransportSlice::Tcp(tcp)) = &packet.transport {
            let direction = (
                SocketAddr::new(source, tcp.source_port()),
                SocketAddr::new(destination, tcp.destination_port()),
            );
            Stream::take(self.streams.entry(direction).or_default(), tcp);
        }
    }

    /// Bytes captured; each frame twice, as it came into the router and as it left.
    pub fn len(&self) -> usize {
        self.frames.iter().map(Vec::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Whether a TCP segment came from this address.
    pub fn heard(&self, source: IpAddr) -> bool {
        self.streams.keys().any(|(from, _)| from.ip() == source)
    }

    /// Whether anything was sent to this address, be it never answered.
    pub fn reached_for(&self, destination: IpAddr) -> bool {
        self.destinations.contains(&destination)
    }

    pub fn carried(&self, text: &str) -> bool {
        let said = self.streams.values().flatten().flat_map(Stream::said);
        let mut all = self.frames.iter().cloned().chain(said);
        all.any(|bytes| holds(&bytes, text))
    }
}

fn holds(bytes: &[u8], text: &str) -> bool {
    let mut windows = bytes.windows(text.len());
    windows.any(|window| window == text.as_bytes())
}

impl Stream {
    /// A SYN with another number than the last begins another connection of the same ports.
    fn take(streams: &mut Vec<Self>, tcp: &TcpSlice<'_>) {
        let sequence = tcp.sequence_number();
        let begins = |stream: &Self| !tcp.syn() || stream.first == sequence;
        if !streams.last().is_some_and(begins) {
            streams.push(Self {
                first: sequence,
                payloads: BTreeMap::new(),
            });
        }
        let Some(stream) = streams.last_mut() else {
            return;
        };
        let place = sequence.wrapping_sub(stream.first);
        let known = stream.payloads.entry(place).or_default();
        if known.len() < tcp.payload().len() {
            *known = tcp.payload().to_vec();
        }
    }

    /// What was said without a gap, in as many pieces as there are gaps.
    fn said(&self) -> Vec<Vec<u8>> {
        let mut pieces: Vec<Vec<u8>> = Vec::new();
        let mut next = 0_u64;
        for (place, payload) in &self.payloads {
            let place = u64::from(*place);
            let end = place + payload.len() as u64;
            match pieces.last_mut() {
                // A SYN takes a number and carries nothing.
                Some(piece) if place <= next.max(1) => {
                    let known = usize::try_from(next.saturating_sub(place)).unwrap_or(usize::MAX);
                    piece.extend(payload.get(known..).unwrap_or_default());
                }
                _ => pieces.push(payload.clone()),
            }
            next = next.max(end);
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    /// A segment from 10.0.0.1:1000 to 10.0.0.2:80 as the router's capture holds it.
    fn segment(sequence: u32, syn: bool, payload: &str) -> Vec<u8> {
        use etherparse::LinuxSllPacketType;
        let builder = PacketBuilder::linux_sll(LinuxSllPacketType::OTHERHOST, 6, [0; 8]).ipv4(
            [10, 0, 0, 1],
            [10, 0, 0, 2],
            64,
        );
        let mut tcp = builder.tcp(1000, 80, sequence, 1024);
        if syn {
            tcp = tcp.syn();
        }
        let mut frame = Vec::new();
        tcp.write(&mut frame, payload.as_bytes()).unwrap();
        frame
    }

    fn wire(segments: &[(u32, bool, &str)]) -> Wire {
        let mut wire = Wire::default();
        for (sequence, syn, payload) in segments {
            wire.take(&segment(*sequence, *syn, payload));
        }
        wire
    }

    #[test]
    fn a_text_across_frames_is_found_in_any_order() {
        let near_the_end = u32::MAX - 2;
        for order in [[0, 1, 2, 2], [0, 2, 1, 1], [0, 1, 1, 2]] {
            let all = [
                (near_the_end, true, ""),
                (near_the_end.wrapping_add(1), false, "p80.we"),
                (near_the_end.wrapping_add(7), false, "b.shop"),
            ];
            let wire = wire(&order.map(|index: usize| all[index]));
            assert!(wire.carried("p80.web.shop"), "{order:?}");
            assert!(!wire.carried("p80.web.shops"));
        }
    }

    #[test]
    fn overlaps_count_once_and_gaps_join_nothing() {
        assert!(wire(&[(9, true, ""), (10, false, "abcd"), (12, false, "cdef")]).carried("abcdef"));
        assert!(!wire(&[(9, true, ""), (10, false, "ab"), (13, false, "cd")]).carried("abcd"));
    }

    #[test]
    fn ports_used_again_are_another_connection() {
        let wire = wire(&[
            (9, true, ""),
            (10, false, "first"),
            (500, true, ""),
            (501, false, "second"),
        ]);
        assert!(wire.carried("first") && wire.carried("second"));
        assert!(!wire.carried("firstsecond"));
    }
}
