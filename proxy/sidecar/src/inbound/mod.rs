//! What comes in: who calls is established, whether they may is decided, and the application is
//! called at the pod's own address.

mod door;
mod http;
mod origin;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use tokio::sync::watch;
use turnpike_rules::{
    Identity, ServiceKey,
    authz::Call,
    traffic::{Retry, TrafficPolicy},
    workload::{MtlsMode, SelfConfig},
};

use self::origin::Origin;
use crate::{
    circuit::Circuit,
    endpoint::Endpoint,
    error::ProxyError,
    http::{exchange::Connection, progress::UnderWay},
    io::{Rewind, Stream},
    limits::Permit,
    observe::{Direction, Labels, Refusal, RefusalReason},
    shared::{Shared, SharedService},
    tcp::Carried,
    tls::{Inside, Upstream},
    worker::{Accepted, Worker},
};

/// The inbound side of one worker.
pub(crate) struct Inbound {
    own: RefCell<watch::Receiver<Arc<SelfConfig>>>,
    current: RefCell<Arc<SelfConfig>>,
    /// The application's ports, with connections kept to them.
    apps: RefCell<HashMap<SocketAddr, Rc<Endpoint>>>,
    circuit: Rc<Circuit>,
    shared: Arc<SharedService>,
    policy: Rc<TrafficPolicy>,
}

/// Ports of the application that connections are kept to.
const APPS: usize = 256;

impl Inbound {
    pub(crate) fn new(shared: &Shared) -> Self {
        let mut own = shared.mesh.watch_self();
        let current = own.borrow_and_update().clone();
        let service = Arc::new(SharedService::default());
        let policy = TrafficPolicy {
            // Only to get past a connection that the application was closing just then; what the
            // caller's side can repeat elsewhere is left to it.
            retry: Retry {
                attempts: 1,
                ..Retry::default()
            },
            ..TrafficPolicy::default()
        };
        let idle = shared.config.bounds.app_pool_idle;
        let circuit = Circuit::unlimited("the application", &service, idle);
        Self {
            own: RefCell::new(own),
            current: RefCell::new(current),
            apps: RefCell::default(),
            circuit: Rc::new(circuit),
            shared: service,
            policy: Rc::new(policy),
        }
    }

    /// The configuration as it is now.
    pub(crate) fn config(&self) -> Arc<SelfConfig> {
        // An error says that the control side is gone: the last good state holds.
        if self.own.borrow().has_changed().unwrap_or(false) {
            *self.current.borrow_mut() = self.own.borrow_mut().borrow_and_update().clone();
        }
        self.current.borrow().clone()
    }

    fn app(&self, worker: &Worker, address: SocketAddr) -> Rc<Endpoint> {
        let mut apps = self.apps.borrow_mut();
        if let Some(known) = apps.get(&address) {
            return known.clone();
        }
        let uid = self.current.borrow().uid.clone();
        let (health, now) = (Arc::default(), worker.now());
        let app = Endpoint::new(uid, address, None, None, None, health, now);
        if apps.len() < APPS {
            apps.insert(address, app.clone());
        }
        app
    }

    pub(crate) fn sweep(&self, now: Instant) {
        self.apps.borrow_mut().retain(|_, app| {
            !app.pool.sweep(now, self.circuit.pool_idle) || Rc::strong_count(app) > 1
        });
    }
}

/// Serves one captured connection from elsewhere.
pub(crate) async fn serve(worker: &Rc<Worker>, accepted: Accepted) {
    let Accepted {
        stream,
        downstream,
        permit,
        ..
    } = accepted;
    door::open(worker, stream, downstream, permit).await;
}

/// A caller that has been let in so far.
pub(crate) struct Caller {
    worker: Rc<Worker>,
    downstream: SocketAddr,
    original: SocketAddr,
    /// Verified by mutual TLS.
    identity: Option<Identity>,
    origin: Origin,
    /// The Service that was called, by the mesh's server name.
    service: Option<ServiceKey>,
    sni: Option<String>,
    /// Taken over by the connection once there is one to report on.
    permit: Cell<Option<Permit>>,
}

impl Caller {
    /// Whether the connection as a whole may go on under `config`; the refusal says by which rule.
    fn judge(&self, config: &SelfConfig) -> Result<(), (RefusalReason, String)> {
        let port = self.original.port();
        if self.identity.is_none() && config.mtls_for(port) == MtlsMode::Strict {
            let details = format!(
                "plaintext to port {port}, which is STRICT; call it from a workload of the mesh or \
                 set a PeerAuthentication to PERMISSIVE"
            );
            return Err((RefusalReason::Strict, details));
        }
        Ok(())
    }

    /// As [`Caller::judge`], for opaque bytes, which authorization judges as one.
    fn judge_tcp(&self, config: &SelfConfig) -> Result<(), (RefusalReason, String)> {
        self.judge(config)?;
        let call = self.call();
        let verdict = config.authorization.check(&call);
        if verdict.allowed {
            Ok(())
        } else {
            Err((RefusalReason::Authorization, verdict.to_string()))
        }
    }

    fn call(&self) -> Call<'_> {
        Call {
            identity: self.identity.as_ref(),
            source: self.downstream.ip(),
            port: self.original.port(),
            http: None,
        }
    }

    fn refuse(&self, (reason, details): (RefusalReason, String)) {
        self.worker.refuse(&Refusal {
            direction: Direction::Inbound,
            reason,
            downstream: Some(self.downstream),
            original: Some(self.original),
            details: &details,
        });
    }

    /// Without the caller's names, which [`Origin`] adds.
    fn labels(&self, grpc: bool) -> Labels {
        let backed = || match self.worker.inbound.config().backs.as_slice() {
            [one] => Some(one.key.clone()),
            _ => None,
        };
        Labels {
            direction: Direction::Inbound,
            peer: self.identity.clone(),
            names: None,
            service: self.service.clone().or_else(backed),
            passthrough: false,
            grpc,
            mutual_tls: self.identity.is_some(),
        }
    }

    fn connection(&self) -> Rc<Connection> {
        Rc::new(Connection {
            observer: self.worker.shared.observer.clone(),
            direction: Direction::Inbound,
            downstream: self.downstream,
            original: self.original,
            peer: self.identity.clone(),
            sni: self.sni.clone(),
            under_way: UnderWay::default(),
            idle_since: Cell::new(self.worker.now()),
            permit: self.permit.take(),
        })
    }

    /// The application's end, if the caller may have it as opaque bytes, and the configuration
    /// that said so: it may be out of date by the time bytes flow.
    async fn dial(&self) -> Result<(Upstream, Arc<SelfConfig>), (RefusalReason, String)> {
        let inbound = &self.worker.inbound;
        let judged = inbound.config();
        self.judge_tcp(&judged)?;
        let app = inbound.app(&self.worker, self.original);
        let dialled = app
            .dial(&self.worker, inbound.circuit.connect.get(), Inside::Tcp)
            .await;
        let app =
            dialled.map_err(|error: ProxyError| (RefusalReason::NoRoute, error.to_string()))?;
        Ok((app, judged))
    }

    /// Relays opaque bytes for as long as policy allows. `judged` is the configuration that the
    /// caller was let in under; one that has come since is asked before the first byte.
    async fn relay(self, mut client: impl Stream, mut app: Upstream, mut judged: Arc<SelfConfig>) {
        let worker = self.worker.clone();
        let caller = Rc::new(self);
        let watched = caller.clone();
        let mut still_allowed = move || {
            let now = watched.worker.inbound.config();
            if Arc::ptr_eq(&now, &judged) {
                return true;
            }
            let verdict = watched.judge_tcp(&now);
            judged = now;
            verdict.map_err(|why| watched.refuse(why)).is_ok()
        };
        if !still_allowed() {
            return;
        }
        let carried = Carried {
            connection: caller.connection(),
            series: caller
                .origin
                .tcp(&worker.shared.observer, caller.labels(false)),
            idle: worker.inbound.policy.timeouts.idle,
            upstream: caller.original,
            service: caller.service.clone(),
            callee: None,
            still_allowed: Some(Box::new(still_allowed)),
            server_first: None,
        };
        carried.run(&worker, &mut client, &mut app).await;
    }

    /// Opaque bytes to the application, after those already read.
    async fn pass(self, stream: impl Stream, read: Bytes) {
        match self.dial().await {
            Ok((app, judged)) => self.relay(Rewind::new(read, stream), app, judged).await,
            Err(why) => self.refuse(why),
        }
    }
}

/// An error as the other end of a connection sees it: ended, not hung.
fn reset(stream: &tokio::net::TcpStream) -> io::Result<()> {
    stream.set_zero_linger()
}
