//! Asking a server: UDP from a fresh port with a fresh id, TCP where the answer is cut short.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::{Instant, timeout, timeout_at},
};

use super::message::{BadReply, Question, Reply};

const ATTEMPTS: u32 = 3;
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(1500);
const TCP_TIMEOUT: Duration = Duration::from_secs(3);
/// Datagrams of one attempt that are not the answer: beyond this somebody is guessing.
const STRAYS: usize = 16;
const MAX_MESSAGE: usize = 65_535;

#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("the server {0} did not answer")]
    TimedOut(SocketAddr),
    #[error("the server {server} cannot be asked: {source}")]
    Io {
        server: SocketAddr,
        source: std::io::Error,
    },
    #[error("the server {server} answered in vain: {source}")]
    Reply {
        server: SocketAddr,
        source: BadReply,
    },
    #[error("the question cannot be written down")]
    Question,
}

/// Asks `server`, again where no answer comes.
pub async fn ask(server: SocketAddr, question: &Question) -> Result<Reply, AskError> {
    let mut last = AskError::TimedOut(server);
    for _ in 0..ATTEMPTS {
        match ask_udp(server, question).await {
            Err(AskError::Reply {
                source: BadReply::Truncated,
                ..
            }) => {
                return timeout(TCP_TIMEOUT, ask_tcp(server, question))
                    .await
                    .unwrap_or(Err(AskError::TimedOut(server)));
            }
            Err(error @ (AskError::TimedOut(_) | AskError::Io { .. })) => last = error,
            other => return other,
        }
    }
    Err(last)
}

async fn ask_udp(server: SocketAddr, question: &Question) -> Result<Reply, AskError> {
    let io = |source| AskError::Io { server, source };
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // The kernel picks the port at random, and takes datagrams of this server alone.
    let socket = UdpSocket::bind((any, 0)).await.map_err(io)?;
    socket.connect(server).await.map_err(io)?;
    let id = fastrand::u16(..);
    let query = question.upstream(id).ok_or(AskError::Question)?;
    socket.send(&query).await.map_err(io)?;
    let deadline = Instant::now() + ATTEMPT_TIMEOUT;
    let mut buffer = vec![0; 4096];
    for _ in 0..STRAYS {
        let received = timeout_at(deadline, socket.recv(&mut buffer)).await;
        let length = received
            .map_err(|_| AskError::TimedOut(server))?
            .map_err(io)?;
        match question.read_reply(id, &buffer[..length]) {
            Ok(reply) => return Ok(reply),
            // Whoever guesses must not be able to end the attempt.
            Err(BadReply::NotOurs | BadReply::Malformed) => {}
            Err(source) => return Err(AskError::Reply { server, source }),
        }
    }
    Err(AskError::TimedOut(server))
}

async fn ask_tcp(server: SocketAddr, question: &Question) -> Result<Reply, AskError> {
    let io = |source| AskError::Io { server, source };
    let mut stream = TcpStream::connect(server).await.map_err(io)?;
    let id = fastrand::u16(..);
    let query = question.upstream(id).ok_or(AskError::Question)?;
    let length = u16::try_from(query.len()).map_err(|_| AskError::Question)?;
    let framed = [&length.to_be_bytes()[..], &query].concat();
    stream.write_all(&framed).await.map_err(io)?;
    let length = stream.read_u16().await.map_err(io)?;
    let mut buffer = vec![0; usize::from(length).min(MAX_MESSAGE)];
    stream.read_exact(&mut buffer).await.map_err(io)?;
    question
        .read_reply(id, &buffer)
        .map_err(|source| AskError::Reply { server, source })
}
