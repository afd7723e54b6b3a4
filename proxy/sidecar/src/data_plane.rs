//! The data plane as the composition sees it: started whole, drained in stages.

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicUsize},
    thread::JoinHandle,
    time::Duration,
};

use tokio::{
    runtime::{Builder, LocalOptions, LocalRuntime},
    sync::mpsc,
};

use crate::{
    capture::{listen, no_such_family},
    config::Config,
    drain::{self, Drainer, Stage},
    mesh::Mesh,
    observe::{Direction, Observer},
    shared::Shared,
    worker::{self, Others, Worker},
};

impl fmt::Debug for DataPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            drainer,
            shared: _,
            outbound,
            inbound,
            workers,
            ended: _,
        } = self;
        f.debug_struct("DataPlane")
            .field("drainer", drainer)
            .field("outbound", outbound)
            .field("inbound", inbound)
            .field("workers", &workers.len())
            .finish_non_exhaustive()
    }
}

/// Why the data plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("listening on {address}: {error}")]
    Listen {
        address: SocketAddr,
        error: io::Error,
    },
    #[error("starting a worker: {0}")]
    Worker(io::Error),
}

/// A worker's thread ended before the drain: its connections are gone.
#[derive(Clone, Debug, thiserror::Error)]
#[error("worker {index} ended: {why}")]
pub struct WorkerEnded {
    index: usize,
    why: String,
}

/// The running data plane. Dropped without [`DataPlane::drain`], it cuts everything.
pub struct DataPlane {
    drainer: Drainer,
    shared: Arc<Shared>,
    outbound: Vec<SocketAddr>,
    inbound: Vec<SocketAddr>,
    workers: Vec<JoinHandle<()>>,
    /// Told by workers as they end.
    ended: mpsc::Receiver<WorkerEnded>,
}

impl DataPlane {
    /// Listens and carries traffic from now on, on threads of its own.
    pub fn start(
        config: Config,
        mesh: Mesh,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, StartError> {
        let outbound = listen_all(&config.outbound.addresses, Direction::Outbound)?;
        let inbound = listen_all(&config.inbound.addresses, Direction::Inbound)?;
        let addresses = |listeners: &[Listener]| -> Vec<SocketAddr> {
            listeners.iter().map(|listener| listener.address).collect()
        };
        let (outbound_at, inbound_at) = (addresses(&outbound), addresses(&inbound));
        let (drainer, drain) = drain::channel();
        let listeners = [&outbound_at[..], &inbound_at[..]].concat();
        let workers = config.workers.max(1);
        let shared = Shared::new(config, mesh, observer, drain, listeners);
        let listeners = outbound.into_iter().chain(inbound);
        let listeners = listeners.map(|l| (l.direction, l.socket)).collect();
        // As many as may ever be told.
        let (end, ended) = mpsc::channel(workers);
        let workers = start_workers(&shared, workers, listeners, &end)?;
        Ok(Self {
            drainer,
            shared,
            outbound: outbound_at,
            inbound: inbound_at,
            workers,
            ended,
        })
    }

    /// Where captured connections of the application are taken.
    pub fn outbound_addresses(&self) -> &[SocketAddr] {
        &self.outbound
    }

    pub fn inbound_addresses(&self) -> &[SocketAddr] {
        &self.inbound
    }

    /// Captured connections that are open now: inbound, outbound.
    pub fn open_connections(&self) -> (u32, u32) {
        // Each listener holds the permit of the next connection.
        let open = |count: u32, listeners: &[SocketAddr]| {
            count.saturating_sub(u32::try_from(listeners.len()).unwrap_or(u32::MAX))
        };
        let Shared {
            open_inbound,
            open_outbound,
            ..
        } = &*self.shared;
        (
            open(open_inbound.count(), &self.inbound),
            open(open_outbound.count(), &self.outbound),
        )
    }

    /// Returns when a worker has ended without being told to.
    pub async fn ended(&mut self) -> WorkerEnded {
        match self.ended.recv().await {
            Some(ended) => ended,
            None => std::future::pending().await,
        }
    }

    /// Ends it: inbound connections finish what they carry and no new ones are taken; outbound
    /// stays until the application's last connection has closed; after `deadline` what is left is
    /// cut. Call from a thread that is no worker.
    pub async fn drain(mut self, deadline: Duration) {
        self.drainer.enter(Stage::Inbound);
        let outbound_done = async {
            let mut quiet = 0;
            // Twice in a row, so that the pause between two calls is not taken for the end.
            while quiet < 2 {
                quiet = if self.open_connections().1 == 0 {
                    quiet + 1
                } else {
                    0
                };
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            self.drainer.enter(Stage::All);
            while self.workers.iter().any(|worker| !worker.is_finished()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(deadline, outbound_done).await.is_err() {
            tracing::warn!(?deadline, "cutting the connections that are left");
        }
        self.drainer.enter(Stage::Cut);
        for worker in self.workers.drain(..) {
            let _ = tokio::task::spawn_blocking(|| worker.join()).await;
        }
    }
}

struct Listener {
    direction: Direction,
    address: SocketAddr,
    socket: std::net::TcpListener,
}

fn listen_all(addresses: &[SocketAddr], direction: Direction) -> Result<Vec<Listener>, StartError> {
    let mut listeners = Vec::new();
    for address in addresses {
        let bound = listen(*address).and_then(|socket| Ok((socket.local_addr()?, socket)));
        match bound {
            Ok((address, socket)) => listeners.push(Listener {
                direction,
                address,
                socket,
            }),
            Err(error) if address.is_ipv6() && no_such_family(&error) => {
                tracing::info!(%address, "no IPv6 here");
            }
            Err(error) => {
                return Err(StartError::Listen {
                    address: *address,
                    error,
                });
            }
        }
    }
    Ok(listeners)
}

fn start_workers(
    shared: &Arc<Shared>,
    count: usize,
    listeners: Vec<(Direction, std::net::TcpListener)>,
    end: &mpsc::Sender<WorkerEnded>,
) -> Result<Vec<JoinHandle<()>>, StartError> {
    let loads: Arc<[AtomicUsize]> = (0..count).map(|_| AtomicUsize::new(0)).collect();
    let mut senders = Vec::new();
    let mut threads = Vec::new();
    for index in 1..count {
        let (sender, receiver) = worker::handover();
        senders.push(sender);
        let loads = loads.clone();
        threads.push(start_worker(index, shared, end, move |worker| {
            worker::run_other(worker, receiver, index, loads)
        })?);
    }
    let others = Others { loads, senders };
    threads.push(start_worker(0, shared, end, move |worker| {
        worker::run_first(worker, listeners, others)
    })?);
    Ok(threads)
}

fn start_worker<F, R>(
    index: usize,
    shared: &Arc<Shared>,
    end: &mpsc::Sender<WorkerEnded>,
    run: R,
) -> Result<JoinHandle<()>, StartError>
where
    R: FnOnce(std::rc::Rc<Worker>) -> F + Send + 'static,
    F: Future<Output = Result<(), String>> + 'static,
{
    let runtime = || -> io::Result<LocalRuntime> {
        Builder::new_current_thread()
            .enable_all()
            .build_local(LocalOptions::default())
    };
    let shared = shared.clone();
    let end = End {
        index,
        why: Some("it panicked".to_owned()),
        tell: end.clone(),
    };
    let (started, has_started) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name(format!("worker-{index}"));
    let thread = thread.spawn(move || {
        let mut end = end;
        // Made here: a local runtime belongs to one thread.
        let runtime = match runtime() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let _ = started.send(Ok(()));
        let ran = runtime.block_on(async move { run(Worker::new(shared)).await });
        end.why = ran.err();
    });
    let thread = thread.map_err(StartError::Worker)?;
    match has_started.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(StartError::Worker(error)),
        Err(_) => Err(StartError::Worker(io::Error::other(
            "the worker's thread ended",
        ))),
    }
}

/// Tells how a worker's thread ended, also by a panic; nothing where it was told to.
struct End {
    index: usize,
    why: Option<String>,
    tell: mpsc::Sender<WorkerEnded>,
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some(why) = self.why.take() {
            let index = self.index;
            let _ = self.tell.try_send(WorkerEnded { index, why });
        }
    }
}
