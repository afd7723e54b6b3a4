//! A worker: one thread with a runtime, connections and pools of its own.
//!
//! With one worker it accepts for itself. With more, the first accepts for all and hands each
//! connection to the one that has the fewest.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use turnpike_daemon::tasks::reason;
use turnpike_rules::{ServiceKey, workload::Workload};

use crate::{
    capture,
    circuit::Circuit,
    drain::Stage,
    endpoint::Endpoint,
    error::ProxyError,
    http::mirror::Copies,
    inbound::Inbound,
    limits::Permit,
    mesh::{Lookup, Missing},
    observe::{Direction, Refusal, RefusalReason},
    outbound,
    service::{self, Gone, Port, Service},
    shared::{Shared, SharedService},
};

/// How often idle connections and slow clients are looked for.
const SWEEP: Duration = Duration::from_millis(500);
/// Pods called by their own addresses that are kept, with their connections.
const DIRECT: usize = 1024;
/// Connections on their way to another worker. Full: the accepting worker waits, and the kernel's
/// queue holds what arrives.
const HANDOVER: usize = 64;

pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    services: RefCell<HashMap<ServiceKey, Rc<Service>>>,
    direct: RefCell<HashMap<PodPort, Rc<Endpoint>>>,
    pub(crate) inbound: Inbound,
    watched: RefCell<Vec<Look>>,
    pub(crate) copies: Copies,
}

/// A pod's uid with the address and port that it is called at.
type PodPort = (Arc<str>, SocketAddr);
/// Looks after one connection at a time in milliseconds; false when it is over.
type Look = Box<dyn FnMut(u64) -> bool>;

/// A connection just accepted.
pub(crate) struct Accepted<S = TcpStream> {
    pub(crate) stream: S,
    pub(crate) downstream: SocketAddr,
    pub(crate) direction: Direction,
    pub(crate) permit: Permit,
}

/// Where the other workers are reached.
pub(crate) struct Others {
    /// Connections of each worker, this one first.
    pub(crate) loads: Arc<[AtomicUsize]>,
    pub(crate) senders: Vec<mpsc::Sender<Accepted<std::net::TcpStream>>>,
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>) -> Rc<Self> {
        Rc::new(Self {
            inbound: Inbound::new(&shared),
            shared,
            services: RefCell::default(),
            direct: RefCell::default(),
            watched: RefCell::default(),
            copies: Copies::default(),
        })
    }

    pub(crate) fn now(&self) -> Instant {
        self.shared.clock.now()
    }

    /// A Service as it is now, asked for on first use and again when it went away.
    pub(crate) async fn service(&self, key: &ServiceKey) -> Result<Rc<Service>, Missing> {
        let known = self.services.borrow().get(key).cloned();
        if let Some(known) = known {
            match known.refresh() {
                Ok(()) => return Ok(known),
                Err(Gone) => self.forget(&known),
            }
        }
        let watch = self.shared.mesh.service(key).await?;
        let mut services = self.services.borrow_mut();
        let service = services.entry(key.clone());
        Ok(service
            .or_insert_with(|| Service::new(self, key.clone(), watch))
            .clone())
    }

    /// One of a Service's ports as it is now.
    pub(crate) async fn port(
        &self,
        key: &ServiceKey,
        port: u16,
    ) -> Result<(Rc<Service>, Rc<Port>), ProxyError> {
        let no = |missing| ProxyError::NoService(key.clone(), missing);
        let service = self.service(key).await.map_err(no)?;
        match service.port(self, port) {
            Ok(Some(found)) => Ok((service, found)),
            Ok(None) => Err(ProxyError::NoPort {
                service: key.clone(),
                port,
            }),
            Err(Gone) => Err(no(Missing::Absent)),
        }
    }

    /// Forgets a Service whose watch has ended, so that the next use asks for it anew.
    fn forget(&self, gone: &Rc<Service>) {
        let mut services = self.services.borrow_mut();
        if services
            .get(&gone.key)
            .is_some_and(|known| Rc::ptr_eq(known, gone))
        {
            services.remove(&gone.key);
        }
    }

    /// A pod called by its own address.
    pub(crate) fn direct(&self, workload: &Workload, port: u16) -> Option<Rc<Endpoint>> {
        let key = (
            workload.uid.clone(),
            SocketAddr::new(workload.address, port),
        );
        let mut direct = self.direct.borrow_mut();
        let known = direct.get(&key).filter(|known| {
            known.identity() == workload.identity.as_ref() && known.service == workload.service
        });
        if let Some(known) = known {
            return Some(known.clone());
        }
        let endpoint = service::direct(self, workload, port)?;
        if direct.len() >= DIRECT {
            direct.retain(|_, known| Rc::strong_count(known) > 1);
        }
        if direct.len() < DIRECT {
            direct.insert(key, endpoint.clone());
        }
        Some(endpoint)
    }

    /// What stands now at the address of `known`, a pod called by it. It stays what it was where
    /// nothing is known: a peer of the mesh is never spoken to but in mutual TLS, and what was none
    /// is refused then, since it may have become one.
    pub(crate) async fn pod_at(&self, known: &Rc<Endpoint>) -> Result<Rc<Endpoint>, ProxyError> {
        let refused = |why: &str| {
            let address = known.address;
            Err(ProxyError::Connect {
                address,
                reason: why.into(),
            })
        };
        match self.shared.mesh.destination(known.address.ip()).await {
            Lookup::Workload(workload) => match self.direct(&workload, known.address.port()) {
                Some(endpoint) => Ok(endpoint),
                None => refused("the pod's uid makes no server name"),
            },
            Lookup::Unknown => Ok(known.clone()),
            Lookup::Unanswered if known.peer.is_some() => Ok(known.clone()),
            Lookup::Unanswered => refused(
                "what stands there now is not known, since the control plane did not answer",
            ),
            Lookup::Service(_) => refused("it is the address of a Service now"),
        }
    }

    /// What stands in for limits where no Service sets any.
    pub(crate) fn unlimited(&self, name: &str) -> (Rc<Circuit>, Arc<SharedService>) {
        let shared = Arc::new(SharedService::default());
        let bounds = &self.shared.config.bounds;
        let circuit = Circuit::unlimited(name, &shared, bounds.pool_idle);
        (Rc::new(circuit), shared)
    }

    /// Has `look` called at every sweep with the time in milliseconds, until it says false.
    pub(crate) fn watch(&self, look: impl FnMut(u64) -> bool + 'static) {
        self.watched.borrow_mut().push(Box::new(look));
    }

    pub(crate) fn refuse(&self, refusal: &Refusal<'_>) {
        self.shared.observer.refused(refusal);
    }

    /// Serves one connection to its end.
    async fn serve(self: Rc<Self>, accepted: Accepted) {
        let cut = self.shared.drain.clone();
        let carried = async {
            match accepted.direction {
                Direction::Outbound => outbound::serve(&self, accepted).await,
                Direction::Inbound => crate::inbound::serve(&self, accepted).await,
            }
        };
        tokio::select! {
            biased;
            () = carried => {}
            () = cut.reached(Stage::Cut) => {}
        }
    }

    async fn sweep(self: Rc<Self>) {
        let mut interval = tokio::time::interval(SWEEP);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let now = self.now();
            let now_ms = self.shared.clock.ms(now);
            // Taken out, since a look may end a connection that watches another.
            let mut watched = std::mem::take(&mut *self.watched.borrow_mut());
            watched.retain_mut(|look| look(now_ms));
            self.watched.borrow_mut().append(&mut watched);
            self.services
                .borrow_mut()
                .retain(|_, service| !service.sweep(&self));
            let idle = self.shared.config.bounds.pool_idle;
            self.direct.borrow_mut().retain(|_, endpoint| {
                !endpoint.pool.sweep(now, idle) || Rc::strong_count(endpoint) > 1
            });
            self.inbound.sweep(now);
        }
    }
}

/// Runs the worker that accepts, until the drain is over. The error says which of its own tasks
/// failed; one connection's panic is that connection's end and no more.
pub(crate) async fn run_first(
    worker: Rc<Worker>,
    listeners: Vec<(Direction, std::net::TcpListener)>,
    others: Others,
) -> Result<(), String> {
    let others = Rc::new(others);
    let mut accepting = tokio::task::JoinSet::new();
    for (direction, listener) in listeners {
        let listener = TcpListener::from_std(listener).map_err(|error| error.to_string())?;
        accepting.spawn_local(accept_all(
            worker.clone(),
            direction,
            listener,
            others.clone(),
        ));
    }
    let accept = async {
        while let Some(ended) = accepting.join_next().await {
            ended.map_err(|error| format!("accepting: {}", reason(error)))?;
        }
        Ok(())
    };
    beside_sweep(&worker, accept).await
}

/// Runs one of the other workers.
pub(crate) async fn run_other(
    worker: Rc<Worker>,
    mut accepted: mpsc::Receiver<Accepted<std::net::TcpStream>>,
    index: usize,
    loads: Arc<[AtomicUsize]>,
) -> Result<(), String> {
    let take = async {
        while let Some(Accepted {
            stream,
            downstream,
            direction,
            permit,
        }) = accepted.recv().await
        {
            if let Ok(stream) = TcpStream::from_std(stream) {
                let accepted = Accepted {
                    stream,
                    downstream,
                    direction,
                    permit,
                };
                spawn(&worker, accepted, index, loads.clone());
            }
        }
        Ok(())
    };
    beside_sweep(&worker, take).await
}

/// Takes connections to the end of the drain, while the sweep looks after them.
async fn beside_sweep(
    worker: &Rc<Worker>,
    take: impl Future<Output = Result<(), String>>,
) -> Result<(), String> {
    let mut sweep = tokio::task::spawn_local(worker.clone().sweep());
    let work = async {
        take.await?;
        finish(worker).await;
        Ok(())
    };
    let ended = tokio::select! {
        ended = &mut sweep => Err(match ended {
            Ok(()) => "the sweep ended".to_owned(),
            Err(error) => format!("the sweep: {}", reason(error)),
        }),
        ended = work => ended,
    };
    sweep.abort();
    ended
}

/// Returns when no connection is left, or they were cut.
async fn finish(worker: &Worker) {
    let cut = worker.shared.drain.reached(Stage::Cut);
    let quiet = async {
        while worker.shared.open_inbound.count() + worker.shared.open_outbound.count() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = cut => {}
        () = quiet => {}
    }
    // Those that were cut get to see it.
    tokio::task::yield_now().await;
}

fn spawn(worker: &Rc<Worker>, accepted: Accepted, index: usize, loads: Arc<[AtomicUsize]>) {
    let load = Load::of(index, loads);
    let served = worker.clone().serve(accepted);
    tokio::task::spawn_local(async move {
        let _load = load;
        served.await;
    });
}

/// One connection of a worker, however it ends.
struct Load(usize, Arc<[AtomicUsize]>);

impl Load {
    fn of(index: usize, loads: Arc<[AtomicUsize]>) -> Self {
        loads[index].fetch_add(1, Relaxed);
        Self(index, loads)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.1[self.0].fetch_sub(1, Relaxed);
    }
}

async fn accept_all(
    worker: Rc<Worker>,
    direction: Direction,
    listener: TcpListener,
    others: Rc<Others>,
) {
    let (stage, open) = match direction {
        Direction::Inbound => (Stage::Inbound, &worker.shared.open_inbound),
        Direction::Outbound => (Stage::All, &worker.shared.open_outbound),
    };
    let most = worker.shared.config.bounds.connections;
    let drain = worker.shared.drain.clone();
    let accept = async {
        loop {
            // Before accepting, so that what is over the limit waits in the kernel's queue.
            let permit = loop {
                if let Some(permit) = open.try_acquire(most) {
                    break permit;
                }
                overloaded(&worker, direction, "connections are at their limit");
                tokio::time::sleep(Duration::from_millis(50)).await;
            };
            let (stream, downstream) = capture::accept(&listener, |error| {
                overloaded(&worker, direction, &format!("accept: {error}"));
            })
            .await;
            hand_over(
                &worker,
                Accepted {
                    stream,
                    downstream,
                    direction,
                    permit,
                },
                &others,
            )
            .await;
        }
    };
    tokio::select! {
        () = accept => {}
        () = drain.reached(stage) => {}
    }
}

async fn hand_over(worker: &Rc<Worker>, accepted: Accepted, others: &Others) {
    let loads = &others.loads;
    let least = (0..loads.len())
        .min_by_key(|index| loads[*index].load(Relaxed))
        .unwrap_or(0);
    if least == 0 {
        spawn(worker, accepted, 0, loads.clone());
        return;
    }
    let Accepted {
        stream,
        downstream,
        direction,
        permit,
    } = accepted;
    if let Ok(stream) = stream.into_std() {
        let accepted = Accepted {
            stream,
            downstream,
            direction,
            permit,
        };
        // A worker that is gone closes the connection, as it closed its others.
        let _ = others.senders[least - 1].send(accepted).await;
    }
}

fn overloaded(worker: &Worker, direction: Direction, details: &str) {
    worker.refuse(&Refusal {
        direction,
        reason: RefusalReason::Overload,
        downstream: None,
        original: None,
        details,
    });
}

/// Channels to the workers after the first.
pub(crate) fn handover() -> (
    mpsc::Sender<Accepted<std::net::TcpStream>>,
    mpsc::Receiver<Accepted<std::net::TcpStream>>,
) {
    mpsc::channel(HANDOVER)
}
