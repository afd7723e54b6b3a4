//! The pretended internet: DNS, TLS and HTTP servers that remember what reached them.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use hickory_proto::{
    op::{Message, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType},
};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use socket2::{Domain, Socket, Type};

use crate::namespace::Namespace;

/// Certificates of the pretended internet.
pub(crate) struct Web {
    pub(crate) root: CertificateDer<'static>,
    config: Arc<ServerConfig>,
}

impl Web {
    pub(crate) fn new(names: &[&str]) -> Self {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certified = rcgen::generate_simple_self_signed(names).unwrap();
        let root = certified.cert.der().clone();
        let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
        let config = ServerConfig::builder_with_provider(turnpike_certs::crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![root.clone()], key.into())
            .unwrap();
        Self {
            root,
            config: Arc::new(config),
        }
    }
}

/// What came in at a server.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    bytes: Arc<AtomicU64>,
    last_peer: Arc<std::sync::Mutex<Option<SocketAddr>>>,
}

impl Seen {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    pub(crate) fn last_peer(&self) -> Option<SocketAddr> {
        *self.last_peer.lock().unwrap()
    }
}

/// Counts what is read through it.
struct Counting(TcpStream, Seen);

impl Read for Counting {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.0.read(buffer)?;
        self.1.bytes.fetch_add(n as u64, Ordering::SeqCst);
        Ok(n)
    }
}

impl Write for Counting {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// Serves each connection by `answer` on a thread of its own.
fn listen(
    outside: &Namespace,
    at: SocketAddr,
    answer: impl Fn(Counting) + Clone + Send + 'static,
) -> Seen {
    serve(outside.run(|| TcpListener::bind(at).unwrap()), answer)
}

fn serve(listener: TcpListener, answer: impl Fn(Counting) + Clone + Send + 'static) -> Seen {
    let seen = Seen::default();
    let counted = seen.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            *counted.last_peer.lock().unwrap() = stream.peer_addr().ok();
            let (answer, counted) = (answer.clone(), counted.clone());
            thread::spawn(move || answer(Counting(stream, counted)));
        }
    });
    seen
}

/// TLS that echoes.
pub(crate) fn tls(outside: &Namespace, at: SocketAddr, web: &Web) -> Seen {
    let config = web.config.clone();
    listen(outside, at, move |stream| {
        let session = ServerConnection::new(config.clone()).unwrap();
        let mut stream = StreamOwned::new(session, stream);
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..n]).is_err() {
                return;
            }
        }
    })
}

/// Plain bytes, echoed after a greeting: a server that speaks first.
pub(crate) fn greeter(outside: &Namespace, at: SocketAddr) -> Seen {
    listen(outside, at, |mut stream| {
        let _ = stream.write_all(b"220 ready\r\n");
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..n]).is_err() {
                return;
            }
        }
    })
}

/// Says its last at once and goes on to read, a little at a time: first so much, the rest when let
/// to by `go_on`.
pub(crate) fn slow_reader(
    outside: &Namespace,
    at: SocketAddr,
    first: usize,
    go_on: &Arc<AtomicBool>,
) -> Seen {
    let go_on = go_on.clone();
    serve(small(outside, at), move |mut stream| {
        stream.0.shutdown(Shutdown::Write).unwrap();
        let mut buffer = [0; 8192];
        let mut read = 0;
        loop {
            while read >= first && !go_on.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(10));
            }
            let Ok(n @ 1..) = stream.read(&mut buffer) else {
                return;
            };
            read += n;
            thread::sleep(Duration::from_millis(1));
        }
    })
}

pub(crate) const REFUSAL: &[u8] =
    b"HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// Answers after the first bytes and closes, whatever else is on its way.
pub(crate) fn refuser(outside: &Namespace, at: SocketAddr) -> Seen {
    listen(outside, at, |mut stream| {
        let _ = stream.read_exact(&mut [0; 1024]);
        let _ = stream.write_all(REFUSAL);
    })
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

/// Answers one request and closes without having said so.
pub(crate) fn once(outside: &Namespace, at: SocketAddr) -> Seen {
    listen(outside, at, |mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(OK);
    })
}

/// Answers when it has read the first bytes, and reads on, a little at a time.
pub(crate) fn hasty(outside: &Namespace, at: SocketAddr) -> Seen {
    serve(small(outside, at), |mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(OK);
        while let Ok(1..) = stream.read(&mut [0; 4096]) {
            thread::sleep(Duration::from_millis(20));
        }
    })
}

/// A listener whose connections take little before it is read.
fn small(outside: &Namespace, at: SocketAddr) -> TcpListener {
    outside.run(|| {
        let socket = Socket::new(Domain::for_address(at), Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.bind(&at.into()).unwrap();
        socket.listen(16).unwrap();
        TcpListener::from(socket)
    })
}

/// HTTP/1.1 whose answers' bodies are the heads of the requests as they arrived.
pub(crate) fn http(outside: &Namespace, at: SocketAddr) -> Seen {
    listen(outside, at, |mut stream| {
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            bytes.extend_from_slice(&buffer[..n]);
            while let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                let head: Vec<u8> = bytes.drain(..end + 4).collect();
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", head.len());
                let answer = [answer.as_bytes(), &head].concat();
                if stream.write_all(&answer).is_err() {
                    return;
                }
            }
        }
    })
}

/// Answers A and AAAA from a table; what is not in it does not exist.
pub(crate) fn dns(outside: &Namespace, at: SocketAddr, table: &[(&str, &[&str])]) -> Seen {
    let socket = outside.run(|| UdpSocket::bind(at).unwrap());
    let addresses = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect();
    let table: HashMap<String, Vec<IpAddr>> = table
        .iter()
        .map(|(name, texts)| ((*name).to_owned(), addresses(texts)))
        .collect();
    let seen = Seen::default();
    let counted = seen.clone();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((n, peer)) = socket.recv_from(&mut buffer) {
            counted.bytes.fetch_add(n as u64, Ordering::SeqCst);
            let query = Message::from_vec(&buffer[..n]).unwrap();
            let question = query.queries[0].clone();
            let mut answer = Message::response(query.metadata.id, OpCode::Query);
            let name = question.name().to_ascii();
            answer.add_query(question.clone());
            match table.get(name.trim_end_matches('.')) {
                Some(addresses) => {
                    for address in addresses {
                        let data = match (address, question.query_type()) {
                            (IpAddr::V4(v4), RecordType::A) => RData::A((*v4).into()),
                            (IpAddr::V6(v6), RecordType::AAAA) => RData::AAAA((*v6).into()),
                            _ => continue,
                        };
                        answer.add_answer(Record::from_rdata(question.name().clone(), 60, data));
                    }
                }
                None => answer.metadata.response_code = ResponseCode::NXDomain,
            }
            let _ = socket.send_to(&answer.to_vec().unwrap(), peer);
        }
    });
    seen
}

/// One question over UDP; the addresses, or the code that refused.
pub(crate) fn ask(
    pod: &Namespace,
    server: SocketAddr,
    name: &str,
    kind: RecordType,
) -> Result<Vec<IpAddr>, ResponseCode> {
    let bytes = pod.run(|| {
        let local: SocketAddr = if server.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        }
        .parse()
        .unwrap();
        let socket = UdpSocket::bind(local).unwrap();
        socket.connect(server).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut query = Message::query();
        let name = Name::from_ascii(format!("{name}.")).unwrap();
        query.add_query(hickory_proto::op::Query::query(name, kind));
        socket.send(&query.to_vec().unwrap()).unwrap();
        let mut buffer = vec![0; 4096];
        let n = socket
            .recv(&mut buffer)
            .unwrap_or_else(|error| panic!("no answer: {error}"));
        buffer.truncate(n);
        buffer
    });
    let answer = Message::from_vec(&bytes).unwrap();
    match answer.metadata.response_code {
        ResponseCode::NoError => Ok(answer
            .answers
            .iter()
            .filter_map(|record| record.data.ip_addr())
            .collect()),
        code => Err(code),
    }
}
