//! What the application sends: found in the mesh, routed, balanced; or passed on as it is.

mod http;

use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::net::TcpStream;
use turnpike_detect::Detection;
use turnpike_rules::{
    ServiceKey,
    service::Protocol,
    traffic::{Timeouts, TrafficPolicy},
    workload::Workload,
};

use self::http::{Outbound, Target};
use crate::{
    capture::is_loop,
    circuit::Circuit,
    endpoint::Endpoint,
    error::ProxyError,
    http::{
        self as proxy,
        destination::{Destination, Picker, Policy},
        exchange::Connection,
        progress::UnderWay,
    },
    io::{Flight, Rewind, connect, first_flight, prepare},
    limits::Permit,
    mesh::Lookup,
    observe::{Direction, Flags, Labels, Refusal, RefusalReason},
    service::{Port, is_server_first},
    shared::SharedService,
    tcp::{Carried, Learn},
    tls::{Inside, Upstream},
    worker::{Accepted, Worker},
};

/// For a destination outside the mesh, which may be far away. The application has been connected
/// for as long as this takes, and most clients give an address up after ten seconds.
const PASS_THROUGH_CONNECT: Duration = Duration::from_secs(5);

/// Serves one captured connection of the application.
pub(crate) async fn serve(worker: &Rc<Worker>, accepted: Accepted) {
    let Accepted {
        stream,
        downstream,
        permit,
        ..
    } = accepted;
    prepare(&stream);
    let original = match worker.shared.config.outbound.original.of(&stream) {
        Ok(original) => original,
        Err(error) => {
            let details = format!("no original destination is known: {error}");
            return refuse(
                worker,
                downstream,
                None,
                RefusalReason::NotCaptured,
                &details,
            );
        }
    };
    if is_loop(
        original,
        &worker.shared.config.pod_addresses,
        &worker.shared.listeners,
    ) {
        let details = "the destination is this proxy's own port";
        return refuse(
            worker,
            downstream,
            Some(original),
            RefusalReason::Loop,
            details,
        );
    }
    let client = Client {
        worker: worker.clone(),
        stream,
        downstream,
        original,
        permit: Cell::new(Some(permit)),
    };
    match worker.shared.mesh.destination(original.ip()).await {
        Lookup::Unknown => client.pass_through().await,
        Lookup::Unanswered => {
            let details = "what stands at this mesh address is not known, since the control plane \
                did not answer; it may be a pod that must be spoken to in mutual TLS";
            client.refuse(RefusalReason::NoRoute, details);
        }
        Lookup::Service(key) => client.call_service(key).await,
        Lookup::Workload(workload) => client.call_pod(&workload).await,
    }
}

fn refuse(
    worker: &Worker,
    downstream: SocketAddr,
    original: Option<SocketAddr>,
    reason: RefusalReason,
    details: &str,
) {
    let downstream = Some(downstream);
    let direction = Direction::Outbound;
    worker.refuse(&Refusal {
        direction,
        reason,
        downstream,
        original,
        details,
    });
}

/// The application's end of a connection whose destination is known.
struct Client {
    worker: Rc<Worker>,
    stream: TcpStream,
    downstream: SocketAddr,
    original: SocketAddr,
    /// Taken over by the connection once that is more than bytes to look at.
    permit: Cell<Option<Permit>>,
}

/// What the client speaks, with what was read to find out.
enum Speaks {
    Http {
        http2: bool,
        read: Bytes,
    },
    /// Opaque; `silent`: the client waited for the server.
    Bytes {
        read: Bytes,
        silent: bool,
    },
    Nothing,
}

impl Client {
    fn connection(&self) -> Rc<Connection> {
        Rc::new(Connection {
            observer: self.worker.shared.observer.clone(),
            direction: Direction::Outbound,
            downstream: self.downstream,
            original: self.original,
            peer: None,
            sni: None,
            under_way: UnderWay::default(),
            idle_since: Cell::new(self.worker.now()),
            permit: self.permit.take(),
        })
    }

    /// Finds out the protocol where it is not declared. A declared HTTP port carries either
    /// version, whichever the client begins with.
    async fn speaks(&mut self, declared: Protocol, server_first: bool) -> Speaks {
        let opaque = |read, silent| Speaks::Bytes { read, silent };
        let bounds = &self.worker.shared.config.bounds;
        let http = matches!(declared, Protocol::Http1 | Protocol::Http2);
        if matches!(declared, Protocol::Tcp | Protocol::Tls) || server_first {
            return opaque(Bytes::new(), false);
        }
        let silence = if http { bounds.idle } else { bounds.silence };
        let (read, flight) = first_flight(&mut self.stream, silence, bounds.head).await;
        match flight {
            Flight::Detected(Detection::Http1) => Speaks::Http { http2: false, read },
            Flight::Detected(Detection::Http2) => Speaks::Http { http2: true, read },
            // Not what was declared: the HTTP parser says so to the client.
            Flight::Detected(_) if http => Speaks::Http { http2: false, read },
            Flight::Detected(_) => opaque(read, false),
            Flight::Silent if http => Speaks::Nothing,
            Flight::Silent => opaque(read, true),
            // What an opaque protocol begins slowly is still its own.
            Flight::Slow if !http => opaque(read, false),
            Flight::Slow => {
                let details = "the request head took too long; send it whole";
                self.refuse(RefusalReason::Slow, details);
                Speaks::Nothing
            }
            Flight::Closed if read.is_empty() => Speaks::Nothing,
            Flight::Closed => opaque(read, false),
        }
    }

    /// Where nothing can be reached the connection is reset, as the server's own would have been,
    /// so that the application tries its next address at once.
    fn refuse(&self, reason: RefusalReason, details: &str) {
        if reason == RefusalReason::NoRoute {
            let _ = self.stream.set_zero_linger();
        }
        refuse(
            &self.worker,
            self.downstream,
            Some(self.original),
            reason,
            details,
        );
    }

    /// A destination outside the mesh: bytes to where the application wanted them. What may leave
    /// is the gate's decision.
    async fn pass_through(self) {
        let labels = Labels {
            direction: Direction::Outbound,
            peer: None,
            names: None,
            service: None,
            passthrough: true,
            grpc: false,
            mutual_tls: false,
        };
        let series = self.worker.shared.observer.tcp(&labels);
        let mut server = match connect(self.original, PASS_THROUGH_CONNECT).await {
            Ok(server) => server,
            Err(error) => {
                series.opened();
                series.closed(Flags::CONNECT_FAILED);
                return self.refuse(
                    RefusalReason::NoRoute,
                    &format!("connecting to {}: {error}", self.original),
                );
            }
        };
        let carried = Carried {
            connection: self.connection(),
            series,
            idle: Timeouts::default().idle,
            upstream: self.original,
            service: None,
            callee: None,
            still_allowed: None,
            server_first: None,
        };
        let mut client = self.stream;
        carried.run(&self.worker, &mut client, &mut server).await;
    }

    /// Ends the client's connection as a refused one ends, so that it fails at once.
    fn fail(self, error: &io::Error) {
        tracing::debug!(original = %self.original, %error, "connecting failed");
        let _ = self.stream.set_zero_linger();
    }

    async fn call_service(mut self, key: ServiceKey) {
        let service = match self.worker.service(&key).await {
            Ok(service) => service,
            Err(missing) => {
                let details = ProxyError::NoService(key, missing).to_string();
                return self.refuse(RefusalReason::NoRoute, &details);
            }
        };
        let Ok(Some(port)) = service.port(&self.worker, self.original.port()) else {
            let error = ProxyError::NoPort {
                service: key,
                port: self.original.port(),
            };
            return self.refuse(RefusalReason::NoRoute, &error.to_string());
        };
        let declared = port.declared().protocol;
        match self.speaks(declared, port.is_server_first()).await {
            Speaks::Nothing => {}
            Speaks::Http { http2, read } => {
                let target = Target::Service {
                    service: RefCell::new(service),
                    port: port.port,
                };
                self.serve_http(target, http2, read).await;
            }
            Speaks::Bytes { read, silent } => {
                let picker = Picker::Among(port.clone());
                let learn = silent.then_some(port.clone());
                let policy = Policy::OfService(port.view.clone());
                self.relay_to(picker, &service.circuit, &policy, read, learn)
                    .await;
            }
        }
    }

    /// The application chose this pod itself: the endpoint is kept, its Service's policy holds.
    async fn call_pod(mut self, workload: &Arc<Workload>) {
        let Some(endpoint) = self.worker.direct(workload, self.original.port()) else {
            return self.refuse(RefusalReason::NoRoute, "the pod's uid makes no server name");
        };
        let declared = workload
            .ports
            .iter()
            .find(|port| port.port == self.original.port());
        let declared = declared.map_or(Protocol::Detect, |port| port.protocol);
        let direct = Direct::new(&self.worker, endpoint);
        let server_first = declared == Protocol::Detect && is_server_first(self.original.port());
        match self.speaks(declared, server_first).await {
            Speaks::Nothing => {}
            Speaks::Http { http2, read } => {
                let target = Target::Pod(RefCell::new(Rc::new(direct)));
                self.serve_http(target, http2, read).await;
            }
            Speaks::Bytes { read, .. } => {
                let to = direct.destination(&self.worker).await;
                self.relay_to(to.picker, &to.circuit, &to.policy, read, None)
                    .await;
            }
        }
    }

    async fn serve_http(self, target: Target, http2: bool, read: Bytes) {
        let connection = self.connection();
        let handler = Outbound::new(
            self.worker.clone(),
            connection.clone(),
            target,
            self.original,
        );
        let stream = Rewind::new(read, self.stream);
        proxy::serve(&self.worker, stream, http2, Rc::new(handler), connection).await;
    }

    /// Opaque bytes to an endpoint; another is tried while nothing has been sent.
    async fn relay_to(
        self,
        mut picker: Picker,
        circuit: &Rc<Circuit>,
        policy: &Policy,
        read: Bytes,
        learn: Option<Rc<Port>>,
    ) {
        let mut tried = Vec::new();
        let connected = loop {
            // Waiting for the client's first bytes, or for one that does not answer, takes time.
            picker = match picker.renewed(&self.worker).await {
                Ok(picker) => picker,
                Err(error) => break Err((error, None)),
            };
            let Some(endpoint) = picker.pick(&self.worker, &tried) else {
                let error = ProxyError::NoEndpoint(circuit.name.clone());
                break Err((error, None));
            };
            let Some(permit) = circuit.try_connection() else {
                let limit = circuit.max_connections.get();
                break Err((circuit.overflow("connections", limit), Some(endpoint)));
            };
            match endpoint
                .dial(&self.worker, circuit.connect.get(), Inside::Tcp)
                .await
            {
                Ok(server) => break Ok((endpoint, server, permit)),
                Err(error) if tried.len() >= policy.retry.attempts as usize => {
                    break Err((error, Some(endpoint)));
                }
                Err(_) => tried.push(endpoint),
            }
        };
        let (endpoint, mut server, _permit) = match connected {
            Ok(connected) => connected,
            Err((error, endpoint)) => {
                if let Some(endpoint) = endpoint {
                    let series = endpoint.tcp_series(&*self.worker.shared.observer);
                    series.opened();
                    series.closed(error.flags());
                }
                return self.fail(&io::Error::other(error));
            }
        };
        // Nobody had spoken by the time the connection was passed on. If the server does so first, the
        // next connections to the port need not wait.
        let learn = learn.filter(|_| matches!(server, Upstream::Plain(_)));
        let carried = Carried {
            connection: self.connection(),
            series: endpoint.tcp_series(&*self.worker.shared.observer),
            idle: policy.timeouts.idle,
            upstream: endpoint.address,
            service: endpoint.service.clone(),
            callee: endpoint.identity().cloned(),
            still_allowed: None,
            server_first: learn
                .map(|port| -> Learn { Box::new(move |it| port.server_first.set(it)) }),
        };
        let mut client = Rewind::new(read, self.stream);
        carried.run(&self.worker, &mut client, &mut server).await;
    }
}

/// A pod called by its own address, with what holds where no Service says anything.
struct Direct {
    endpoint: Rc<Endpoint>,
    circuit: Rc<Circuit>,
    shared: Arc<SharedService>,
    policy: Rc<TrafficPolicy>,
}

impl Direct {
    fn new(worker: &Worker, endpoint: Rc<Endpoint>) -> Self {
        let (circuit, shared) = worker.unlimited(&format!("pod {}", endpoint.address));
        Self {
            endpoint,
            circuit,
            shared,
            policy: Rc::default(),
        }
    }

    /// The pod, under what its Service says now.
    async fn destination(&self, worker: &Worker) -> Destination {
        let picker = Picker::Pod(self.endpoint.clone());
        let service = match &self.endpoint.service {
            Some(key) => worker.service(key).await.ok(),
            None => None,
        };
        match service {
            Some(service) => Destination {
                picker,
                circuit: service.circuit.clone(),
                shared: service.shared.clone(),
                policy: Policy::OfService(service.view()),
                route: None,
            },
            None => Destination {
                picker,
                circuit: self.circuit.clone(),
                shared: self.shared.clone(),
                policy: Policy::Own(self.policy.clone()),
                route: None,
            },
        }
    }
}
