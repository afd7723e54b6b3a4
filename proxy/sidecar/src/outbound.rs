//! What the application sends: found in the mesh, routed, balanced; or passed on as it is.

use std::{cell::RefCell, io, net::SocketAddr, rc::Rc, sync::Arc};

use bytes::Bytes;
use http::{Request, Response, request::Parts};
use hyper::body::Incoming;
use tokio::net::TcpStream;
use turnpike_detect::Detection;
use turnpike_rules::{
    ServiceKey,
    route::{RequestView, Route},
    service::Protocol,
    traffic::Timeouts,
    workload::Workload,
};

use crate::{
    capture::is_loop,
    endpoint::Endpoint,
    error::{ProxyError, RequestKind, outbound_response},
    http::{
        self as proxy, Handler,
        body::ResponseBody,
        exchange::{Connection, Exchange, Finish},
        filters,
        forward::{Destination, Picker, Policy, forward},
        headers::{self, Checked},
        upgrade::Asked,
    },
    io::{Flight, Rewind, connect, first_flight, prepare, speaks},
    mesh::Lookup,
    observe::{Direction, Flags, Labels, Refusal, RefusalReason},
    pool::Circuit,
    service::{Port, Service, is_server_first},
    shared::SharedService,
    tcp::Carried,
    tls::Inside,
    worker::{Accepted, Worker},
};

/// Serves one captured connection of the application.
pub(crate) async fn serve(worker: &Rc<Worker>, accepted: Accepted) {
    let Accepted {
        stream,
        downstream,
        permit: _permit,
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
    };
    match worker.shared.mesh.destination(original.ip()).await {
        Lookup::Unknown => client.pass_through().await,
        Lookup::Unanswered => {
            let details = "what stands at this mesh address is not known, since the control plane \
                did not answer; it may be a pod that must be spoken to in mutual TLS";
            client.refuse(RefusalReason::NoRoute, details);
            let _ = client.stream.set_zero_linger();
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
            active: std::cell::Cell::new(0),
            idle_since: std::cell::Cell::new(self.worker.now()),
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

    fn refuse(&self, reason: RefusalReason, details: &str) {
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
        let deadline = Timeouts::default().connect.saturating_mul(10);
        let labels = Labels {
            direction: Direction::Outbound,
            peer: None,
            service: None,
            passthrough: true,
            grpc: false,
            mutual_tls: false,
        };
        let series = self.worker.shared.observer.tcp(&labels);
        let mut server = match connect(self.original, deadline).await {
            Ok(server) => server,
            Err(error) => {
                series.opened();
                series.closed(Flags::CONNECT_FAILED);
                return self.fail(&error);
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
        let Some(service) = self.worker.service(&key).await else {
            let details = ProxyError::NoService(key).to_string();
            return self.refuse(RefusalReason::NoRoute, &details);
        };
        let Ok(Some(port)) = service.port(&self.worker, self.original.port()) else {
            let error = ProxyError::NoPort {
                service: key,
                port: self.original.port(),
            };
            self.refuse(RefusalReason::NoRoute, &error.to_string());
            let _ = self.stream.set_zero_linger();
            return;
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
                self.relay_to(&picker, &service.circuit, &policy, read, learn)
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
        let direct = Direct::new(&self.worker, endpoint, workload).await;
        let server_first = declared == Protocol::Detect && is_server_first(self.original.port());
        match self.speaks(declared, server_first).await {
            Speaks::Nothing => {}
            Speaks::Http { http2, read } => {
                self.serve_http(Target::Pod(direct), http2, read).await;
            }
            Speaks::Bytes { read, .. } => {
                let picker = Picker::Only(direct.endpoint.clone());
                self.relay_to(&picker, &direct.circuit, &direct.policy, read, None)
                    .await;
            }
        }
    }

    async fn serve_http(self, target: Target, http2: bool, read: Bytes) {
        let connection = self.connection();
        let handler = Outbound {
            worker: self.worker.clone(),
            connection: connection.clone(),
            target,
            original: self.original,
        };
        let stream = Rewind::new(read, self.stream);
        proxy::serve(&self.worker, stream, http2, Rc::new(handler), connection).await;
    }

    /// Opaque bytes to an endpoint; another is tried while nothing has been sent.
    async fn relay_to(
        self,
        picker: &Picker,
        circuit: &Rc<Circuit>,
        policy: &Policy,
        read: Bytes,
        learn: Option<Rc<Port>>,
    ) {
        let mut tried = Vec::new();
        let connected = loop {
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
        if let Some(port) = learn {
            learn_server_first(&self.stream, &mut server, &port).await;
        }
        let carried = Carried {
            connection: self.connection(),
            series: endpoint.tcp_series(&*self.worker.shared.observer),
            idle: policy.timeouts.idle,
            upstream: endpoint.address,
            service: endpoint.service.clone(),
            callee: endpoint.identity().cloned(),
            still_allowed: None,
        };
        let mut client = Rewind::new(read, self.stream);
        carried.run(&self.worker, &mut client, &mut server).await;
    }
}

/// Nobody had spoken by the time the connection was passed on. If the server does so first, the
/// next connections to the port need not wait.
async fn learn_server_first(client: &TcpStream, server: &mut crate::tls::Upstream, port: &Port) {
    let crate::tls::Upstream::Plain(server) = server else {
        return;
    };
    tokio::select! {
        biased;
        _ = speaks(client) => {}
        first = speaks(server) => port.server_first.set(first),
    }
}

/// A pod called by its own address, with what its Service says.
struct Direct {
    endpoint: Rc<Endpoint>,
    circuit: Rc<Circuit>,
    shared: Arc<SharedService>,
    policy: Policy,
}

impl Direct {
    async fn new(worker: &Rc<Worker>, endpoint: Rc<Endpoint>, workload: &Workload) -> Self {
        let service = match &workload.service {
            Some(key) => worker.service(key).await,
            None => None,
        };
        match service {
            Some(service) => Self {
                endpoint,
                circuit: service.circuit.clone(),
                shared: service.shared.clone(),
                policy: Policy::OfService(service.view()),
            },
            None => {
                let (circuit, shared) = worker.unlimited(&format!("pod {}", workload.name));
                let policy = Policy::Own(Rc::default());
                Self {
                    endpoint,
                    circuit,
                    shared,
                    policy,
                }
            }
        }
    }
}

enum Target {
    Service {
        service: RefCell<Rc<Service>>,
        port: u16,
    },
    Pod(Direct),
}

/// Answers the requests of one connection of the application.
struct Outbound {
    worker: Rc<Worker>,
    connection: Rc<Connection>,
    target: Target,
    original: SocketAddr,
}

impl Handler for Outbound {
    async fn call(self: Rc<Self>, request: Request<Incoming>) -> Response<ResponseBody> {
        let (mut parts, body) = request.into_parts();
        let http2 = parts.version == http::Version::HTTP_2;
        let checked = headers::check(&mut parts);
        let (checked, refused) = match checked {
            Ok(checked) => (checked, None),
            Err(error) => (Checked::default(), Some(error)),
        };
        let now = self.worker.now();
        let mut exchange = Exchange::begin(&self.connection, now, &mut parts, &checked);
        let kind = RequestKind {
            grpc: checked.grpc,
            http2,
        };
        let answered = match refused {
            Some(error) => Err(error),
            None => self.answer(parts, body, &checked, &mut exchange).await,
        };
        let mut response = match answered {
            Ok(Answer::Forwarded(finishing)) => {
                return finishing.finish(&self.worker, exchange, http2);
            }
            Ok(Answer::Own(response)) => response,
            Err(error) => {
                exchange.failed(&error);
                outbound_response(&error, kind)
            }
        };
        exchange.responded(response.status(), response.headers());
        let finish = Box::new(Finish::new(exchange));
        response = response.map(|body| body.ending_in(finish));
        response
    }
}

/// What becomes of a request.
enum Answer {
    Own(Response<ResponseBody>),
    Forwarded(Forwarded),
}

struct Forwarded {
    answered: proxy::forward::Answered,
    route: Option<Arc<Route>>,
    backend: usize,
    asked: Option<Asked>,
}

impl Forwarded {
    fn finish(
        mut self,
        worker: &Rc<Worker>,
        mut exchange: Exchange,
        http2: bool,
    ) -> Response<ResponseBody> {
        let endpoint = &self.answered.endpoint;
        let grpc = exchange.grpc;
        exchange.series = Some(endpoint.http_series(&*worker.shared.observer, grpc));
        exchange.callee = endpoint.identity().cloned();
        exchange.service = endpoint.service.clone();
        let response = &mut self.answered.response;
        exchange.responded(response.status(), response.headers());
        if let Some(route) = &self.route {
            filters::on_response(&route.filters, response.headers_mut());
            if let Some(backend) = route.backends.get(self.backend) {
                filters::on_response(&backend.filters, response.headers_mut());
            }
        }
        exchange.route = self.route;
        if let Some(asked) = self.asked {
            return asked.answer(worker, self.answered, exchange, http2);
        }
        let mut response = self.answered.into_response(exchange);
        headers::strip_hop(response.headers_mut());
        response
    }
}

impl Outbound {
    async fn answer(
        &self,
        mut parts: Parts,
        body: Incoming,
        checked: &Checked,
        exchange: &mut Exchange,
    ) -> Result<Answer, ProxyError> {
        let mut to = match &self.target {
            Target::Pod(direct) => Destination {
                picker: Picker::Only(direct.endpoint.clone()),
                circuit: direct.circuit.clone(),
                shared: direct.shared.clone(),
                policy: direct.policy.clone(),
                route: None,
            },
            Target::Service { service, port } => {
                let (service, port) = self.current(service, *port).await?;
                destination(&service, port)
            }
        };
        let mut backend = 0;
        if let Some(routed) = self.route(&to, &mut parts, checked)? {
            match routed {
                Routed::Redirected(response) => return Ok(Answer::Own(response)),
                Routed::To(route) => {
                    exchange.route = Some(route.clone());
                    (to, backend) = self.backend(route, &mut parts).await?;
                }
            }
        }
        // Known before a response is: failures count for the Service too.
        exchange.service = match &to.picker {
            Picker::Among(port) => Some(port.view.service.key.clone()),
            Picker::Only(endpoint) => endpoint.service.clone(),
        };
        let asked = if checked.upgrade {
            Asked::take(&mut parts)
        } else {
            None
        };
        let forwarded = forward(
            &self.worker,
            &to,
            parts,
            body,
            exchange,
            checked.upgrade || asked.is_some(),
        );
        match forwarded.await {
            Ok(answered) => {
                let route = to.route;
                Ok(Answer::Forwarded(Forwarded {
                    answered,
                    route,
                    backend,
                    asked,
                }))
            }
            Err(error) => {
                let observer = &*self.worker.shared.observer;
                let endpoint = to.picker.pick(&self.worker, &[]);
                exchange.series = endpoint.map(|e| e.http_series(observer, exchange.grpc));
                Err(error)
            }
        }
    }

    /// The Service as it is now, asked for again if it went away.
    async fn current(
        &self,
        held: &RefCell<Rc<Service>>,
        port: u16,
    ) -> Result<(Rc<Service>, Rc<Port>), ProxyError> {
        let service = held.borrow().clone();
        let no_port = || ProxyError::NoPort {
            service: service.key.clone(),
            port,
        };
        if let Ok(found) = service.port(&self.worker, port) {
            return Ok((service.clone(), found.ok_or_else(no_port)?));
        }
        self.worker.forget(&service);
        let again = self.worker.service(&service.key).await;
        let again = again.ok_or_else(|| ProxyError::NoService(service.key.clone()))?;
        *held.borrow_mut() = again.clone();
        match again.port(&self.worker, port) {
            Ok(found) => Ok((again, found.ok_or_else(no_port)?)),
            Err(_) => Err(ProxyError::NoService(service.key.clone())),
        }
    }

    /// The route for a request; `None` where the Service has none and takes all itself.
    fn route(
        &self,
        to: &Destination,
        parts: &mut Parts,
        checked: &Checked,
    ) -> Result<Option<Routed>, ProxyError> {
        let Picker::Among(port) = &to.picker else {
            return Ok(None);
        };
        let table = &port.declared().routes;
        if table.routes.is_empty() {
            return Ok(None);
        }
        let path = headers::normal_path(&parts.uri)?;
        let host = checked.host.as_ref();
        let view = RequestView {
            method: parts.method.as_str(),
            host: host.and_then(|host| host.name()),
            path: &path,
            headers: &parts.headers,
            query: parts.uri.query(),
        };
        let Some(route) = table.find(&view).cloned() else {
            let service = port.view.service.key.clone();
            return Err(ProxyError::NoRoute {
                service,
                port: port.port,
            });
        };
        let host = host.map(ToString::to_string);
        let host = host.unwrap_or_else(|| self.original.ip().to_string());
        if let Some(response) = filters::redirected(&route, &parts.uri, &path, &host, port.port) {
            return Ok(Some(Routed::Redirected(response)));
        }
        if path != parts.uri.path() {
            let path = path.into_owned();
            headers::set_path(&mut parts.uri, &path)?;
        }
        filters::on_request(&route.filters, &route, parts)?;
        Ok(Some(Routed::To(route)))
    }

    /// One of a route's backends by weight, with its own filters applied.
    async fn backend(
        &self,
        route: Arc<Route>,
        parts: &mut Parts,
    ) -> Result<(Destination, usize), ProxyError> {
        let Some(backend) = route.pick(fastrand::u32(..)) else {
            return Err(ProxyError::NoBackend {
                route: route.name.clone(),
            });
        };
        let index = route
            .backends
            .iter()
            .position(|each| std::ptr::eq(each, backend));
        filters::on_request(&backend.filters, &route, parts)?;
        let service = self.worker.service(&backend.service).await;
        let service = service.ok_or_else(|| ProxyError::NoService(backend.service.clone()))?;
        let held = RefCell::new(service);
        let (service, port) = self.current(&held, backend.port).await?;
        let mut to = destination(&service, port);
        to.route = Some(route.clone());
        Ok((to, index.unwrap_or(0)))
    }
}

enum Routed {
    To(Arc<Route>),
    Redirected(Response<ResponseBody>),
}

fn destination(service: &Rc<Service>, port: Rc<Port>) -> Destination {
    service.make_room();
    Destination {
        circuit: service.circuit.clone(),
        shared: service.shared.clone(),
        policy: Policy::OfService(port.view.clone()),
        picker: Picker::Among(port),
        route: None,
    }
}
