//! HTTP on its way through: served to a client, checked, sent on, reported.
//!
//! [`serve`] drives one client connection and hands each request to a [`Handler`] (outbound or
//! inbound). A handler checks the head ([`headers`]), begins an [`exchange`], decides, and
//! [`forward`]s; the response's [`body`] carries all that its end lets go of.

pub(crate) mod body;
pub(crate) mod destination;
pub(crate) mod exchange;
pub(crate) mod filters;
pub(crate) mod forward;
pub(crate) mod guard;
pub(crate) mod headers;
pub(crate) mod mirror;
pub(crate) mod progress;
pub(crate) mod upgrade;

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Notify;

use self::{
    body::ResponseBody,
    exchange::Connection,
    guard::{Guarded, Watched},
};
use crate::{
    drain::Stage,
    io::Stream,
    observe::{Direction, Refusal, RefusalReason},
    pool::{Local, WINDOW_CONNECTION, WINDOW_STREAM},
    worker::Worker,
};

/// Answers the requests of one connection. It always answers: what fails is an answer too.
pub(crate) trait Handler: 'static {
    fn call(
        self: Rc<Self>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<ResponseBody>>;
}

/// What ends a connection from outside.
#[derive(Default)]
struct Ends {
    /// With the request it carries.
    gently: Notify,
    at_once: Notify,
}

/// Serves requests until either side has enough.
pub(crate) async fn serve<H: Handler>(
    worker: &Rc<Worker>,
    stream: impl Stream,
    http2: bool,
    handler: Rc<H>,
    connection: Rc<Connection>,
) {
    let watched = Arc::new(Watched::default());
    let ends = watch(worker, &connection, &watched);
    let stage = match connection.direction {
        Direction::Inbound => Stage::Inbound,
        Direction::Outbound => Stage::All,
    };
    let drain = worker.shared.drain.clone();
    let gently = async {
        tokio::select! {
            () = drain.reached(stage) => {}
            () = ends.gently.notified() => {}
        }
    };
    let service = service_fn(move |request| {
        let handler = handler.clone();
        async move { Ok::<_, Infallible>(handler.call(request).await) }
    });
    let bounds = &worker.shared.config.bounds;
    let served = async {
        if http2 {
            let head_bytes = u32::try_from(bounds.head_bytes).unwrap_or(u32::MAX);
            let server = http2_server(head_bytes, bounds.streams);
            let served = pin!(server.serve_connection(TokioIo::new(stream), service));
            to_its_end(served, gently, |served| served.graceful_shutdown()).await
        } else {
            let stream = Guarded::new(stream, watched.clone(), worker.shared.clock);
            let server = http1_server(bounds.head_bytes, bounds.headers);
            let served = server.serve_connection(TokioIo::new(stream), service);
            let served = pin!(served.with_upgrades());
            to_its_end(served, gently, |served| served.graceful_shutdown()).await
        }
    };
    let result = tokio::select! {
        biased;
        result = served => result,
        () = ends.at_once.notified() => {
            let details = "the request head took too long; send it whole";
            return refuse(worker, &connection, RefusalReason::Slow, details);
        }
    };
    let violation = watched.violation().map(|it| it.to_string());
    let unparsed = result.err().filter(hyper::Error::is_parse);
    if let Some(details) = violation.or(unparsed.map(|error| error.to_string())) {
        refuse(worker, &connection, RefusalReason::Malformed, &details);
    }
}

/// Lets a connection end by itself; once `gently`, it is to `finish` what it has begun.
async fn to_its_end<C: Future>(
    mut served: Pin<&mut C>,
    gently: impl Future<Output = ()>,
    finish: impl FnOnce(Pin<&mut C>),
) -> C::Output {
    tokio::select! {
        biased;
        result = &mut served => return result,
        () = gently => finish(served.as_mut()),
    }
    served.await
}

fn refuse(worker: &Worker, connection: &Connection, reason: RefusalReason, details: &str) {
    worker.refuse(&Refusal {
        direction: connection.direction,
        reason,
        downstream: Some(connection.downstream),
        original: Some(connection.original),
        details,
    });
}

fn http1_server(head_bytes: usize, headers: usize) -> http1::Builder {
    let mut server = http1::Builder::new();
    // Slow heads are the sweep's matter: a timer per request costs more.
    server
        .header_read_timeout(None)
        .max_buf_size(head_bytes.max(8 * 1024))
        .max_headers(headers)
        .preserve_header_case(true)
        .auto_date_header(false);
    server
}

/// Resets that a client has sent and the server has not yet seen are bounded by h2 itself.
fn http2_server(head_bytes: u32, streams: u32) -> http2::Builder<Local> {
    let mut server = http2::Builder::new(Local);
    server
        .timer(TokioTimer::new())
        .max_header_list_size(head_bytes)
        .max_concurrent_streams(streams)
        .initial_stream_window_size(WINDOW_STREAM)
        .initial_connection_window_size(WINDOW_CONNECTION)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20))
        .auto_date_header(false);
    server
}

/// Has the sweep look at the connection: is the client too slow, or gone quiet?
fn watch(worker: &Worker, connection: &Rc<Connection>, watched: &Arc<Watched>) -> Rc<Ends> {
    let ends = Rc::new(Ends::default());
    let (weak, connection) = (Rc::downgrade(&ends), Rc::downgrade(connection));
    let watched = watched.clone();
    let clock = worker.shared.clock;
    let ms = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    let bounds = &worker.shared.config.bounds;
    let (head, idle) = (ms(bounds.head), ms(bounds.idle));
    worker.watch(move |now_ms| {
        let (Some(ends), Some(connection)) = (weak.upgrade(), connection.upgrade()) else {
            return false;
        };
        if connection.under_way.count() > 0 {
            connection.under_way.look(now_ms);
            return true;
        }
        if watched
            .in_head_for(now_ms)
            .is_some_and(|since| since > head)
        {
            ends.at_once.notify_one();
            return false;
        }
        if now_ms.saturating_sub(clock.ms(connection.idle_since.get())) > idle {
            ends.gently.notify_one();
        }
        true
    });
    ends
}
