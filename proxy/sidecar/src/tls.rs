//! Mesh TLS: both ends are workloads, the protocol inside is named by ALPN.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};
use turnpike_certs::{Connector, CredentialStore, server_config};
use turnpike_rules::Identity;
use turnpike_wire::names::{ALPN_HTTP1, ALPN_HTTP2, ALPN_TCP};

/// What all ALPN names of the mesh begin with; any other TLS is the application's own.
pub(crate) const MESH_ALPN: &[u8] = b"turnpike/";

/// What travels inside mesh TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Inside {
    Http1,
    Http2,
    Tcp,
}

impl Inside {
    fn alpn(self) -> &'static str {
        match self {
            Self::Http1 => ALPN_HTTP1,
            Self::Http2 => ALPN_HTTP2,
            Self::Tcp => ALPN_TCP,
        }
    }

    pub(crate) fn from_alpn(alpn: Option<&[u8]>) -> Option<Self> {
        [Self::Http1, Self::Http2, Self::Tcp]
            .into_iter()
            .find(|inside| alpn == Some(inside.alpn().as_bytes()))
    }
}

/// A peer of the mesh: who it must be, and which of its doors is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) identity: Identity,
    pub(crate) server_name: ServerName<'static>,
}

/// Both ends of mesh TLS, for all workers.
pub(crate) struct MeshTls {
    http1: Connector,
    http2: Connector,
    tcp: Connector,
    acceptor: TlsAcceptor,
}

impl MeshTls {
    pub(crate) fn new(store: &Arc<CredentialStore>) -> Self {
        let connector = |inside: Inside| Connector::new(store.clone(), inside.alpn());
        let all = [ALPN_HTTP2, ALPN_HTTP1, ALPN_TCP];
        Self {
            http1: connector(Inside::Http1),
            http2: connector(Inside::Http2),
            tcp: connector(Inside::Tcp),
            acceptor: TlsAcceptor::from(server_config(store.clone(), &all)),
        }
    }

    pub(crate) fn acceptor(&self) -> &TlsAcceptor {
        &self.acceptor
    }

    /// Handshakes as a client. Fails unless the peer is who it must be and agrees on what is
    /// inside.
    pub(crate) async fn connect(
        &self,
        stream: TcpStream,
        peer: &Peer,
        inside: Inside,
    ) -> io::Result<TlsStream<TcpStream>> {
        let connector = match inside {
            Inside::Http1 => &self.http1,
            Inside::Http2 => &self.http2,
            Inside::Tcp => &self.tcp,
        };
        let connector = TlsConnector::from(connector.config(&peer.identity));
        let stream = connector.connect(peer.server_name.clone(), stream).await?;
        if Inside::from_alpn(stream.get_ref().1.alpn_protocol()) != Some(inside) {
            return Err(io::Error::other(
                "the peer does not speak the mesh's protocol",
            ));
        }
        Ok(stream)
    }
}

/// A connection to an endpoint: TLS to one of the mesh, plaintext to one without a sidecar.
#[derive(Debug)]
pub(crate) enum Upstream {
    Plain(TcpStream),
    Mesh(Box<TlsStream<TcpStream>>),
}

macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match &mut *$self {
            Upstream::Plain($stream) => $call,
            Upstream::Mesh($stream) => $call,
        }
    };
}

impl AsyncRead for Upstream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Upstream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Mesh(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}
