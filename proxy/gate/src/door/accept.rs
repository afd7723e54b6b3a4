//! From the listening socket to a protocol.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::BytesMut;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use turnpike_detect::{Detection, MAX_DETECT, detect};
use turnpike_ledger::record::{Attempt, Verdict};
use turnpike_rules::host::HostName;

use super::{
    Door,
    forward::forward,
    http,
    judge::{Caller, Claim, attempt, judge, missing, refuse},
};
use crate::state::{Pod, Standing};

/// After a failed accept (no descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a pod whose policies all audit is waited for before its bytes pass unread.
const AUDIT_FIRST_BYTES: Duration = Duration::from_millis(500);
/// A fatal `access_denied`, for a client that has just sent its ClientHello.
const TLS_ACCESS_DENIED: &[u8] = &[21, 3, 3, 0, 2, 2, 49];
/// For a refused client to read why.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

/// What ends the door's work: `accepting` first, `deadline` when the connections must end too.
#[derive(Clone, Debug, Default)]
pub struct Stops {
    pub accepting: CancellationToken,
    pub deadline: CancellationToken,
}

/// Takes connections until told to stop.
pub async fn serve(listener: TcpListener, door: Arc<Door>, stops: Stops) {
    let permits = Arc::new(Semaphore::new(door.config.connections));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            biased;
            () = stops.accepting.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, source)) => {
                let (door, deadline) = (door.clone(), stops.deadline.clone());
                door.clone().tasks.spawn(async move {
                    let _permit = permit;
                    Box::pin(receive(&door, stream, source, deadline)).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the door cannot accept; is the descriptor limit reached?");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn receive(door: &Arc<Door>, stream: TcpStream, source: SocketAddr, stop: CancellationToken) {
    // Claimed transparently: the socket's own address is the destination.
    let Ok(destination) = stream.local_addr() else {
        return;
    };
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let (source, destination) = (canonical(source), canonical(destination));
    let standing = door.state.view().standing(source.ip());
    let caller = |pod: Option<&Pod>| Caller {
        source,
        destination,
        uid: pod.map_or_else(|| "".into(), |pod| pod.uid.clone()),
        bound: pod.map_or_else(Vec::new, |pod| {
            pod.runtime
                .names
                .lock()
                .leading_to(destination.ip(), std::time::Instant::now())
        }),
    };
    let pod = standing.pod().cloned();
    let caller = caller(pod.as_deref());
    let deny = |reason: &str| refuse(attempt(&caller, &Claim::Tcp, &standing), reason);
    let Standing::Selected(pod, _) = &standing else {
        let denied = deny(missing(&standing));
        abort(&stream);
        return door.record_denial(pod.as_deref(), denied).await;
    };
    let Ok(_permit) = pod.runtime.connections.clone().try_acquire_owned() else {
        let denied = deny("the pod has as many connections through the gate as it may have");
        abort(&stream);
        return door.record_denial(Some(pod), denied).await;
    };
    let client = Client {
        door,
        stream,
        caller,
        pod: pod.clone(),
        stop,
    };
    if let Err(error) = Box::pin(client.serve()).await {
        tracing::debug!(%source, %destination, %error, "a connection broke off before a verdict");
    }
}

/// One accepted connection of a known pod.
pub(super) struct Client<'a> {
    pub(super) door: &'a Arc<Door>,
    pub(super) stream: TcpStream,
    pub(super) caller: Caller,
    pub(super) pod: Arc<Pod>,
    /// The gate stops: the connection must end.
    pub(super) stop: CancellationToken,
}

impl Client<'_> {
    async fn serve(mut self) -> io::Result<()> {
        self.stream.set_nodelay(true)?;
        keep_alive(&self.stream)?;
        let opaque = judge(&self.door.state.view(), &self.caller, &Claim::Tcp);
        if opaque.verdict == Verdict::Allowed {
            // The address alone is allowed: nothing in the bytes could change that.
            forward(self, Claim::Tcp, BytesMut::new()).await;
            return Ok(());
        }
        let audited = opaque.verdict == Verdict::AuditWouldDeny;
        let wait = if audited {
            AUDIT_FIRST_BYTES
        } else {
            self.door.config.first_bytes
        };
        let mut first = BytesMut::new();
        let detection = match timeout(wait, self.first_bytes(&mut first)).await {
            Ok(detection) => detection?,
            Err(_) => Detection::NeedMore,
        };
        match detection {
            Detection::Tls(hello) => {
                let sni = hello
                    .sni
                    .as_deref()
                    .and_then(|name| HostName::parse(name).ok());
                let claim = Claim::Tls(sni);
                let verdict = judge(&self.door.state.view(), &self.caller, &claim);
                if verdict.verdict == Verdict::Denied {
                    self.deny(verdict, TLS_ACCESS_DENIED).await
                } else {
                    forward(self, claim, first).await;
                    Ok(())
                }
            }
            Detection::Http1 => {
                Box::pin(http::serve(self, first)).await;
                Ok(())
            }
            // Where all policies only audit, what cannot be read passes, too.
            _ if audited => {
                forward(self, Claim::Tcp, first).await;
                Ok(())
            }
            Detection::BadTls(refusal) => {
                let mut denied = refuse(opaque, format!("TLS: {refusal}"));
                denied.protocol = turnpike_ledger::record::Protocol::Tls;
                self.deny(denied, TLS_ACCESS_DENIED).await
            }
            Detection::Http2 => {
                let reason = "HTTP/2 without TLS is not read by the gate; use HTTP/1.1 or TLS";
                self.deny(refuse(opaque, reason), b"").await
            }
            Detection::NeedMore => {
                let reason = "the first bytes did not come in time, or ended too early, to say \
                              which host is meant";
                self.deny(refuse(opaque, reason), b"").await
            }
            Detection::Opaque => self.deny(opaque, b"").await,
        }
    }

    /// Reads until the bytes decide what they are.
    async fn first_bytes(&mut self, first: &mut BytesMut) -> io::Result<Detection> {
        loop {
            if self.stream.read_buf(first).await? == 0 {
                return Ok(Detection::NeedMore);
            }
            match detect(first) {
                Detection::NeedMore if first.len() < MAX_DETECT => {}
                detection => return Ok(detection),
            }
        }
    }

    /// Refuses, with a last word in the client's own protocol where it has one.
    async fn deny(mut self, denied: Attempt, last_word: &[u8]) -> io::Result<()> {
        if last_word.is_empty() {
            abort(&self.stream);
            drop(self.stream);
        } else {
            farewell(&mut self.stream, last_word).await;
        }
        self.door.record_denial(Some(&self.pod), denied).await;
        Ok(())
    }
}

/// Says a last word and closes so that it arrives: what the client still sends is read away, since
/// unread bytes would turn the close into a reset.
pub(super) async fn farewell(stream: &mut TcpStream, last_word: &[u8]) {
    let ending = async {
        stream.write_all(last_word).await?;
        stream.shutdown().await?;
        let mut sink = vec![0; 4096];
        while stream.read(&mut sink).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    // The client may be gone, or go on sending: it was told.
    let _ = timeout(FAREWELL, ending).await;
}

/// The close of this socket becomes a reset, and what waits to be sent is not sent.
pub(super) fn abort(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// A peer that vanished is noticed within some minutes, so that its connection does not stay.
pub(super) fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}
