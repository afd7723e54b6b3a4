//! Sees when somebody else changes the node's rules.
//!
//! The kernel tells of each change of any table, and who made it: a netlink port, which for the
//! children of [`nft`](crate::nft) is their process id. What concerns our tables and was not done by
//! one of them, or by the kernel itself, is meddling.

use std::{fmt, io, time::Duration};

use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, TokioSocket, protocols::NETLINK_NETFILTER,
};

use crate::{Error, nft};

const NFNLGRP_NFTABLES: u32 = 7;
const TABLE: &[u8] = b"turnpike\0";
/// Ten thousand members written at once are 2 MB of notifications.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Between two messages of one deed, and for all of them, at most.
const PAUSE: Duration = Duration::from_millis(2);
const DEED: Duration = Duration::from_millis(20);
/// Of a netlink message, and of netfilter's header behind it.
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
/// In each kind of nftables message, the name of the table.
const ATTRIBUTE_TABLE: u16 = 1;

/// What was seen of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meddling {
    /// A process, by its netlink port, changed our tables.
    Changed { process: u32 },
    /// More happened than could be read: whether somebody else was among it is not known.
    Unknown,
}

impl fmt::Display for Meddling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Changed { process } => write!(f, "process {process} changed the node's rules"),
            Self::Unknown => f.write_str("changes of the node's rules could not be followed"),
        }
    }
}

/// The watch over a network namespace's rules.
pub struct Watch {
    socket: TokioSocket,
}

impl Watch {
    /// Begins to watch. Needs CAP_NET_ADMIN, and a tokio runtime.
    pub fn open() -> Result<Self, Error> {
        let open = || -> io::Result<TokioSocket> {
            let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
            socket.socket_mut().bind_auto()?;
            socket.socket_ref().set_rx_buf_sz(RECEIVE_BUFFER)?;
            socket.socket_mut().add_membership(NFNLGRP_NFTABLES)?;
            Ok(socket)
        };
        let socket = open().map_err(Error::kernel("watching the node's rules"))?;
        Ok(Self { socket })
    }

    /// Waits for the next meddling, and for the rest of what was told of it, since one deed is many
    /// messages. Safe to drop and call again.
    pub async fn next(&mut self) -> Result<Meddling, Error> {
        loop {
            if let Some(seen) = self.read().await? {
                let rest = async { while self.read_soon().await {} };
                // Who goes on and on does not hold up the mending.
                let _ = tokio::time::timeout(DEED, rest).await;
                return Ok(seen);
            }
        }
    }

    async fn read(&mut self) -> Result<Option<Meddling>, Error> {
        match self.socket.recv_from_full().await {
            Ok((datagram, _)) => {
                Ok(meddler(&datagram, nft::is_ours).map(|process| Meddling::Changed { process }))
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                Ok(Some(Meddling::Unknown))
            }
            Err(error) => Err(Error::kernel("watching the node's rules")(error)),
        }
    }

    /// Whether something was there.
    async fn read_soon(&mut self) -> bool {
        let read = tokio::time::timeout(PAUSE, self.read()).await;
        matches!(read, Ok(Ok(_)))
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

/// The first sender among a datagram's messages who is neither the kernel nor ours and speaks of our
/// tables.
fn meddler(datagram: &[u8], ours: impl Fn(u32) -> bool) -> Option<u32> {
    let mut rest = datagram;
    while let Some((head, _)) = rest.split_first_chunk::<HEADER>() {
        let word =
            |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (length, process) = (word(0) as usize, word(12));
        let message = rest
            .get(..length)
            .filter(|message| message.len() >= HEADER)?;
        if process != 0 && !ours(process) && table(message) == Some(TABLE) {
            return Some(process);
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

fn table(message: &[u8]) -> Option<&[u8]> {
    let mut rest = message.get(HEADER + FAMILY_HEADER..)?;
    while let Some((head, _)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
        let value = rest.get(4..length)?;
        if kind == ATTRIBUTE_TABLE {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(process: u32, table: &[u8]) -> Vec<u8> {
        let attribute = u16::try_from(4 + table.len()).unwrap();
        let mut body = vec![0; 4];
        body.extend(attribute.to_ne_bytes());
        body.extend(ATTRIBUTE_TABLE.to_ne_bytes());
        body.extend(table);
        body.resize(body.len().next_multiple_of(4), 0);
        let mut message = u32::try_from(HEADER + body.len())
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        message.extend([0; 8]);
        message.extend(process.to_ne_bytes());
        message.extend(body);
        message
    }

    #[test]
    fn only_a_stranger_at_our_tables_meddles() {
        let ours = |process: u32| process == 7;
        type Case<'a> = (&'a [(u32, &'a [u8])], Option<u32>);
        let cases: [Case<'_>; 5] = [
            (&[(7, TABLE)], None),
            (&[(0, TABLE)], None),
            (&[(9, b"kube-proxy\0")], None),
            (&[(9, TABLE)], Some(9)),
            (&[(7, TABLE), (9, b"nat\0"), (8, TABLE)], Some(8)),
        ];
        for (messages, expected) in cases {
            let datagram: Vec<u8> = messages
                .iter()
                .flat_map(|(who, table)| message(*who, table))
                .collect();
            assert_eq!(meddler(&datagram, ours), expected, "{messages:?}");
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let whole = message(9, TABLE);
        for length in 0..whole.len() {
            let _ = meddler(&whole[..length], |_| false);
        }
        for _ in 0..100_000 {
            let bytes: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..4))
                .take(fastrand::usize(..80))
                .collect();
            let _ = meddler(&bytes, |_| false);
        }
    }
}
