//! Frames made by hand, and a look at the wire.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    net::if_::if_nametoindex,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt,
            socket, sockopt,
        },
        time::{TimeVal, TimeValLike as _},
    },
};
use turnpike_datapath::Mac;

use super::Namespace;

pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const IPV6: u16 = 0x86dd;

/// A packet socket on one interface of the calling thread's namespace.
fn packet_socket(interface: &str) -> OwnedFd {
    let fd = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .unwrap();
    let index = i32::try_from(if_nametoindex(interface).unwrap()).unwrap();
    bind(&fd, index).unwrap();
    fd
}

#[expect(
    unsafe_code,
    reason = "nix has no safe way to make a link-layer address"
)]
fn bind(fd: &OwnedFd, index: i32) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let size = size_of_val(&address) as u32;
    // SAFETY: the address is initialised, of the size given, and only read.
    let result = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sends one frame as it is.
pub(crate) fn transmit(namespace: &Namespace, interface: &str, frame: Vec<u8>) {
    let interface = interface.to_owned();
    namespace.run(move || {
        send(
            packet_socket(&interface).as_raw_fd(),
            &frame,
            MsgFlags::empty(),
        )
        .unwrap();
    });
}

pub(crate) fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &kind.to_be_bytes(), payload].concat()
}

pub(crate) fn ipv4(protocol: u8, from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    ipv4_fragment(protocol, from, to, 0, payload)
}

/// `fragment`: flags and offset as in the header.
pub(crate) fn ipv4_fragment(
    protocol: u8,
    from: Ipv4Addr,
    to: Ipv4Addr,
    fragment: u16,
    payload: &[u8],
) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap();
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0x12, 0x34]);
    header.extend(fragment.to_be_bytes());
    header.extend([64, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header.extend(payload);
    header
}

pub(crate) fn ipv6(next: u8, from: Ipv6Addr, to: Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

pub(crate) fn udp(from: IpAddr, to: IpAddr, port: u16, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).unwrap();
    let mut datagram = [5555u16, port, length, 0].map(u16::to_be_bytes).concat();
    datagram.extend(data);
    fill_checksum(from, to, 17, &mut datagram, 6);
    datagram
}

/// A segment with these flags: 2 is SYN, 0x10 ACK.
pub(crate) fn tcp(from: IpAddr, to: IpAddr, port: u16, flags: u8, data: &[u8]) -> Vec<u8> {
    segment((from, 5556), (to, port), 1000, flags, data)
}

/// The same from any port, at this place of both streams.
pub(crate) fn segment(
    (from, own): (impl Into<IpAddr>, u16),
    (to, port): (impl Into<IpAddr>, u16),
    place: u32,
    flags: u8,
    data: &[u8],
) -> Vec<u8> {
    let (from, to) = (from.into(), to.into());
    let mut segment = [own, port].map(u16::to_be_bytes).concat();
    segment.extend(place.to_be_bytes());
    segment.extend(if flags & 0x10 == 0 {
        [0; 4]
    } else {
        place.to_be_bytes()
    });
    segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(data);
    fill_checksum(from, to, 6, &mut segment, 16);
    segment
}

pub(crate) fn echo(data: &[u8]) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0, 0, 1, 0, 1];
    message.extend(data);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

pub(crate) fn echo6(from: Ipv6Addr, to: Ipv6Addr, data: &[u8]) -> Vec<u8> {
    let mut message = vec![128, 0, 0, 0, 0, 1, 0, 1];
    message.extend(data);
    fill_checksum(from.into(), to.into(), 58, &mut message, 2);
    message
}

fn fill_checksum(from: IpAddr, to: IpAddr, protocol: u8, message: &mut [u8], at: usize) {
    let mut whole = Vec::new();
    for address in [from, to] {
        match address {
            IpAddr::V4(address) => whole.extend(address.octets()),
            IpAddr::V6(address) => whole.extend(address.octets()),
        }
    }
    whole.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    whole.extend([0, 0, 0, protocol]);
    whole.extend(&*message);
    let sum = checksum(&whole);
    message[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// Watches interfaces for tokens of the form `EV!L` and four digits.
pub(crate) struct Sniffer {
    seen: Arc<Mutex<BTreeSet<[u8; 8]>>>,
    stop: Arc<AtomicBool>,
    watchers: Vec<JoinHandle<()>>,
}

pub(crate) fn token(number: usize) -> [u8; 8] {
    format!("EV!L{number:04}").into_bytes().try_into().unwrap()
}

impl Sniffer {
    pub(crate) fn new(namespace: &Namespace, interfaces: &[&str]) -> Self {
        let (seen, stop) = (
            Arc::new(Mutex::new(BTreeSet::new())),
            Arc::new(AtomicBool::new(false)),
        );
        let watchers = interfaces.iter().map(|interface| {
            let interface = (*interface).to_owned();
            let fd = namespace.run(move || packet_socket(&interface));
            setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20)).unwrap();
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut buffer = vec![0; 70_000];
                while !stop.load(Ordering::Relaxed) {
                    let Ok(length) = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) else {
                        continue;
                    };
                    let found = buffer[..length]
                        .windows(8)
                        .filter(|at| at.starts_with(b"EV!L"));
                    seen.lock()
                        .unwrap()
                        .extend(found.map(|at| <[u8; 8]>::try_from(at).unwrap()));
                }
            })
        });
        let watchers = watchers.collect();
        Self {
            seen,
            stop,
            watchers,
        }
    }

    /// Whether the token came by, or comes by soon.
    pub(crate) fn saw(&self, token: [u8; 8]) -> bool {
        let end = Instant::now() + Duration::from_millis(250);
        while Instant::now() < end {
            if self.seen.lock().unwrap().contains(&token) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }

    pub(crate) fn any(&self, belongs: impl Fn(&[u8; 8]) -> bool) -> bool {
        self.seen.lock().unwrap().iter().any(belongs)
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.watchers
            .drain(..)
            .for_each(|watcher| watcher.join().unwrap());
    }
}
