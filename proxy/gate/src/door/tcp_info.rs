//! What the kernel counted on a TCP socket.

use std::{
    io,
    mem::{MaybeUninit, size_of},
    os::fd::{AsFd, AsRawFd},
};

/// The head of the kernel's `struct tcp_info` as far as it is needed here, in its order since
/// Linux 4.19. The C library's own definition ends before these fields.
#[repr(C)]
#[derive(Clone, Copy)]
struct TcpInfo {
    bytes8: [u8; 8],
    /// Timeouts and segment sizes.
    sizes: [u32; 4],
    unacked: u32,
    words: [u32; 19],
    pacing_rate: u64,
    max_pacing_rate: u64,
    bytes_acked: u64,
    bytes_received: u64,
    segments: [u32; 2],
    notsent: u32,
    min_rtt: u32,
    data_segments: [u32; 2],
    delivery_rate: u64,
    busy_time: u64,
    rwnd_limited: u64,
    sndbuf_limited: u64,
    delivered: [u32; 2],
    bytes_sent: u64,
    bytes_retrans: u64,
}

const CLOSE: u8 = 7;
/// States in which the peer's FIN has come and was counted as a byte.
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

/// Payload bytes through a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Sent at least once.
    pub(super) sent: u64,
    pub(super) received: u64,
}

/// Whether both ends have closed the connection, or one has reset it.
pub(super) fn is_closed(socket: &impl AsFd) -> bool {
    read(socket).is_ok_and(|info| info.bytes8[0] == CLOSE)
}

/// What of a socket's stream the peer has not acknowledged yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unacknowledged {
    /// Nothing, its end included.
    Nothing,
    /// Something that still can be; so much was acknowledged.
    Waits { acknowledged: u64 },
    /// Something that will never be: the connection is closed.
    Lost,
}

pub(super) fn unacknowledged(socket: &impl AsFd) -> io::Result<Unacknowledged> {
    let info = read(socket)?;
    Ok(if info.unacked == 0 && info.notsent == 0 {
        Unacknowledged::Nothing
    } else if info.bytes8[0] == CLOSE {
        Unacknowledged::Lost
    } else {
        Unacknowledged::Waits {
            acknowledged: info.bytes_acked,
        }
    })
}

/// Reads the counts; `ended` says that the peer's end of stream was read.
pub(super) fn counts(socket: &impl AsFd, ended: bool) -> io::Result<Counts> {
    let info = read(socket)?;
    let state = info.bytes8[0];
    let fin = ended || matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING);
    Ok(Counts {
        sent: info.bytes_sent.saturating_sub(info.bytes_retrans),
        received: info.bytes_received.saturating_sub(u64::from(fin)),
    })
}

#[expect(unsafe_code, reason = "no crate reads these fields of TCP_INFO")]
fn read(socket: &impl AsFd) -> io::Result<TcpInfo> {
    let mut info = MaybeUninit::<TcpInfo>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<TcpInfo>()).unwrap_or(0);
    // SAFETY: the descriptor is open for the call, and the kernel writes at most `length` bytes,
    // which is the size of what `info` points to.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if (length as usize) < size_of::<TcpInfo>() {
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }
    // SAFETY: all fields are integers, for which any bytes are valid, and all were zeroed.
    Ok(unsafe { info.assume_init() })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Shutdown, TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn counts_payload_to_the_byte() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut b, _) = listener.accept().unwrap();
        a.write_all(&[1; 100_000]).unwrap();
        a.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        b.read_to_end(&mut all).unwrap();
        b.write_all(&[2; 777]).unwrap();
        b.shutdown(Shutdown::Write).unwrap();
        a.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(
            counts(&a, true).unwrap(),
            Counts {
                sent: 100_000,
                received: 777
            }
        );
        assert_eq!(
            counts(&b, true).unwrap(),
            Counts {
                sent: 777,
                received: 100_000
            }
        );
    }
}
