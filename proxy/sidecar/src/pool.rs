//! Connections to one endpoint, of one worker: HTTP/1 one request at a time, HTTP/2 shared.

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
    rt::Executor,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{sync::Notify, task::AbortHandle};

use crate::{
    circuit::Circuit, endpoint::Endpoint, error::ProxyError, http::body::RequestBody,
    io::Answering, limits::Permit, tls::Inside, worker::Worker,
};

/// Streams on one HTTP/2 connection before a second one is opened; the least that RFC 9113 §6.5.2
/// recommends servers to allow.
const STREAMS: usize = 100;
/// Idle HTTP/1 connections kept to one endpoint.
const IDLE: usize = 64;

/// Runs hyper's tasks on the worker's own runtime.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Local;

impl<F: Future + 'static> Executor<F> for Local {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

/// The connections themselves.
#[derive(Default)]
pub(crate) struct Pool {
    /// The most recently used last.
    http1: RefCell<Vec<Http1>>,
    http2: RefCell<Vec<Rc<Http2>>>,
    /// The connection being made, which all HTTP/2 requests wait for together.
    opening: RefCell<Option<Rc<Opening>>>,
}

#[derive(Default)]
struct Opening {
    done: Notify,
    failed: RefCell<Option<ProxyError>>,
}

struct Http1 {
    wire: Wire,
    born: Instant,
    idle_since: Instant,
}

/// An HTTP/1 connection: what sends on it, and the task that carries it.
struct Wire {
    sender: http1::SendRequest<RequestBody>,
    task: AbortHandle,
}

struct Http2 {
    sender: http2::SendRequest<RequestBody>,
    born: Instant,
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
}

/// The right to send one request.
pub(crate) enum Lease {
    Http1 { connection: Box<Http1Lease> },
    Http2 { connection: Http2Lease },
}

pub(crate) struct Http1Lease {
    wire: Wire,
    born: Instant,
    reused: bool,
    endpoint: Rc<Endpoint>,
    circuit: Rc<Circuit>,
}

pub(crate) struct Http2Lease {
    connection: Rc<Http2>,
    reused: bool,
}

/// A try that brought no response.
pub(crate) struct Failed {
    pub(crate) error: ProxyError,
    /// The request, where it was not sent at all.
    pub(crate) request: Option<Request<RequestBody>>,
    pub(crate) reused: bool,
}

impl Drop for Http2Lease {
    fn drop(&mut self) {
        self.connection
            .streams
            .set(self.connection.streams.get().saturating_sub(1));
        self.connection
            .idle_since
            .set(tokio::time::Instant::now().into_std());
    }
}

impl Pool {
    /// A connection for one request, from the pool or new.
    pub(crate) async fn lease(
        endpoint: &Rc<Endpoint>,
        worker: &Rc<Worker>,
        circuit: &Rc<Circuit>,
        inside: Inside,
    ) -> Result<Lease, ProxyError> {
        let pooled = match inside {
            Inside::Http2 => endpoint.pool.take_http2(worker),
            _ => {
                let now = worker.now();
                endpoint.pool.take_http1(endpoint, circuit, worker, now)
            }
        };
        match pooled {
            Some(lease) => Ok(lease),
            // Boxed, so that requests which need no new connection do not carry the state of
            // making one around.
            None if inside == Inside::Http2 => {
                Box::pin(Self::open_http2_lease(endpoint, worker, circuit)).await
            }
            None => Box::pin(Self::open_http1_lease(endpoint, worker, circuit)).await,
        }
    }

    async fn open_http1_lease(
        endpoint: &Rc<Endpoint>,
        worker: &Rc<Worker>,
        circuit: &Rc<Circuit>,
    ) -> Result<Lease, ProxyError> {
        let pending = circuit.pending()?;
        // To wait for one may take as long as to make one.
        let deadline = tokio::time::Instant::now() + circuit.connect.get();
        let permit = loop {
            if let Some(permit) = circuit.try_connection() {
                break permit;
            }
            circuit.wait_for_connection(deadline).await?;
            if let Some(lease) = endpoint
                .pool
                .take_http1(endpoint, circuit, worker, worker.now())
            {
                return Ok(lease);
            }
        };
        let wire = open_http1(endpoint, worker, circuit, permit).await?;
        drop(pending);
        Ok(Lease::Http1 {
            connection: Box::new(Http1Lease {
                wire,
                born: worker.now(),
                reused: false,
                endpoint: endpoint.clone(),
                circuit: circuit.clone(),
            }),
        })
    }

    fn take_http1(
        &self,
        endpoint: &Rc<Endpoint>,
        circuit: &Rc<Circuit>,
        worker: &Worker,
        now: Instant,
    ) -> Option<Lease> {
        let mut idle = self.http1.borrow_mut();
        let oldest = worker.shared.config.bounds.connection_age;
        while let Some(Http1 {
            wire,
            born,
            idle_since,
        }) = idle.pop()
        {
            let fresh = now.saturating_duration_since(born) < oldest
                && now.saturating_duration_since(idle_since) < circuit.pool_idle;
            if fresh && wire.sender.is_ready() {
                let (endpoint, circuit) = (endpoint.clone(), circuit.clone());
                let lease = Http1Lease {
                    wire,
                    born,
                    reused: true,
                    endpoint,
                    circuit,
                };
                return Some(Lease::Http1 {
                    connection: Box::new(lease),
                });
            }
        }
        None
    }

    async fn open_http2_lease(
        endpoint: &Rc<Endpoint>,
        worker: &Rc<Worker>,
        circuit: &Rc<Circuit>,
    ) -> Result<Lease, ProxyError> {
        let _pending = circuit.pending()?;
        loop {
            let opening = endpoint.pool.open_http2(endpoint, worker, circuit);
            opening.wait().await?;
            if let Some(mut lease) = endpoint.pool.take_http2(worker) {
                if let Lease::Http2 { connection } = &mut lease {
                    connection.reused = false;
                }
                return Ok(lease);
            }
            // Others were faster and filled it: one more is opened.
        }
    }

    fn take_http2(&self, worker: &Worker) -> Option<Lease> {
        let mut connections = self.http2.borrow_mut();
        let oldest = worker.shared.config.bounds.connection_age;
        let now = worker.now();
        connections.retain(|connection| {
            !connection.sender.is_closed()
                && now.saturating_duration_since(connection.born) < oldest
        });
        let free = connections
            .iter()
            .find(|connection| connection.streams.get() < STREAMS)?;
        free.streams.set(free.streams.get() + 1);
        Some(Lease::Http2 {
            connection: Http2Lease {
                connection: free.clone(),
                reused: true,
            },
        })
    }

    /// Begins to open a connection, unless one is being opened. The task outlives a caller that
    /// goes away, since others may wait too; the connect timeout bounds it.
    fn open_http2(
        &self,
        endpoint: &Rc<Endpoint>,
        worker: &Rc<Worker>,
        circuit: &Rc<Circuit>,
    ) -> Rc<Opening> {
        if let Some(opening) = &*self.opening.borrow() {
            return opening.clone();
        }
        let opening = Rc::new(Opening::default());
        *self.opening.borrow_mut() = Some(opening.clone());
        let (endpoint, worker, circuit) = (endpoint.clone(), worker.clone(), circuit.clone());
        let result = opening.clone();
        tokio::task::spawn_local(async move {
            match open_http2(&endpoint, &worker, &circuit).await {
                Ok(connection) => endpoint.pool.http2.borrow_mut().push(Rc::new(connection)),
                Err(error) => *result.failed.borrow_mut() = Some(error),
            }
            *endpoint.pool.opening.borrow_mut() = None;
            result.done.notify_waiters();
        });
        opening
    }

    /// Lets go of what has not been used for long; says whether nothing is left.
    pub(crate) fn sweep(&self, now: Instant, idle: Duration) -> bool {
        let recent = |since: Instant| now.saturating_duration_since(since) < idle;
        let mut http1 = self.http1.borrow_mut();
        http1.retain(|entry| recent(entry.idle_since) && !entry.wire.sender.is_closed());
        let mut http2 = self.http2.borrow_mut();
        http2.retain(|entry| {
            !entry.sender.is_closed() && (entry.streams.get() > 0 || recent(entry.idle_since.get()))
        });
        http1.is_empty() && http2.is_empty()
    }

    /// Closes one idle HTTP/1 connection, for the sake of another endpoint of the same Service.
    pub(crate) fn evict(&self) -> bool {
        let mut idle = self.http1.borrow_mut();
        !idle.is_empty() && {
            idle.remove(0);
            true
        }
    }
}

impl Opening {
    async fn wait(&self) -> Result<(), ProxyError> {
        self.done.notified().await;
        self.failed.borrow().clone().map_or(Ok(()), Err)
    }
}

/// Frames of at most this much of a response wait in hyper for a slow client.
const READ_BUFFER: usize = 64 * 1024;

async fn open_http1(
    endpoint: &Rc<Endpoint>,
    worker: &Rc<Worker>,
    circuit: &Rc<Circuit>,
    permit: Permit,
) -> Result<Wire, ProxyError> {
    let stream = endpoint
        .dial(worker, circuit.connect.get(), Inside::Http1)
        .await?;
    let bounds = &worker.shared.config.bounds;
    let (sender, connection) = http1::Builder::new()
        .preserve_header_case(true)
        .max_buf_size(READ_BUFFER.max(bounds.head_bytes))
        .max_headers(bounds.headers)
        .handshake(TokioIo::new(Answering::new(stream)))
        .await
        .map_err(|error| endpoint.connect_error(&io::Error::other(error)))?;
    let circuit = circuit.clone();
    let task = tokio::task::spawn_local(async move {
        // Its error reaches the request that it concerns.
        let _ = connection.with_upgrades().await;
        drop(permit);
        circuit.released.notify_one();
    });
    let task = task.abort_handle();
    Ok(Wire { sender, task })
}

async fn open_http2(
    endpoint: &Rc<Endpoint>,
    worker: &Rc<Worker>,
    circuit: &Rc<Circuit>,
) -> Result<Http2, ProxyError> {
    let Some(permit) = circuit.try_connection() else {
        return Err(circuit.overflow("connections", circuit.max_connections.get()));
    };
    let stream = endpoint
        .dial(worker, circuit.connect.get(), Inside::Http2)
        .await?;
    let bounds = &worker.shared.config.bounds;
    let head_bytes = u32::try_from(bounds.head_bytes).unwrap_or(u32::MAX);
    let (sender, connection) = http2::Builder::new(Local)
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW_STREAM)
        .initial_connection_window_size(WINDOW_CONNECTION)
        .max_header_list_size(head_bytes)
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| endpoint.connect_error(&io::Error::other(error)))?;
    let circuit = circuit.clone();
    tokio::task::spawn_local(async move {
        let _ = connection.await;
        drop(permit);
        circuit.released.notify_one();
    });
    let now = worker.now();
    Ok(Http2 {
        sender,
        born: now,
        streams: Cell::new(0),
        idle_since: Cell::new(now),
    })
}

/// HTTP/2 flow control, both sides: what one stream, and one connection, may have waiting here.
pub(crate) const WINDOW_STREAM: u32 = 256 * 1024;
pub(crate) const WINDOW_CONNECTION: u32 = 1024 * 1024;

impl Lease {
    /// Sends a request and awaits the head of its response.
    pub(crate) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, Failed> {
        match self {
            Self::Http1 { connection } => {
                let reused = connection.reused;
                let sent = connection.wire.sender.try_send_request(request).await;
                sent.map_err(|error| failed(error, reused))
            }
            Self::Http2 { connection } => {
                let reused = connection.reused;
                let mut sender = connection.connection.sender.clone();
                let sent = sender.try_send_request(request).await;
                sent.map_err(|error| failed(error, reused))
            }
        }
    }

    /// The response is complete: the connection may serve another request, once the request is
    /// complete too. A server may answer before it has read all of that, and never read the rest.
    pub(crate) fn release(self) {
        let Self::Http1 { connection } = self else {
            return;
        };
        let Http1Lease {
            mut wire,
            born,
            endpoint,
            circuit,
            ..
        } = *connection;
        if wire.sender.is_ready() {
            give_back(wire, born, &endpoint, &circuit);
        } else if !wire.sender.is_closed() {
            // The request's own body has not ended, or hyper has not yet seen the response's end.
            tokio::task::spawn_local(async move {
                let ready = tokio::time::timeout(REST_OF_REQUEST, wire.sender.ready()).await;
                match ready {
                    Ok(Ok(())) => give_back(wire, born, &endpoint, &circuit),
                    // Ends the request's body with it.
                    Ok(Err(_)) | Err(_) => wire.task.abort(),
                }
            });
        }
    }
}

/// How long the rest of a request may take after its response is complete.
const REST_OF_REQUEST: Duration = Duration::from_secs(1);

fn give_back(wire: Wire, born: Instant, endpoint: &Rc<Endpoint>, circuit: &Rc<Circuit>) {
    let mut idle = endpoint.pool.http1.borrow_mut();
    if idle.len() < IDLE {
        let idle_since = tokio::time::Instant::now().into_std();
        idle.push(Http1 {
            wire,
            born,
            idle_since,
        });
    }
    drop(idle);
    circuit.released.notify_one();
}

fn failed(mut error: TrySendError<Request<RequestBody>>, reused: bool) -> Failed {
    let request = error.take_message();
    let unsent = request.is_some();
    Failed {
        error: classify(&error.into_error(), unsent),
        request,
        reused,
    }
}

/// What hyper's error means for a retry.
fn classify(error: &hyper::Error, unsent: bool) -> ProxyError {
    use std::error::Error as _;
    let text: Arc<str> = match error.source() {
        Some(source) => format!("{error}: {source}").into(),
        None => error.to_string().into(),
    };
    if unsent {
        return ProxyError::Unsent(text);
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(source) = cause {
        if let Some(h2) = source.downcast_ref::<h2::Error>() {
            if h2.reason() == Some(h2::Reason::REFUSED_STREAM) && h2.is_remote() {
                return ProxyError::Refused;
            }
            if h2.is_io() {
                return ProxyError::Closed(text);
            }
            return ProxyError::Reset(text);
        }
        cause = source.source();
    }
    if error.is_parse() {
        ProxyError::BadAnswer(text)
    } else {
        ProxyError::Closed(text)
    }
}
