//! HTTP and HTTPS servers that say what they were asked.
//!
//! Any path is answered with a JSON object (host, method, path, authority, peer, TLS, headers, body
//! size). `/status/N` answers with that status, `/bytes/N` with so many bytes, `/delay/MS` late.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

use super::{
    Directory, Log,
    certificates::Certificates,
    log::{Arrival, FIRST},
};

/// Connections to one listener at a time; more wait in its backlog.
const CONNECTIONS: usize = 2048;
const HANDSHAKE: Duration = Duration::from_secs(10);
const MAX_BYTES: u64 = 1 << 32;
const MAX_DELAY: u64 = 60_000;

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Serves until dropped; its connections end with it.
pub(super) async fn serve(
    listener: TcpListener,
    certificates: Option<Arc<Certificates>>,
    directory: Directory,
    log: Arc<Log>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let Ok((stream, peer)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        let Ok(local) = stream.local_addr() else {
            continue;
        };
        let protocol = if certificates.is_some() {
            "https"
        } else {
            "http"
        };
        let arrival = Arrival {
            host: directory.name(local.ip()),
            protocol,
            local,
            peer,
        };
        let (certificates, log) = (certificates.clone(), Arc::clone(&log));
        connections.spawn(async move {
            let _place = place;
            let id = log.open(&arrival);
            let seen = Arc::new(Seen::default());
            let stream = Watched {
                stream,
                seen: Arc::clone(&seen),
            };
            let name = converse(stream, &arrival, certificates.as_deref()).await;
            let first = seen.first.lock().clone();
            log.close(
                id,
                &arrival,
                name,
                &first,
                seen.bytes.load(Ordering::Relaxed),
            );
        });
    }
}

/// To the connection's end; the name that its ClientHello gave.
async fn converse(
    stream: Watched,
    arrival: &Arrival,
    certificates: Option<&Certificates>,
) -> Option<String> {
    let Some(certificates) = certificates else {
        answer(stream, arrival, Value::Null).await;
        return None;
    };
    let acceptor = TlsAcceptor::from(certificates.of(arrival.local.ip()));
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%error, host = arrival.host, "handshake");
            return None;
        }
        Err(_) => return None,
    };
    let session = stream.get_ref().1;
    let name = session.server_name().map(String::from);
    let tls = json!({
        "sni": name,
        "alpn": session.alpn_protocol().map(String::from_utf8_lossy),
        "version": session.protocol_version().and_then(|version| version.as_str().map(String::from)),
    });
    answer(stream, arrival, tls).await;
    name
}

async fn answer<S>(stream: S, arrival: &Arrival, tls: Value)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let about = Arc::new((arrival.clone(), tls));
    let service = service_fn(move |request| {
        let about = Arc::clone(&about);
        async move { Ok::<_, Infallible>(echo(&about.0, &about.1, request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(120));
    builder.http2().timer(TokioTimer::new());
    if let Err(error) = builder
        .serve_connection(TokioIo::new(stream), service)
        .await
    {
        tracing::debug!(%error, host = arrival.host, "connection ended early");
    }
}

async fn echo(arrival: &Arrival, tls: &Value, request: Request<Incoming>) -> Response<Body> {
    let (head, mut body) = request.into_parts();
    let mut received = 0u64;
    while let Some(frame) = body.frame().await {
        // A body that breaks off ends here too.
        let Ok(frame) = frame else { break };
        received += frame
            .data_ref()
            .map_or(0, |data| u64::try_from(data.len()).unwrap_or(0));
    }
    let path = head.uri.path();
    let number = |prefix: &str| path.strip_prefix(prefix)?.parse::<u64>().ok();
    if let Some(length) = number("/bytes/") {
        return bytes(length.min(MAX_BYTES));
    }
    if let Some(delay) = number("/delay/") {
        tokio::time::sleep(Duration::from_millis(delay.min(MAX_DELAY))).await;
    }
    let status = number("/status/").and_then(|status| u16::try_from(status).ok());
    let text = |value: &header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let authority = head.uri.authority().map(ToString::to_string);
    let said = json!({
        "host": arrival.host,
        "method": head.method.as_str(),
        "path": head.uri.path_and_query().map(ToString::to_string),
        "authority": authority.or_else(|| head.headers.get(header::HOST).map(text)),
        "version": format!("{:?}", head.version),
        "peer": arrival.peer.to_string(),
        "tls": tls,
        "headers": head.headers.iter().map(|(k, v)| (k.to_string(), json!(text(v))))
            .collect::<serde_json::Map<_, _>>(),
        "bodyBytes": received,
    });
    let mut response = Response::new(Full::new(Bytes::from(format!("{said}\n"))).boxed_unsync());
    // A final status only: hyper sends nothing after 1xx.
    let status = status.filter(|status| (200..600).contains(status));
    if let Some(status) = status.and_then(|status| http::StatusCode::from_u16(status).ok()) {
        *response.status_mut() = status;
    }
    let kind = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

fn bytes(length: u64) -> Response<Body> {
    static CHUNK: [u8; 1 << 16] = [b'x'; 1 << 16];
    let chunks = stream::unfold(length, |left| async move {
        if left == 0 {
            return None;
        }
        let part = left.min(1 << 16);
        let end = usize::try_from(part).unwrap_or(CHUNK.len());
        Some((
            Ok(Frame::data(Bytes::from_static(&CHUNK[..end]))),
            left - part,
        ))
    });
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(chunks)));
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, length.into());
    response
}

/// What came over the wire on one connection.
#[derive(Debug, Default)]
pub(super) struct Seen {
    bytes: AtomicU64,
    first: Mutex<Vec<u8>>,
}

/// A socket that notes what is read from it, before TLS.
struct Watched {
    stream: TcpStream,
    seen: Arc<Seen>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let read = &buffer.filled()[before..];
        let count = u64::try_from(read.len()).unwrap_or(0);
        // Past the first bytes the lock is not needed.
        if self.seen.bytes.fetch_add(count, Ordering::Relaxed) < 64 {
            let mut first = self.seen.first.lock();
            let room = FIRST.saturating_sub(first.len());
            first.extend(read.iter().take(room));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
