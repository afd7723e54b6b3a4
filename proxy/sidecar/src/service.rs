//! A Service as one worker uses it: its current view, its endpoints by port, its limits.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Instant,
};

use rustls_pki_types::ServerName;
use turnpike_rules::{
    ServiceKey,
    service::{EndpointState, Protocol, ServicePort},
    traffic::{CircuitBreaker, Timeouts, TrafficPolicy},
    workload::Workload,
};
use turnpike_wire::names;

use crate::{
    balance,
    circuit::Circuit,
    endpoint::Endpoint,
    mesh::{EndpointView, ServiceView, ServiceWatch},
    shared::SharedService,
    tls::Peer,
    worker::Worker,
};

/// Ports whose protocols let the server speak first, where nothing is declared: SMTP (25, 587),
/// MySQL, MySQL group replication's 4444, PostgreSQL, Redis, Elasticsearch transport, memcached.
const SERVER_FIRST: [u16; 8] = [25, 587, 3306, 4444, 5432, 6379, 9300, 11211];

pub(crate) struct Service {
    pub(crate) key: ServiceKey,
    pub(crate) shared: Arc<SharedService>,
    pub(crate) circuit: Rc<Circuit>,
    watch: RefCell<ServiceWatch>,
    view: RefCell<Arc<ServiceView>>,
    ports: RefCell<Vec<Rc<Port>>>,
    pub(crate) used: Cell<Instant>,
}

/// One port of a Service, with the endpoints behind it.
pub(crate) struct Port {
    pub(crate) port: u16,
    pub(crate) view: Arc<ServiceView>,
    /// Index into the view's ports.
    index: usize,
    serving: Vec<Rc<Endpoint>>,
    /// Used only while `serving` is empty.
    terminating: Vec<Rc<Endpoint>>,
    /// A server of it was seen to speak first.
    pub(crate) server_first: Cell<bool>,
}

/// The Service is gone from the mesh; to be asked for anew.
pub(crate) struct Gone;

impl Service {
    pub(crate) fn new(worker: &Worker, key: ServiceKey, mut watch: ServiceWatch) -> Rc<Self> {
        let shared = worker.shared.service(&key);
        let view = watch.borrow_and_update().clone();
        let circuit = Rc::new(Circuit {
            name: key.to_string(),
            connections: shared.connections.clone(),
            pending: shared.pending.clone(),
            max_connections: Cell::new(0),
            max_pending: Cell::new(0),
            connect: Cell::default(),
            pool_idle: worker.shared.config.bounds.pool_idle,
            released: tokio::sync::Notify::new(),
        });
        let service = Self {
            key,
            shared,
            circuit,
            watch: RefCell::new(watch),
            view: RefCell::new(view),
            ports: RefCell::default(),
            used: Cell::new(worker.now()),
        };
        service.apply_policy();
        Rc::new(service)
    }

    /// The port as it is now; `None` where the Service has no such port.
    pub(crate) fn port(&self, worker: &Worker, port: u16) -> Result<Option<Rc<Port>>, Gone> {
        self.refresh()?;
        self.used.set(worker.now());
        let known = self
            .ports
            .borrow()
            .iter()
            .position(|known| known.port == port);
        let view = self.view.borrow().clone();
        let mut ports = self.ports.borrow_mut();
        if let Some(known) = known {
            if !Arc::ptr_eq(&ports[known].view, &view) {
                match self.build(worker, &view, port, Some(&ports[known])) {
                    Some(rebuilt) => ports[known] = rebuilt,
                    None => {
                        ports.remove(known);
                        return Ok(None);
                    }
                }
            }
            return Ok(Some(ports[known].clone()));
        }
        let built = self.build(worker, &view, port, None);
        ports.extend(built.clone());
        Ok(built)
    }

    pub(crate) fn view(&self) -> Arc<ServiceView> {
        self.view.borrow().clone()
    }

    /// Takes up what has changed.
    pub(crate) fn refresh(&self) -> Result<(), Gone> {
        if self.watch.borrow().has_changed().map_err(|_| Gone)? {
            let view = self.watch.borrow_mut().borrow_and_update().clone();
            *self.view.borrow_mut() = view;
            self.apply_policy();
        }
        Ok(())
    }

    fn apply_policy(&self) {
        let view = self.view.borrow();
        let TrafficPolicy {
            retry: _,
            timeouts,
            circuit,
            outlier: _,
        } = &view.service.traffic;
        let Timeouts {
            connect,
            request: _,
            per_try: _,
            idle: _,
        } = timeouts;
        let CircuitBreaker {
            max_connections,
            max_pending,
            max_requests: _,
        } = circuit;
        self.circuit.connect.set(*connect);
        self.circuit.max_connections.set(*max_connections);
        self.circuit.max_pending.set(*max_pending);
    }

    /// Keeps the endpoints that stay what they were, with their connections and estimates.
    fn build(
        &self,
        worker: &Worker,
        view: &Arc<ServiceView>,
        port: u16,
        before: Option<&Rc<Port>>,
    ) -> Option<Rc<Port>> {
        let index = view
            .service
            .ports
            .iter()
            .position(|declared| declared.port == port)?;
        let sni = names::service_sni(&self.key, port);
        let server_name = ServerName::try_from(sni).ok();
        let (mut serving, mut terminating) = (Vec::new(), Vec::new());
        for each in &view.endpoints {
            let Some(target) = each.target(port) else {
                continue;
            };
            let Some(endpoint) = self.endpoint(worker, each, target, server_name.as_ref(), before)
            else {
                continue;
            };
            match each.endpoint.state {
                EndpointState::Serving => serving.push(endpoint),
                EndpointState::Terminating => terminating.push(endpoint),
            }
        }
        let server_first = Cell::new(before.is_some_and(|before| before.server_first.get()));
        let view = view.clone();
        Some(Rc::new(Port {
            port,
            view,
            index,
            serving,
            terminating,
            server_first,
        }))
    }

    fn endpoint(
        &self,
        worker: &Worker,
        each: &EndpointView,
        target: u16,
        server_name: Option<&ServerName<'static>>,
        before: Option<&Rc<Port>>,
    ) -> Option<Rc<Endpoint>> {
        let address = SocketAddr::new(each.endpoint.address, target);
        let peer = match &each.endpoint.identity {
            // A Service whose name makes no server name cannot be called by mesh TLS, and never
            // is in plaintext.
            Some(identity) => {
                let server_name = server_name?.clone();
                Some(Peer {
                    identity: identity.clone(),
                    server_name,
                })
            }
            None => None,
        };
        let uid = &each.endpoint.uid;
        let same = |known: &&Rc<Endpoint>| {
            known.uid == *uid
                && known.address == address
                && known.peer == peer
                && known.names == each.endpoint.names
        };
        let known = before.and_then(|before| before.all().find(same));
        Some(known.cloned().unwrap_or_else(|| {
            let health = self.shared.outliers.health(uid);
            let service = Some(self.key.clone());
            let names = each.endpoint.names.clone();
            Endpoint::new(
                uid.clone(),
                address,
                peer,
                service,
                names,
                health,
                worker.now(),
            )
        }))
    }

    /// Drops idle connections; says whether the Service has been without use for long.
    pub(crate) fn sweep(&self, worker: &Worker) -> bool {
        let now = worker.now();
        let ports = self.ports.borrow();
        let empty = ports
            .iter()
            .flat_map(|port| port.all())
            .fold(true, |empty, endpoint| {
                let swept = endpoint.pool.sweep(now, self.circuit.pool_idle);
                empty && swept && endpoint.load.in_flight() == 0
            });
        if let Some(out) = self.shared.outliers.changed(worker.shared.clock.ms(now)) {
            worker.shared.observer.out(&self.key, out);
        }
        let out = self.shared.outliers.any_out();
        empty
            && !out
            && now.saturating_duration_since(self.used.get()) > worker.shared.config.bounds.idle
    }

    /// At the connection limit: closes an idle connection of another endpoint, if there is one.
    pub(crate) fn make_room(&self) {
        let limit = self.circuit.max_connections.get();
        if self.circuit.connections.count() >= limit {
            let ports = self.ports.borrow();
            let _ = ports
                .iter()
                .flat_map(|port| port.all())
                .any(|each| each.pool.evict());
        }
    }
}

impl Port {
    pub(crate) fn declared(&self) -> &ServicePort {
        &self.view.service.ports[self.index]
    }

    /// Whether the client may be waiting for the server to speak.
    pub(crate) fn is_server_first(&self) -> bool {
        self.declared().protocol == Protocol::Tcp
            || self.declared().protocol == Protocol::Detect
                && (self.server_first.get() || is_server_first(self.port))
    }

    pub(crate) fn has_mesh_peers(&self) -> bool {
        self.all().any(|endpoint| endpoint.peer.is_some())
    }

    /// How many endpoints ejection counts over.
    pub(crate) fn endpoints(&self) -> usize {
        self.serving.len()
    }

    /// The next endpoint: not ejected and not among `tried`, if there is one.
    pub(crate) fn pick(&self, worker: &Worker, tried: &[Rc<Endpoint>]) -> Option<Rc<Endpoint>> {
        let candidates = if self.serving.is_empty() {
            &self.terminating
        } else {
            &self.serving
        };
        if let [only] = &candidates[..] {
            return Some(only.clone());
        }
        let now = worker.now();
        let now_ms = worker.shared.clock.ms(now);
        let healthy = |each: &Rc<Endpoint>| {
            if each.came_back(now_ms) {
                let peers = candidates
                    .iter()
                    .filter(|peer| !Rc::ptr_eq(peer, each) && !peer.health.is_ejected(now_ms));
                each.load.start_afresh(now, peers.map(|peer| &peer.load));
            }
            !each.health.is_ejected(now_ms)
        };
        let fresh = |each: &Rc<Endpoint>| !tried.iter().any(|tried| Rc::ptr_eq(tried, each));
        let order = |a: &Rc<Endpoint>, b: &Rc<Endpoint>| a.load.compare(&b.load, now);
        let random = &mut |count| fastrand::usize(..count);
        balance::pick(
            candidates,
            random,
            |each| healthy(each) && fresh(each),
            order,
        )
        .or_else(|| balance::pick(candidates, random, healthy, order))
        // All are ejected: better a bad endpoint than none.
        .or_else(|| balance::pick(candidates, random, |_| true, order))
        .map(|index| candidates[index].clone())
    }

    fn all(&self) -> impl Iterator<Item = &Rc<Endpoint>> {
        self.serving.iter().chain(&self.terminating)
    }
}

pub(crate) fn is_server_first(port: u16) -> bool {
    SERVER_FIRST.contains(&port)
}

/// The endpoint for a pod that is called by its own address. `None`: its uid makes no server
/// name, and plaintext is no way to a pod of the mesh.
pub(crate) fn direct(worker: &Worker, workload: &Workload, port: u16) -> Option<Rc<Endpoint>> {
    let peer = match &workload.identity {
        Some(identity) => {
            let sni = names::workload_sni(&workload.uid, port);
            let server_name = ServerName::try_from(sni).ok()?;
            Some(Peer {
                identity: identity.clone(),
                server_name,
            })
        }
        None => None,
    };
    let address = SocketAddr::new(workload.address, port);
    let health = Arc::default();
    let (uid, service) = (workload.uid.clone(), workload.service.clone());
    Some(Endpoint::new(
        uid,
        address,
        peer,
        service,
        workload.names.clone(),
        health,
        worker.now(),
    ))
}
