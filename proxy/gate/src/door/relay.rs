//! Bytes between two sockets, both ways.

use std::{io, os::fd::AsFd, time::Duration};

use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    time::{Instant, sleep, timeout},
};

use super::{
    accept::{FAREWELL, farewell},
    tcp_info::{Unacknowledged, unacknowledged},
};

/// Taken when there is something to read, given back when there is nothing left.
const BUFFER: usize = 64 * 1024;

/// How long a destination may acknowledge nothing of what is left for it.
const SILENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(2);
const LOOK_AT_MOST: Duration = Duration::from_millis(200);

/// Whether a side has said its last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ended {
    pub(super) upstream: bool,
}

/// Copies until both directions have ended, each by itself: an end of stream is passed on as one.
/// A slow reader slows its writer, since no more than one buffer a direction is held. A destination
/// that takes no more has often said why: that is passed on to its end.
pub(super) async fn relay(
    client: &mut TcpStream,
    upstream: &mut TcpStream,
    ended: &mut Ended,
) -> io::Result<()> {
    let (client_read, mut client_write) = client.split();
    let (upstream_read, mut upstream_write) = upstream.split();
    let mut refused = None;
    let out = async {
        match pump(&client_read, &mut upstream_write).await {
            Err(Broken::Writing(error)) => {
                refused = Some(error);
                Ok(())
            }
            Err(Broken::Reading(error)) => Err(error),
            Ok(()) => Ok(()),
        }
    };
    let back = async {
        let result = pump(&upstream_read, &mut client_write).await;
        ended.upstream = result.is_ok();
        result.map_err(|(Broken::Reading(error) | Broken::Writing(error))| error)
    };
    let result = tokio::try_join!(out, back);
    if refused.is_some() {
        farewell(client, b"").await;
    } else if result.is_err() {
        // It is aborted, but has what came before the break. Nothing follows from it if not.
        let _ = timeout(FAREWELL, drained(client)).await;
    }
    match refused {
        Some(error) => Err(error),
        None => result.map(drop),
    }
}

/// Waits until the peer has all that was written to `socket`, and its end. What the kernel still
/// has to send would leave after the socket is dropped: past the record, and past revocation.
pub(super) async fn drained(socket: &impl AsFd) -> io::Result<()> {
    let mut pause = LOOK;
    let mut last = (0, Instant::now());
    loop {
        match unacknowledged(socket)? {
            Unacknowledged::Nothing => return Ok(()),
            Unacknowledged::Lost => return Err(io::ErrorKind::ConnectionReset.into()),
            Unacknowledged::Waits { acknowledged } if acknowledged > last.0 => {
                last = (acknowledged, Instant::now());
            }
            Unacknowledged::Waits { .. } if last.1.elapsed() > SILENCE => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Unacknowledged::Waits { .. } => {}
        }
        sleep(pause).await;
        pause = (2 * pause).min(LOOK_AT_MOST);
    }
}

/// The side at which a direction broke.
enum Broken {
    Reading(io::Error),
    Writing(io::Error),
}

async fn pump(from: &ReadHalf<'_>, to: &mut WriteHalf<'_>) -> Result<(), Broken> {
    loop {
        from.readable().await.map_err(Broken::Reading)?;
        let mut buffer = Vec::with_capacity(BUFFER);
        loop {
            buffer.clear();
            match from.try_read_buf(&mut buffer) {
                Ok(0) => return to.shutdown().await.map_err(Broken::Writing),
                Ok(_) => to.write_all(&buffer).await.map_err(Broken::Writing)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(Broken::Reading(error)),
            }
        }
    }
}
