//! The smallest HTTP client that can ask from inside a namespace.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use turnpike_vpc::netns::Namespace;

const LIMIT: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub body: String,
}

/// `GET path` over a connection made inside `namespace`.
pub fn get(namespace: &Namespace, address: SocketAddr, path: &str) -> Result<Response> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    exchange(namespace, address, request.as_bytes())
}

/// Sends bytes as they are, reads until the peer closes, and parses what looks like a response.
pub fn exchange(namespace: &Namespace, address: SocketAddr, request: &[u8]) -> Result<Response> {
    let answer = namespace.run(|| -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(request)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    })??;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head
        .split_whitespace()
        .nth(1)
        .and_then(|status| status.parse().ok())
        .with_context(|| format!("{address} did not answer HTTP: {head:.80}"))?;
    Ok(Response {
        status,
        body: body.to_owned(),
    })
}
