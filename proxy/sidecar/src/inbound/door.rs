//! The first bytes of an inbound connection: mesh TLS, the application's own TLS, or plaintext.

use std::{cell::Cell, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{net::TcpStream, time::timeout};
use turnpike_certs::peer_identity;
use turnpike_detect::{ClientHello, Detection};
use turnpike_rules::{
    ServiceKey,
    service::Protocol,
    workload::{MtlsMode, SelfConfig},
};
use turnpike_wire::names::{ServerName, parse_sni};

use super::{Caller, origin::Origin, reset};
use crate::{
    capture::is_loop,
    io::{Flight, Rewind, first_flight, prepare, speaks},
    limits::Permit,
    observe::{Direction, Refusal, RefusalReason},
    tls::{Inside, MESH_ALPN, Upstream},
    worker::Worker,
};

/// Takes a connection to where it belongs.
pub(super) async fn open(
    worker: &Rc<Worker>,
    stream: TcpStream,
    downstream: SocketAddr,
    permit: Permit,
) {
    prepare(&stream);
    let refuse = |original, reason, details: &str| {
        let downstream = Some(downstream);
        let direction = Direction::Inbound;
        worker.refuse(&Refusal {
            direction,
            reason,
            downstream,
            original,
            details,
        });
    };
    let original = match worker.shared.config.inbound.original.of(&stream) {
        Ok(original) => original,
        Err(error) => {
            let details = format!("no original destination is known: {error}");
            return refuse(None, RefusalReason::NotCaptured, &details);
        }
    };
    if is_loop(
        original,
        &worker.shared.config.pod_addresses,
        &worker.shared.listeners,
    ) {
        let details = "the destination is this proxy's own port";
        return refuse(Some(original), RefusalReason::Loop, details);
    }
    let caller = Caller {
        worker: worker.clone(),
        downstream,
        original,
        identity: None,
        origin: Origin::default(),
        service: None,
        sni: None,
        permit: Cell::new(Some(permit)),
    };
    caller.enter(stream).await;
}

impl Caller {
    async fn enter(self, mut stream: TcpStream) {
        let config = self.worker.inbound.config();
        let (read, flight) = self.listen(&mut stream, self.patience(&config)).await;
        match flight {
            Flight::Silent if self.may_wait_for_server(&config) => {
                self.wait_for_either(stream).await;
            }
            flight => self.decide(stream, read, flight).await,
        }
    }

    async fn listen(&self, stream: &mut TcpStream, patience: Duration) -> (Bytes, Flight) {
        first_flight(stream, patience, self.worker.shared.config.bounds.head).await
    }

    fn declared(&self, config: &SelfConfig) -> Protocol {
        let port = config
            .ports
            .iter()
            .find(|declared| declared.port == self.original.port());
        port.map_or(Protocol::Detect, |port| port.protocol)
    }

    /// Whether a silent client may be one that waits for the application to speak.
    fn may_wait_for_server(&self, config: &SelfConfig) -> bool {
        config.mtls_for(self.original.port()) == MtlsMode::Permissive
            && matches!(self.declared(config), Protocol::Detect | Protocol::Tcp)
    }

    /// How long the client may take to begin.
    fn patience(&self, config: &SelfConfig) -> Duration {
        let bounds = &self.worker.shared.config.bounds;
        match self.declared(config) {
            _ if config.mtls_for(self.original.port()) == MtlsMode::Strict => bounds.head,
            Protocol::Http1 | Protocol::Http2 | Protocol::Tls => bounds.idle,
            Protocol::Detect | Protocol::Tcp => bounds.silence,
        }
    }

    /// Both are silent. The application is called, and whoever speaks first decides: a client
    /// that is merely slow or far away is still told from one that waits, and its TLS is never
    /// taken for the application's bytes.
    async fn wait_for_either(self, stream: TcpStream) {
        let (app, judged) = match self.dial().await {
            Ok(dialled) => dialled,
            Err(why @ (RefusalReason::NoRoute, _)) => {
                let _ = reset(&stream);
                return self.refuse(why);
            }
            Err(why) => return self.hear_out(stream, Some(why)).await,
        };
        let Upstream::Plain(app) = app else {
            return;
        };
        let idle = self.worker.shared.config.bounds.idle;
        let forbidden = tokio::select! {
            biased;
            why = self.forbidden(&judged) => Some(why),
            _ = speaks(&stream) => None,
            _ = speaks(&app) => {
                return self.relay(stream, Upstream::Plain(app), judged).await;
            }
            () = tokio::time::sleep(idle) => {
                let details = "neither the client nor the application said anything";
                return self.refuse((RefusalReason::Slow, details.into()));
            }
        };
        drop(app);
        self.hear_out(stream, forbidden).await;
    }

    /// Returns when opaque bytes of this caller are not allowed any more.
    async fn forbidden(&self, judged: &Arc<SelfConfig>) -> (RefusalReason, String) {
        let mut own = self.worker.shared.mesh.watch_self();
        loop {
            let now = own.borrow_and_update().clone();
            if !Arc::ptr_eq(&now, judged)
                && let Err(why) = self.judge_tcp(&now)
            {
                return why;
            }
            if own.changed().await.is_err() {
                // The control side is gone: the last good state holds.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Gives the client the time for a head. Plaintext of it may have been refused already, but
    /// what is only slow to begin may be mesh TLS, whose certificate decides.
    async fn hear_out(self, mut stream: TcpStream, refused: Option<(RefusalReason, String)>) {
        let patience = self.worker.shared.config.bounds.head;
        let (read, flight) = self.listen(&mut stream, patience).await;
        match (flight, refused) {
            (Flight::Silent, Some(why)) => {
                let _ = reset(&stream);
                self.refuse(why);
            }
            (flight, _) => self.decide(stream, read, flight).await,
        }
    }

    async fn decide(self, stream: TcpStream, read: Bytes, flight: Flight) {
        let config = self.worker.inbound.config();
        let detection = match flight {
            Flight::Detected(detection) => detection,
            Flight::Closed if read.is_empty() => return,
            Flight::Closed => Detection::Opaque,
            // Declared opaque bytes may begin as slowly as they like, but for mesh TLS.
            Flight::Slow if opaque(self.declared(&config)) && read.first() != Some(&0x16) => {
                Detection::Opaque
            }
            Flight::Slow | Flight::Silent => {
                let details = "nothing, half a TLS handshake or half a request line arrived in \
                               the time for it; send it whole, or declare the port as TCP";
                return self.refuse((RefusalReason::Slow, details.into()));
            }
        };
        if let Detection::Tls(hello) = &detection
            && hello.offers_prefix(MESH_ALPN)
        {
            return self.terminate(stream, read, hello, &config).await;
        }
        if let Err(why) = self.judge(&config) {
            let _ = reset(&stream);
            return self.refuse(why);
        }
        let declared = self.declared(&config);
        match detection {
            Detection::Http1 | Detection::Http2 if !opaque(declared) => {
                let http2 = detection == Detection::Http2;
                self.serve_http(Rewind::new(read, stream), http2).await;
            }
            _ => self.pass(stream, read).await,
        }
    }

    /// Ends mesh TLS here: the name must be one of ours, the client must be who it says.
    async fn terminate(
        mut self,
        stream: TcpStream,
        read: Bytes,
        hello: &ClientHello,
        config: &SelfConfig,
    ) {
        match backed(hello.sni.as_deref(), self.original.port(), config) {
            Some(service) => self.service = service,
            None => {
                let name = hello.sni.as_deref().unwrap_or("(none)");
                let port = self.original.port();
                let details = format!(
                    "the server name {name} on port {port} names no Service port that this pod \
                     backs; the caller's endpoints may be out of date"
                );
                return self.refuse((RefusalReason::ServerName, details));
            }
        }
        self.sni.clone_from(&hello.sni);
        let bounds = &self.worker.shared.config.bounds;
        let accept = self
            .worker
            .shared
            .tls
            .acceptor()
            .accept(Rewind::new(read, stream));
        let stream = match timeout(bounds.head, accept).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                return self.refuse((RefusalReason::Handshake, error.to_string()));
            }
            Err(_) => {
                return self.refuse((
                    RefusalReason::Slow,
                    "the TLS handshake took too long".into(),
                ));
            }
        };
        let session = stream.get_ref().1;
        let leaf = session.peer_certificates().and_then(<[_]>::first);
        let identity = leaf.map(|leaf| peer_identity(leaf));
        let inside = Inside::from_alpn(session.alpn_protocol());
        match (identity, inside) {
            (Some(Ok(identity)), Some(inside)) => {
                self.origin = Origin::ask(&self.worker, self.downstream.ip(), &identity);
                self.identity = Some(identity);
                match inside {
                    Inside::Http1 => self.serve_http(stream, false).await,
                    Inside::Http2 => self.serve_http(stream, true).await,
                    Inside::Tcp => self.pass(stream, Bytes::new()).await,
                }
            }
            (identity, _) => {
                let why = identity
                    .and_then(Result::err)
                    .map(|error| error.to_string());
                let why = why.unwrap_or_else(|| "no certificate, or no protocol agreed on".into());
                self.refuse((RefusalReason::Handshake, why));
            }
        }
    }
}

/// Whether what was declared is never looked into.
fn opaque(declared: Protocol) -> bool {
    matches!(declared, Protocol::Tcp | Protocol::Tls)
}

/// The Service that a server name means; `Some(None)` for this pod itself, `None` for what is not
/// served here.
fn backed(sni: Option<&str>, port: u16, config: &SelfConfig) -> Option<Option<ServiceKey>> {
    match parse_sni(sni?)? {
        ServerName::Service {
            key,
            port: service_port,
        } => {
            let backed = config.backs.iter().find(|backed| backed.key == key)?;
            let mapped = backed
                .ports
                .iter()
                .any(|mapping| mapping.service_port == service_port && mapping.target_port == port);
            mapped.then_some(Some(key))
        }
        ServerName::Workload { uid, port: named } => {
            (uid == config.uid && named == port).then_some(None)
        }
    }
}
