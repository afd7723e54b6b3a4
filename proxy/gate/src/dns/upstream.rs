//! Asking a server: UDP from a fresh port with a fresh id, TCP where the answer is cut short.
//!
//! A question is repeated well within the time that clients wait, and whichever of its datagrams is
//! answered first decides.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::{Instant, sleep_until, timeout},
};

use super::message::{BadReply, Question, Reply};

/// When the question is repeated, counted from the first.
const REPEATS: [Duration; 3] = [
    Duration::from_millis(300),
    Duration::from_millis(600),
    Duration::from_millis(1500),
];
/// When it is given up.
const PATIENCE: Duration = Duration::from_millis(4500);
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
    let begun = Instant::now();
    let mut attempts = FuturesUnordered::from_iter([ask_udp(server, question)]);
    let mut repeats = REPEATS.iter().map(|after| begun + *after);
    let mut next = repeats.next();
    let mut last = AskError::TimedOut(server);
    loop {
        let wake = if attempts.is_empty() {
            Instant::now() // refused at once: nothing to wait for
        } else {
            next.unwrap_or(begun + PATIENCE)
        };
        tokio::select! {
            biased;
            Some(answered) = attempts.next() => match answered {
                Err(AskError::Reply { source: BadReply::Truncated, .. }) => {
                    return timeout(TCP_TIMEOUT, ask_tcp(server, question))
                        .await
                        .unwrap_or(Err(AskError::TimedOut(server)));
                }
                Err(error @ (AskError::TimedOut(_) | AskError::Io { .. })) => last = error,
                other => return other,
            },
            () = sleep_until(wake) => {
                if next.take().is_none() {
                    return Err(last);
                }
                attempts.push(ask_udp(server, question));
                next = repeats.next();
            }
        }
    }
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
    let mut buffer = vec![0; 4096];
    for _ in 0..STRAYS {
        let length = socket.recv(&mut buffer).await.map_err(io)?;
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

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Message, OpCode},
        rr::RecordType,
    };

    use super::*;

    fn answer(query: &[u8]) -> Vec<u8> {
        let query = Message::from_vec(query).unwrap();
        let mut answer = Message::response(query.metadata.id, OpCode::Query);
        answer.add_query(query.queries[0].clone());
        answer.to_vec().unwrap()
    }

    #[tokio::test]
    async fn one_lost_datagram_leaves_time_for_the_answer() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = server.local_addr().unwrap();
        let serving = async {
            let mut buffer = [0; 512];
            server.recv_from(&mut buffer).await.unwrap();
            let (length, peer) = server.recv_from(&mut buffer).await.unwrap();
            server
                .send_to(&answer(&buffer[..length]), peer)
                .await
                .unwrap();
        };
        let question = Question::new("a.example.", RecordType::A);
        // A client asks the next server after as long.
        let asking = timeout(Duration::from_millis(1400), ask(at, &question));
        let (reply, ()) = tokio::join!(asking, serving);
        reply.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_late_answer_counts_after_the_question_was_repeated() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = server.local_addr().unwrap();
        let serving = async {
            let (mut buffer, mut other) = ([0; 512], [0; 512]);
            let (length, peer) = server.recv_from(&mut buffer).await.unwrap();
            server.recv_from(&mut other).await.unwrap();
            server
                .send_to(&answer(&buffer[..length]), peer)
                .await
                .unwrap();
        };
        let question = Question::new("a.example.", RecordType::A);
        let (reply, ()) = tokio::join!(ask(at, &question), serving);
        reply.unwrap();
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_given_up_at_once() {
        let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = gone.local_addr().unwrap();
        drop(gone);
        let question = Question::new("a.example.", RecordType::A);
        let asked = ask(at, &question).await;
        assert!(matches!(asked, Err(AskError::Io { .. })), "{asked:?}");
    }
}
