//! Bytes between two sockets, both ways.

use std::io;

use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

/// Taken when there is something to read, given back when there is nothing left.
const BUFFER: usize = 64 * 1024;

/// Whether a side has said its last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ended {
    pub(super) upstream: bool,
}

/// Copies until both directions have ended, each by itself: an end of stream is passed on as one.
/// A slow reader slows its writer, since no more than one buffer a direction is held.
pub(super) async fn relay(
    client: &mut TcpStream,
    upstream: &mut TcpStream,
    ended: &mut Ended,
) -> io::Result<()> {
    let (client_read, mut client_write) = client.split();
    let (upstream_read, mut upstream_write) = upstream.split();
    let out = pump(&client_read, &mut upstream_write);
    let back = async {
        let result = pump(&upstream_read, &mut client_write).await;
        ended.upstream = result.is_ok();
        result
    };
    tokio::try_join!(out, back).map(drop)
}

async fn pump(from: &ReadHalf<'_>, to: &mut WriteHalf<'_>) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut buffer = Vec::with_capacity(BUFFER);
        loop {
            buffer.clear();
            match from.try_read_buf(&mut buffer) {
                Ok(0) => return to.shutdown().await,
                Ok(_) => to.write_all(&buffer).await?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
}
