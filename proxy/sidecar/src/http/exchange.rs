//! One request from its head to the end of its response: what is known of it, reported once.

use std::{
    cell::Cell,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version, header, request::Parts,
};
use http_body::Frame;
use tokio::time::Sleep;
use turnpike_rules::{Identity, ServiceKey, route::Route};

use super::{
    forward::InFlight,
    headers::Checked,
    progress::{Interrupted, Progress, UnderWay},
};
use crate::{
    error::ProxyError,
    limits::Permit,
    observe::{
        AccessRecord, Direction, Flags, HttpOutcome, HttpRecord, HttpSeries, Observer, Span,
    },
    pool::Lease,
};

/// What all requests of one connection have in common.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) direction: Direction,
    pub(crate) downstream: SocketAddr,
    pub(crate) original: SocketAddr,
    /// Inbound: who calls, as verified.
    pub(crate) peer: Option<Identity>,
    pub(crate) sni: Option<String>,
    /// Requests that have not ended.
    pub(crate) under_way: UnderWay,
    /// When the last one ended, on the worker's clock.
    pub(crate) idle_since: Cell<Instant>,
    /// Its place among the open connections; kept until its last request has ended, also one that
    /// has left HTTP.
    #[expect(dead_code, reason = "held for its drop")]
    pub(crate) permit: Option<Permit>,
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A request under way.
pub(crate) struct Exchange {
    connection: Rc<Connection>,
    started: Instant,
    method: Method,
    uri: Uri,
    version: Version,
    host: Option<HeaderValue>,
    user_agent: Option<HeaderValue>,
    request_id: Option<HeaderValue>,
    traceparent: Option<HeaderValue>,
    pub(crate) grpc: bool,
    pub(crate) progress: Rc<Progress>,
    status: u16,
    grpc_status: Option<u32>,
    pub(crate) flags: Flags,
    details: Option<String>,
    pub(crate) attempts: u32,
    pub(crate) upstream: Option<SocketAddr>,
    /// Outbound: who was called.
    pub(crate) callee: Option<Identity>,
    pub(crate) service: Option<ServiceKey>,
    pub(crate) route: Option<Arc<Route>>,
    pub(crate) series: Option<Arc<dyn HttpSeries>>,
    span: Option<Box<dyn Span>>,
}

impl Exchange {
    /// Begins with a request's head, and a span if it is sampled.
    pub(crate) fn begin(
        connection: &Rc<Connection>,
        now: Instant,
        parts: &mut Parts,
        checked: &Checked,
    ) -> Box<Self> {
        let observer = &connection.observer;
        let span = observer.span(connection.direction, &mut parts.headers);
        let logs = observer.logs() || span.is_some();
        let logged = |name: HeaderName| logs.then(|| parts.headers.get(&name).cloned()).flatten();
        // Boxed, since it goes from hand to hand.
        Box::new(Self {
            connection: connection.clone(),
            started: now,
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            version: parts.version,
            host: logged(header::HOST),
            user_agent: logged(header::USER_AGENT),
            request_id: logged(REQUEST_ID),
            traceparent: logged(TRACEPARENT),
            grpc: checked.grpc,
            progress: connection.under_way.begin(),
            status: 0,
            grpc_status: None,
            flags: Flags::NONE,
            details: None,
            attempts: 0,
            upstream: None,
            callee: None,
            service: None,
            route: None,
            series: None,
            span,
        })
    }

    /// The proxy answers itself.
    pub(crate) fn failed(&mut self, error: &ProxyError) {
        self.flags = self.flags.with(error.flags());
        self.details = Some(error.to_string());
    }

    pub(crate) fn responded(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.status = status.as_u16();
        if self.grpc {
            self.grpc_status = grpc_status(headers);
        }
    }

    /// Bytes to the client outside of any body.
    pub(crate) fn count_sent(&mut self, bytes: u64) {
        self.progress.sent.set(self.progress.sent.get() + bytes);
    }

    fn report(&mut self) {
        let connection = self.connection.clone();
        connection.under_way.end(&self.progress);
        let (received, sent) = (self.progress.received.get(), self.progress.sent.get());
        let now = tokio::time::Instant::now().into_std();
        connection.idle_since.set(now);
        let duration = now.saturating_duration_since(self.started);
        if let Some(series) = &self.series {
            series.finished(&HttpOutcome {
                status: self.status,
                grpc_status: self.grpc_status,
                flags: self.flags,
                duration,
                request_bytes: received,
                response_bytes: sent,
            });
        }
        let span = self.span.take();
        if !connection.observer.logs() && span.is_none() {
            return;
        }
        let host = self.host.as_ref().and_then(|host| host.to_str().ok());
        let host = host.or_else(|| self.uri.authority().map(http::uri::Authority::as_str));
        let record = AccessRecord {
            direction: connection.direction,
            http: Some(HttpRecord {
                method: &self.method,
                uri: &self.uri,
                version: self.version,
                host,
                user_agent: self.user_agent.as_ref(),
                request_id: self.request_id.as_ref(),
                traceparent: self.traceparent.as_ref(),
                status: self.status,
                grpc_status: self.grpc_status,
            }),
            flags: self.flags,
            details: self.details.as_deref(),
            duration,
            received,
            sent,
            downstream: connection.downstream,
            original: connection.original,
            upstream: self.upstream,
            peer: connection.peer.as_ref().or(self.callee.as_ref()),
            service: self.service.as_ref(),
            route: self.route.as_deref().map(|route| &*route.name),
            attempts: self.attempts,
            sni: connection.sni.as_deref(),
        };
        connection.observer.log(&record);
        if let Some(span) = span {
            span.finish(&record);
        }
    }
}

/// A request that is dropped before it has an answer: the client went away.
impl Drop for Exchange {
    fn drop(&mut self) {
        if self.status == 0 && self.flags == Flags::NONE {
            self.flags = Flags::CLIENT_GONE;
        }
        self.report();
    }
}

fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// Why what was allowed ends.
pub(crate) const WITHDRAWN: &str = "authorization was withdrawn";

/// How a response's body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Complete,
    Client,
    Upstream,
    Timeout,
    /// Authorization was withdrawn.
    Withdrawn,
    /// Nothing has moved for too long.
    Idle,
}

/// All that a response's end lets go of.
pub(crate) struct Finish {
    pub(crate) exchange: Box<Exchange>,
    /// The upstream connection, which a complete response makes free for the next request.
    pub(crate) lease: Option<Lease>,
    pub(crate) permit: Option<Permit>,
    pub(crate) in_flight: Option<InFlight>,
    /// The request's own timeout.
    pub(crate) deadline: Option<Pin<Box<Sleep>>>,
}

impl Finish {
    pub(crate) fn new(exchange: Box<Exchange>) -> Self {
        Self {
            exchange,
            lease: None,
            permit: None,
            in_flight: None,
            deadline: None,
        }
    }

    /// Notes what a frame carries.
    pub(crate) fn saw(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.exchange.count_sent(data.len() as u64);
        } else if self.exchange.grpc
            && let Some(trailers) = frame.trailers_ref()
        {
            self.exchange.grpc_status = grpc_status(trailers).or(self.exchange.grpc_status);
        }
    }

    /// Whether something else than its end ends the response; `waiting`: it has nothing to give
    /// just now.
    pub(crate) fn poll_interrupted(
        &mut self,
        cx: &mut Context<'_>,
        waiting: bool,
    ) -> Result<(), (End, &'static str)> {
        let progress = &self.exchange.progress;
        if !progress.still_allowed() {
            return Err((End::Withdrawn, WITHDRAWN));
        }
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(cx) == Poll::Ready(())
        {
            return Err((End::Timeout, "the request's timeout passed"));
        }
        if !waiting {
            return Ok(());
        }
        match self.exchange.progress.poll_interrupted(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(Interrupted::Withdrawn) => Err((End::Withdrawn, WITHDRAWN)),
            Poll::Ready(Interrupted::Idle) => {
                Err((End::Idle, "nothing moved for the idle timeout"))
            }
        }
    }

    pub(crate) fn end(mut self, end: End) {
        let flag = match end {
            End::Complete => Flags::NONE,
            End::Client => Flags::CLIENT_GONE,
            End::Upstream => Flags::UPSTREAM_CLOSED,
            End::Timeout => Flags::TIMEOUT,
            End::Withdrawn => Flags::UNAUTHORIZED,
            End::Idle => Flags::IDLE,
        };
        self.exchange.flags = self.exchange.flags.with(flag);
        if end == End::Complete
            && let Some(lease) = self.lease.take()
        {
            lease.release();
        }
    }
}
