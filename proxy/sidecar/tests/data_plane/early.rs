//! Servers that answer before they have read all of a request, and close or do not.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::{
    apps::{Body, full, get, serve},
    world::{Pair, Setup, Sidecar, Trust, web},
};

const TOO_LARGE: &[u8] = b"HTTP/1.1 413 Too Large\r\nContent-Length: 9\r\n\r\ntoo large";
const BODY: usize = 64 * 1024 * 1024;

/// Answers one request a connection, at its head. `closes`: and closes at once, with the body unread; else it
/// neither reads the body nor closes.
async fn early(closes: bool) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let open = Arc::new(AtomicUsize::new(0));
    let count = open.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            count.fetch_add(1, SeqCst);
            let count = count.clone();
            tokio::spawn(async move {
                let mut buffer = [0; 1024];
                let _ = stream.read(&mut buffer).await;
                stream.write_all(TOO_LARGE).await.unwrap();
                // Else until the other side has enough.
                while !closes
                    && !stream
                        .ready(Interest::READABLE)
                        .await
                        .unwrap()
                        .is_read_closed()
                {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                count.fetch_sub(1, SeqCst);
            });
        }
    });
    (address, open)
}

/// Uploads as HTTP/1 clients do: writes to the end, or until it is answered.
async fn upload(address: SocketAddr) -> String {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let head = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {BODY}\r\n\r\n");
    let writing = tokio::spawn(async move {
        let piece = vec![b'x'; 64 * 1024];
        let _ = write.write_all(head.as_bytes()).await;
        for _ in 0..BODY / piece.len() {
            if write.write_all(&piece).await.is_err() {
                break;
            }
        }
        write
    });
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    let reading = async {
        while !answer.ends_with(b"too large") {
            match read.read(&mut buffer).await {
                Ok(count @ 1..) => answer.extend_from_slice(&buffer[..count]),
                _ => break,
            }
        }
    };
    timeout(Duration::from_secs(20), reading).await.unwrap();
    writing.abort();
    String::from_utf8_lossy(&answer).into_owned()
}

async fn upload2(address: SocketAddr) -> (u16, Bytes) {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = Request::post("http://a/").body(()).unwrap();
    let (response, mut body) = client.send_request(request, false).unwrap();
    let piece = Bytes::from(vec![b'x'; BODY]);
    body.send_data(piece, true).unwrap();
    let response = timeout(Duration::from_secs(20), response).await.unwrap();
    let response = response.unwrap();
    let status = response.status().as_u16();
    let mut body = response.into_body();
    let mut answer = Vec::new();
    while let Some(data) = body.data().await {
        match data {
            Ok(data) => answer.extend_from_slice(&data),
            // RFC 9113 §8.1: what ends an upload that is not wanted is no error.
            Err(error) => {
                assert_eq!(error.reason(), Some(h2::Reason::NO_ERROR), "{error}");
                break;
            }
        }
    }
    drop(connection);
    (status, answer.into())
}

fn alone(app: SocketAddr) -> Sidecar {
    let caller = Setup::caller().start(&Trust::new());
    caller.known.set_service(web(&[(app, None)]));
    caller
}

fn assert_answered(answer: &str) {
    assert!(
        answer.starts_with("HTTP/1.1 413") && answer.ends_with("\r\n\r\ntoo large"),
        "{answer}"
    );
}

#[tokio::test]
async fn the_answer_of_a_server_that_closes_early_arrives() {
    let (app, open) = early(true).await;
    let caller = alone(app);
    let pair = Pair::new(app);
    for _ in 0..20 {
        assert_answered(&upload(caller.outbound()).await);
        assert_answered(&upload(pair.caller.outbound()).await);
    }
    let line = pair.caller.seen.line(0).await;
    assert_eq!((line.status, line.flags.as_str()), (413, "-"));
    // And none of those connections is used again.
    assert_eq!(get(caller.outbound(), "/").await.0, 413);
    assert_eq!(open.load(SeqCst), 0);
}

#[tokio::test]
async fn a_server_that_never_reads_the_rest_holds_nobody() {
    let (app, _) = early(false).await;
    let pair = Pair::new(app);
    for _ in 0..3 {
        assert_answered(&upload(pair.caller.outbound()).await);
    }
    // Clients' connections end, and those between the sidecars, though nobody asked for it.
    let mut held = (0, 0);
    for _ in 0..500 {
        let between = pair.callee.plane.open_connections().0;
        held = (pair.caller.plane.open_connections().1, between);
        if held == (0, 0) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{held:?} connections are held");
}

#[tokio::test]
async fn an_http2_server_may_answer_early_too() {
    let app = serve(|request: Request<hyper::body::Incoming>| async move {
        // Dropped unread.
        drop(request);
        let response = Response::builder().status(413);
        response.body::<Body>(full("too large")).unwrap()
    })
    .await;
    let pair = Pair::new(app);
    for _ in 0..5 {
        let (status, body) = upload2(pair.caller.outbound()).await;
        assert_eq!((status, &*body), (413, &b"too large"[..]));
    }
    let client = crate::apps::http2(pair.caller.outbound()).await;
    assert_eq!(client.get("/").await.0, 413);
}
