//! Plaintext HTTP: every request is judged, on whatever connection it comes.
//!
//! The client's bytes pass the framing check ([`super::scanned`]), then hyper's parser; a request
//! becomes a [`request::Target`], is judged, and goes on in that form. One connection to the
//! destination is opened with the first allowed request, and again when the server closed it.

mod request;
mod upstream;

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt, Empty, Full, combinators::BoxBody};
use hyper::{
    body::{Body as _, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use turnpike_ledger::{
    Event,
    record::{self, Attempt, End, Verdict},
};

use self::{
    request::{InvalidRequest, Target, strip_hop},
    upstream::{Unanswered, Upstream},
};
use super::{
    Door,
    accept::{Client, abort, farewell},
    forward::{OpenError, Revocation},
    judge::{Caller, Claim, attempt, judge, refuse},
    scanned::Scanned,
};
use crate::{metrics::Judged, state::Pod};

type Body = BoxBody<Bytes, hyper::Error>;

/// A head beyond this is refused with 431.
const MAX_HEAD: usize = 64 * 1024;
const MAX_HEADERS: usize = 128;

/// What the requests of one connection share.
struct Session<'a> {
    door: &'a Arc<Door>,
    caller: Caller,
    pod: Arc<Pod>,
    stop: CancellationToken,
    /// One at a time uses it: HTTP/1 answers in order.
    upstream: Mutex<Option<Upstream>>,
    /// What the last request claimed; it stands for the connection when policy changes.
    last: parking_lot::Mutex<Option<Claim>>,
}

/// Serves a connection to its end.
pub(super) async fn serve(client: Client<'_>, first: BytesMut) {
    let Client {
        door,
        stream,
        caller,
        pod,
        stop,
    } = client;
    let mut revocation = Revocation::guard(&door.state);
    let session = Session {
        door,
        caller,
        pod,
        stop,
        upstream: Mutex::new(None),
        last: parking_lot::Mutex::new(None),
    };
    let service = service_fn(|request| Box::pin(session.answer(request)));
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        .header_read_timeout(door.config.http_idle)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .half_close(true)
        .preserve_header_case(true);
    let mut connection =
        server.serve_connection(TokioIo::new(Scanned::new(stream, first)), service);
    let (end, reason) = tokio::select! {
        biased;
        reason = session.revoked(&mut revocation) => (End::Revoked, Some(reason)),
        result = std::future::poll_fn(|cx| connection.poll_without_shutdown(cx)) => match result {
            Ok(()) => (End::Finished, None),
            Err(error) => (End::Broken, Some(error.to_string())),
        },
        () = session.stop.cancelled() => (End::GateStopped, None),
    };
    let scanned = connection.into_parts().io.into_inner();
    let violation = scanned.violation();
    let mut stream = scanned.into_inner();
    if let Some(why) = violation {
        let refused = text(
            StatusCode::BAD_REQUEST,
            &format!("{why}; the connection is closed"),
        );
        farewell(&mut stream, &raw(&refused)).await;
        session.deny(&Claim::Tcp, why.to_string()).await;
    } else if matches!(end, End::Revoked | End::GateStopped) {
        abort(&stream);
    } else {
        farewell(&mut stream, b"").await;
    }
    drop(stream);
    let Some(upstream) = session.upstream.lock().await.take() else {
        return;
    };
    if end == End::Finished {
        let revoked = session.revoked(&mut revocation);
        upstream.finish(door, revoked, &session.stop).await;
    } else {
        upstream.close(door, end, reason).await;
    }
}

impl Session<'_> {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let port = self.caller.destination.port();
        let target = match Target::of(&request, port) {
            Ok(target) => target,
            Err(error) => return Ok(self.refuse_invalid(&request, &error).await),
        };
        let claim = Claim::Http {
            host: target.host.clone(),
            method: target.method.to_string(),
            path: target.path.clone(),
        };
        let verdict = judge(&self.door.state.view(), &self.caller, &claim);
        self.count(verdict.verdict);
        if verdict.verdict == Verdict::Denied {
            let response = forbidden(&verdict);
            self.door.record_denial(Some(&self.pod), verdict).await;
            return Ok(response);
        }
        let before = self.last.lock().replace(claim);
        let request = match target.rewrite(request) {
            Ok(request) => request,
            Err(error) => return Ok(text(error.status(), &error.to_string())),
        };
        Ok(match self.forward(verdict, before, request).await {
            Ok(response) => response,
            Err(ForwardError::Open(error @ OpenError::NotRecorded(_))) => {
                text(StatusCode::SERVICE_UNAVAILABLE, &error.to_string())
            }
            Err(error) => text(StatusCode::BAD_GATEWAY, &error.to_string()),
        })
    }

    /// `before` is what the last request claimed, which the connection stands for until this one.
    async fn forward(
        &self,
        verdict: Attempt,
        before: Option<Claim>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, ForwardError> {
        let mut slot = self.upstream.lock().await;
        if let Some(gone) = slot.take_if(|upstream| upstream.is_closed()) {
            self.retire(gone, before.clone());
        }
        let http10 = request.version() == Version::HTTP_10;
        let repeated = repeatable(&request);
        let mut request = request.map(BodyExt::boxed);
        let mut response = loop {
            let reused = slot.is_some();
            let upstream = match slot.as_mut() {
                Some(upstream) => {
                    self.record_other(upstream, verdict.clone()).await?;
                    upstream
                }
                None => slot.insert(
                    Upstream::open(self.door, &self.caller, &self.pod, verdict.clone()).await?,
                ),
            };
            match upstream.send(request).await {
                Ok(response) => break response,
                // The server closed what was idle just then.
                Err(Unanswered::Unsent(back, _)) if reused => request = *back,
                Err(Unanswered::Unsent(_, error) | Unanswered::Sent(error)) => match &repeated {
                    Some(again) if reused => {
                        request = again.clone().map(|body| body.map_err(never).boxed());
                    }
                    _ => return Err(error.into()),
                },
            }
            if let Some(gone) = slot.take() {
                self.retire(gone, before.clone());
            }
        };
        strip_hop(response.headers_mut());
        if http10 {
            *response.version_mut() = Version::HTTP_10;
        }
        Ok(response.map(BodyExt::boxed))
    }

    /// Ends a connection that its server has closed, beside the request that goes to the next one.
    fn retire(&self, gone: Upstream, claim: Option<Claim>) {
        let (door, caller, stop) = (self.door.clone(), self.caller.clone(), self.stop.clone());
        let mut revocation = Revocation::guard(&door.state);
        self.door.tasks.spawn(async move {
            let revoked = async {
                match &claim {
                    Some(claim) => revocation.revoked(&caller, claim).await,
                    None => std::future::pending().await,
                }
            };
            gone.finish(&door, revoked, &stop).await;
        });
    }

    /// A request under another rule or for another host than the last one on record is put on
    /// record before it goes on.
    async fn record_other(
        &self,
        upstream: &mut Upstream,
        mut verdict: Attempt,
    ) -> Result<(), OpenError> {
        if upstream.covers(&verdict) {
            return Ok(());
        }
        verdict.connection = upstream.id().to_owned();
        self.door
            .spool
            .record(Event::Request(verdict.clone()))
            .await?;
        upstream.cover(&verdict);
        Ok(())
    }

    async fn refuse_invalid(
        &self,
        request: &Request<Incoming>,
        error: &InvalidRequest,
    ) -> Response<Body> {
        let claim = Claim::Http {
            host: None,
            method: request.method().to_string(),
            path: request.uri().path().to_owned(),
        };
        let host = request.headers().get(header::HOST);
        let claimed = host.map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned());
        let standing = self.door.state.view().standing(self.caller.source.ip());
        let mut denied = refuse(attempt(&self.caller, &claim, &standing), error.to_string());
        denied.claimed = claimed.map(|claimed| crate::describe::bounded(&claimed));
        self.count(Verdict::Denied);
        self.door.record_denial(Some(&self.pod), denied).await;
        text(error.status(), &error.to_string())
    }

    async fn deny(&self, claim: &Claim, reason: String) {
        let standing = self.door.state.view().standing(self.caller.source.ip());
        let mut denied = refuse(attempt(&self.caller, claim, &standing), reason);
        denied.protocol = record::Protocol::Http;
        self.door.record_denial(Some(&self.pod), denied).await;
    }

    /// Waits until the last allowed request would be denied.
    async fn revoked(&self, revocation: &mut Revocation) -> String {
        loop {
            let denied = |claim: &Claim| revocation.denied(&self.caller, claim);
            let denied = self.last.lock().as_ref().and_then(denied);
            if let Some(why) = denied {
                return why;
            }
            if !revocation.changed().await {
                return "the gate stops".into();
            }
        }
    }

    fn count(&self, verdict: Verdict) {
        let judged = Judged {
            protocol: "http",
            verdict: verdict.as_str(),
        };
        self.door.metrics.requests.get_or_create(&judged).inc();
    }
}

/// The request once more, where a server may have it twice without harm (RFC 9110, 9.2.2).
fn repeatable(request: &Request<Incoming>) -> Option<Request<Empty<Bytes>>> {
    let (method, body) = (request.method(), request.body());
    let harmless = method.is_safe() && body.is_end_stream();
    harmless.then(|| {
        let mut again = Request::new(Empty::new());
        *again.method_mut() = method.clone();
        *again.uri_mut() = request.uri().clone();
        *again.version_mut() = request.version();
        *again.headers_mut() = request.headers().clone();
        // The spelling of the headers' names.
        *again.extensions_mut() = request.extensions().clone();
        again
    })
}

fn never<T>(never: Infallible) -> T {
    match never {}
}

#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("the destination did not answer as HTTP: {0}")]
    Http(#[from] hyper::Error),
}

fn forbidden(denied: &Attempt) -> Response<Body> {
    let reason = denied.reason.as_deref().unwrap_or_default();
    let by = denied.rule.as_ref().map_or_else(String::new, |rule| {
        format!(" (policy {}, version {})", rule.policy, rule.version)
    });
    text(StatusCode::FORBIDDEN, &format!("{reason}{by}"))
}

/// An answer of the gate's own. It ends the connection: what else the client has sent was meant
/// for somebody else.
fn text(status: StatusCode, message: &str) -> Response<Body> {
    let body = Full::from(format!("turnpike: {message}\n")).map_err(never);
    let mut response = Response::new(body.boxed());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    headers.insert("x-turnpike-egress", HeaderValue::from_static("denied"));
    response
}

/// The head of an answer, for a connection that hyper has given back.
fn raw(response: &Response<Body>) -> Vec<u8> {
    let status = response.status();
    let reason = status.canonical_reason().unwrap_or_default();
    format!(
        "HTTP/1.1 {} {reason}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
        status.as_u16()
    )
    .into_bytes()
}

/// How long a connection to a destination may stay without answering to its end of stream.
const CLOSE: Duration = Duration::from_secs(1);
