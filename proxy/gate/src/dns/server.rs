//! The sockets that pods ask.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    message::{BadQuery, Question},
    resolver::Resolver,
};

/// Questions over UDP in work; one more is dropped, and its client asks again.
const QUESTIONS: usize = 1024;
/// TCP connections; further ones wait in the kernel's queue.
const CONNECTIONS: usize = 256;
const QUESTIONS_PER_CONNECTION: usize = 100;
const IDLE: Duration = Duration::from_secs(2);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A question has one name of at most 255 bytes; options are not taken.
const MAX_QUERY: usize = 4096;

/// Answers over UDP until cancelled.
pub async fn serve_udp(
    socket: UdpSocket,
    resolver: Arc<Resolver>,
    tasks: TaskTracker,
    cancel: CancellationToken,
) {
    let socket = Arc::new(socket);
    let permits = Arc::new(Semaphore::new(QUESTIONS));
    let mut buffer = vec![0; MAX_QUERY];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = cancel.cancelled() => return,
        };
        let (length, peer) = match received {
            Ok(received) => received,
            Err(error) => {
                // An ICMP error for an earlier answer; nothing to wait for.
                tracing::debug!(%error, "receiving questions");
                continue;
            }
        };
        let question = match Question::parse(&buffer[..length]) {
            Ok(question) => question,
            Err(BadQuery::Ignore) => continue,
            Err(BadQuery::Answer(answer)) => {
                let _ = socket.send_to(&answer, peer).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            continue;
        };
        // Dropped like the above: its client asks again, later.
        let Some(room) = resolver.admit(source(peer)) else {
            continue;
        };
        let (socket, resolver) = (socket.clone(), resolver.clone());
        tasks.spawn(async move {
            let _permits = (permit, room);
            let reply = resolver.resolve(source(peer), &question).await;
            // The client asks again where this is lost.
            let _ = socket.send_to(&question.answer_udp(&reply), peer).await;
        });
    }
}

/// Answers over TCP until cancelled.
pub async fn serve_tcp(
    listener: TcpListener,
    resolver: Arc<Resolver>,
    tasks: TaskTracker,
    cancel: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = cancel.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                let Some(room) = resolver.admit_connection(source(peer)) else {
                    continue;
                };
                let (resolver, cancel) = (resolver.clone(), cancel.clone());
                tasks.spawn(async move {
                    let _permits = (permit, room);
                    tokio::select! {
                        result = converse(stream, source(peer), &resolver) => {
                            if let Err(error) = result {
                                tracing::debug!(%error, "a DNS connection broke off");
                            }
                        }
                        () = cancel.cancelled() => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a DNS connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn converse(mut stream: TcpStream, source: IpAddr, resolver: &Resolver) -> io::Result<()> {
    for _ in 0..QUESTIONS_PER_CONNECTION {
        let Some(query) = timeout(IDLE, read_query(&mut stream)).await?? else {
            return Ok(());
        };
        let answer = match Question::parse(&query) {
            Ok(question) => question.answer(&resolver.resolve(source, &question).await),
            Err(BadQuery::Ignore) => return Ok(()),
            Err(BadQuery::Answer(answer)) => answer,
        };
        let Ok(length) = u16::try_from(answer.len()) else {
            return Ok(());
        };
        let framed = [&length.to_be_bytes()[..], &answer].concat();
        timeout(IDLE, stream.write_all(&framed)).await??;
    }
    Ok(())
}

/// None at the end, or where the client announces more than a question.
async fn read_query(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => usize::from(length),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    if length > MAX_QUERY {
        return Ok(None);
    }
    let mut query = vec![0; length];
    stream.read_exact(&mut query).await?;
    Ok(Some(query))
}

fn source(peer: SocketAddr) -> IpAddr {
    peer.ip().to_canonical()
}
