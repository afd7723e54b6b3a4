//! gRPC over TLS 1.3: to the controller, to any server of the mesh, and serving it.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};
use turnpike_certs::{InvalidBundle, TrustBundle};
use turnpike_daemon::slots::ConnectionSlots;

use crate::names::ALPN_GRPC;

/// For the name, the connection and the handshake together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A dead peer is noticed within the sum of both.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// A client that has not finished its handshake by then is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at once.
const HANDSHAKES: usize = 256;
/// Connections past their handshake that the server has not taken. At one more, handshakes wait.
const WAITING: usize = 16;
/// After a failed accept (no descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where the controller is, and how the two sides know each other: its certificate must bear
/// `server_name` and lead to a root in `root_file`; the caller shows the token in `token_file`.
///
/// Both files are read anew for each connection, since both are rotated under a running process.
#[derive(Clone, Debug)]
pub struct Controller {
    /// `host:port`.
    pub address: String,
    pub server_name: String,
    pub root_file: PathBuf,
    pub token_file: PathBuf,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot read {what} `{}`: {source}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("`{}` cannot be used: {source}", path.display())]
    Roots {
        path: PathBuf,
        source: InvalidBundle,
    },
    #[error("the token in `{}` is empty or has characters that no token has", .0.display())]
    Token(PathBuf),
    #[error("`{0}` is not host:port")]
    Address(String),
    #[error("`{0}` is not a DNS name that a certificate could bear")]
    ServerName(String),
    #[error("cannot connect to {address}: {reason}")]
    Transport { address: String, reason: String },
}

impl Controller {
    /// Opens one connection. It does not come back by itself: whoever uses it connects again.
    pub async fn connect(&self) -> Result<Channel, ConnectError> {
        let roots = self.roots().await?;
        let config = turnpike_certs::controller_client_config(&roots, ALPN_GRPC);
        connect(&self.address, &self.server_name, config).await
    }

    /// The roots in `root_file` as they are now.
    pub async fn roots(&self) -> Result<TrustBundle, ConnectError> {
        let path = self.root_file.clone();
        let pem = tokio::fs::read(&path)
            .await
            .map_err(|source| ConnectError::File {
                what: "the mesh's roots",
                path: path.clone(),
                source,
            })?;
        TrustBundle::from_pem(&pem).map_err(|source| ConnectError::Roots { path, source })
    }

    /// The value of `authorization` with the token as it is now. It is marked as sensitive, so
    /// that nothing prints it.
    pub async fn bearer(&self) -> Result<MetadataValue<Ascii>, ConnectError> {
        let path = &self.token_file;
        let token = tokio::fs::read_to_string(path)
            .await
            .map_err(|source| ConnectError::File {
                what: "the service-account token",
                path: path.clone(),
                source,
            })?;
        let token = token.trim();
        if token.is_empty() {
            return Err(ConnectError::Token(path.clone()));
        }
        let mut value: MetadataValue<Ascii> = format!("Bearer {token}")
            .parse()
            .map_err(|_| ConnectError::Token(path.clone()))?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// A request with the token in it.
    pub async fn request<T>(&self, message: T) -> Result<tonic::Request<T>, ConnectError> {
        let mut request = tonic::Request::new(message);
        request
            .metadata_mut()
            .insert("authorization", self.bearer().await?);
        Ok(request)
    }
}

/// Opens a gRPC connection over TLS to any server, on the terms of `config`.
pub async fn connect(
    address: &str,
    server_name: &str,
    config: Arc<ClientConfig>,
) -> Result<Channel, ConnectError> {
    let name = ServerName::try_from(server_name.to_owned())
        .map_err(|_| ConnectError::ServerName(server_name.to_owned()))?;
    let endpoint = Endpoint::from_shared(format!("https://{address}"))
        .map_err(|_| ConnectError::Address(address.to_owned()))?
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let target = address.to_owned();
    let connector = tower::service_fn(move |_| {
        let (target, name, config) = (target.clone(), name.clone(), config.clone());
        async move {
            let handshake = async {
                let tcp = TcpStream::connect(&target).await?;
                tcp.set_nodelay(true)?;
                TlsConnector::from(config).connect(name, tcp).await
            };
            let stream = timeout(CONNECT_TIMEOUT, handshake)
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|error| ConnectError::Transport {
            address: address.to_owned(),
            reason: reasons(&error),
        })
}

/// Accepts TLS connections for `tonic::transport::Server::serve_with_incoming`.
///
/// Ends when the stream is dropped. Handshakes run side by side, and one client's cannot keep out
/// another's ([`ConnectionSlots`]); one that fails is logged and leaves no trace in the stream.
pub fn accept_tls(
    listener: TcpListener,
    config: Arc<ServerConfig>,
) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (done, incoming) = mpsc::channel(WAITING);
    let acceptor = TlsAcceptor::from(config);
    tokio::spawn(async move {
        let mut slots = ConnectionSlots::new(HANDSHAKES, HANDSHAKE_TIMEOUT);
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = done.closed() => return,
            };
            match accepted {
                Ok((tcp, peer)) => {
                    let (acceptor, done) = (acceptor.clone(), done.clone());
                    let connection = async move {
                        if let Some(stream) = handshake(tcp, peer, &acceptor).await {
                            let _ = done.send(Ok(stream)).await;
                        }
                    };
                    slots.take(peer.ip(), connection).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    ReceiverStream::new(incoming)
}

async fn handshake(
    tcp: TcpStream,
    peer: SocketAddr,
    acceptor: &TlsAcceptor,
) -> Option<TlsStream<TcpStream>> {
    let _ = tcp.set_nodelay(true);
    match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp)).await {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
        Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
    }
    None
}

/// An error with its causes, which tonic's own text leaves out.
pub(crate) fn reasons(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
