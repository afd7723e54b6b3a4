//! One request on its way up: an endpoint, a connection, a try, and another if that is safe.

use std::{cell::Cell, future::poll_fn, pin::pin, rc::Rc, task::Poll, time::Duration};

use http::{Method, Request, Response, StatusCode, Version, request::Parts};
use hyper::body::Incoming;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use super::{
    body::{RequestBody, ResponseBody, Source},
    destination::{Destination, Picker},
    exchange::{Exchange, Finish, WITHDRAWN},
    mirror::Copy,
    progress::{Interrupted, Progress},
};
use crate::{
    endpoint::Endpoint,
    error::{Fault, IDLE, ProxyError, Retry, answered_unprocessed},
    limits::Permit,
    observe::Flags,
    pool::{Failed, Lease, Pool},
    retry::Plan,
    shared::Shared,
    tls::Inside,
    worker::Worker,
};

/// Counts towards an endpoint's load for as long as it exists.
pub(crate) struct InFlight(Rc<Endpoint>);

impl InFlight {
    pub(crate) fn on(endpoint: &Rc<Endpoint>) -> Self {
        endpoint.load.begin();
        Self(endpoint.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.load.end();
    }
}

/// A response whose head has come, with all that its body needs.
pub(crate) struct Answered {
    pub(crate) response: Response<Incoming>,
    pub(crate) endpoint: Rc<Endpoint>,
    lease: Lease,
    permit: Permit,
    in_flight: InFlight,
    deadline: Option<Instant>,
}

impl Answered {
    /// The response as it goes on, its end reported by `exchange`.
    pub(crate) fn into_response(self, exchange: Box<Exchange>) -> Response<ResponseBody> {
        let (response, finish) = self.into_parts(exchange);
        response.map(|body| ResponseBody::stream(body).ending_in(finish))
    }

    pub(crate) fn into_parts(self, exchange: Box<Exchange>) -> (Response<Incoming>, Box<Finish>) {
        let mut finish = Box::new(Finish::new(exchange));
        finish.lease = Some(self.lease);
        finish.permit = Some(self.permit);
        finish.in_flight = Some(self.in_flight);
        finish.deadline = self
            .deadline
            .map(|deadline| Box::pin(sleep_until(deadline)));
        (self.response, finish)
    }
}

/// Sends a request, again where that is safe and allowed, until there is a response to pass on.
pub(crate) async fn forward(
    worker: &Rc<Worker>,
    to: &Destination,
    copy: Option<Copy>,
    parts: Parts,
    body: Incoming,
    exchange: &mut Exchange,
    upgrade: bool,
) -> Result<Answered, ProxyError> {
    let limit = to.policy.circuit.max_requests;
    let permit = to.shared.requests.try_acquire(limit);
    let permit = permit.ok_or_else(|| to.circuit.overflow("requests", limit))?;
    to.shared.budget.request(worker.shared.clock.now_ms());
    let whole = to.whole_timeout();
    let deadline = whole.map(|whole| Instant::now() + whole);
    let idle = to.policy.timeouts.idle;
    exchange.progress.limit(idle);
    let progress = exchange.progress.clone();
    let keep_for_copy = copy.is_some();
    let mut tries = Tries::new(worker, to, parts, body, exchange, upgrade, keep_for_copy);
    let run = unless_interrupted(&progress, idle.unwrap_or_default(), tries.run(exchange));
    let tried = match (deadline, whole) {
        (Some(deadline), Some(after)) => match timeout_at(deadline, run).await {
            Ok(tried) => tried,
            Err(_) => {
                tries.ran_out(exchange);
                Err(ProxyError::Timeout {
                    what: "request",
                    after,
                })
            }
        },
        _ => run.await,
    };
    if let Some(copy) = copy {
        copy.send(worker, &tries.source);
    }
    let (response, lease, endpoint, in_flight) = tried?;
    tries.source.release();
    Ok(Answered {
        response,
        endpoint,
        lease,
        permit,
        in_flight,
        deadline,
    })
}

/// `run`, unless nothing moves for too long, or may any more.
async fn unless_interrupted<T>(
    progress: &Progress,
    after: Duration,
    run: impl Future<Output = Result<T, ProxyError>>,
) -> Result<T, ProxyError> {
    let mut run = pin!(run);
    poll_fn(|cx| {
        let polled = run.as_mut().poll(cx);
        match progress.poll_interrupted(cx) {
            Poll::Ready(why) if polled.is_pending() => Poll::Ready(Err(match why {
                Interrupted::Idle => ProxyError::Timeout { what: IDLE, after },
                Interrupted::Withdrawn => ProxyError::Unauthorized(WITHDRAWN.to_owned()),
            })),
            _ => polled,
        }
    })
    .await
}

type Tried = (Response<Incoming>, Lease, Rc<Endpoint>, InFlight);

/// The tries of one request.
struct Tries<'a> {
    worker: &'a Rc<Worker>,
    to: &'a Destination,
    picker: Picker,
    plan: Plan<'a>,
    inside: Inside,
    /// The request, while no try holds it.
    request: Option<Request<RequestBody>>,
    /// Its head, where it may have to be sent again after it was sent.
    spare: Option<Parts>,
    source: Source,
    tried: Vec<Rc<Endpoint>>,
    /// Whom the present try asks, and since when; nobody once it is told what came of it.
    asked: Option<(Rc<Endpoint>, Cell<std::time::Instant>)>,
    retries: u32,
    /// Tries in a row that met a pooled connection just as it was closed.
    stale: u32,
    /// It asks for another protocol, which the answer may grant.
    upgrade: bool,
}

/// Pooled connections that may turn out closed before a request counts as failed.
const STALE: u32 = 8;

impl<'a> Tries<'a> {
    fn new(
        worker: &'a Rc<Worker>,
        to: &'a Destination,
        mut parts: Parts,
        body: Incoming,
        exchange: &Exchange,
        upgrade: bool,
        keep_for_copy: bool,
    ) -> Self {
        let mut plan = Plan::new(&to.policy.retry, to.route.as_deref(), &parts.method);
        let connect = parts.method == Method::CONNECT;
        if upgrade {
            plan.attempts = plan.attempts.min(1);
        }
        let inside = match parts.version {
            Version::HTTP_2 => Inside::Http2,
            _ => Inside::Http1,
        };
        if inside == Inside::Http1 {
            parts.version = Version::HTTP_11;
        }
        // A stream can be refused after all of it was sent.
        let tells = inside == Inside::Http2 || to.picker.has_mesh_peers();
        let resend = !upgrade && plan.may_resend(tells);
        let keep = (resend || keep_for_copy).then_some(worker.shared.config.bounds.replay_bytes);
        let (body, source) = RequestBody::new(body, &exchange.progress, keep);
        let spare = (resend && source.can_repeat()).then(|| parts.clone());
        Self {
            worker,
            to,
            picker: to.picker.clone(),
            plan,
            inside,
            request: Some(Request::from_parts(parts, body)),
            spare,
            source,
            tried: Vec::new(),
            asked: None,
            retries: 0,
            stale: 0,
            upgrade: upgrade && !connect,
        }
    }

    async fn run(&mut self, exchange: &mut Exchange) -> Result<Tried, ProxyError> {
        loop {
            let endpoint = self.picker.pick(self.worker, &self.tried);
            let endpoint =
                endpoint.ok_or_else(|| ProxyError::NoEndpoint(self.to.circuit.name.clone()))?;
            exchange.attempts += 1;
            exchange.upstream = Some(endpoint.address);
            let Some(request) = self.next_request() else {
                return Err(ProxyError::Closed("its body cannot be sent again".into()));
            };
            let in_flight = InFlight::on(&endpoint);
            self.asked = Some((endpoint.clone(), Cell::new(self.worker.now())));
            let tried = self.one(&endpoint, request).await;
            if self.learn(&tried) {
                exchange.flags = exchange.flags.with(Flags::EJECTED);
            }
            let error = match tried {
                Ok((response, lease)) => {
                    if !self.wants_another(&response, &endpoint, exchange.grpc) {
                        return Ok((response, lease, endpoint, in_flight));
                    }
                    None
                }
                Err(Failed {
                    error,
                    request,
                    reused,
                }) => {
                    self.request = request;
                    if self.is_stale(&error, reused) {
                        continue;
                    }
                    if !self.may_retry(&error, reused) {
                        exchange.flags = exchange.flags.with(self.exhausted(&error));
                        return Err(error);
                    }
                    Some(error)
                }
            };
            drop(in_flight);
            self.tried.push(endpoint);
            self.retries += 1;
            self.pause(error.as_ref()).await;
            self.picker = self.picker.renewed(self.worker).await?;
        }
    }

    /// Another endpoint need not be waited for when one could not be reached.
    async fn pause(&self, error: Option<&ProxyError>) {
        let elsewhere = self.picker.endpoints() > self.tried.len();
        if !(elsewhere && matches!(error, Some(ProxyError::Connect { .. }))) {
            sleep(self.plan.pause(self.retries, fastrand::f64())).await;
        }
    }

    async fn one(
        &self,
        endpoint: &Rc<Endpoint>,
        request: Request<RequestBody>,
    ) -> Result<(Response<Incoming>, Lease), Failed> {
        let sent = async {
            let lease = Pool::lease(endpoint, self.worker, &self.to.circuit, self.inside).await;
            let mut lease = match lease {
                Ok(lease) => lease,
                Err(error) => {
                    return Err(Failed {
                        error,
                        request: Some(request),
                        reused: false,
                    });
                }
            };
            // Connecting once is no measure of how fast it answers.
            if let Some((_, begun)) = &self.asked {
                begun.set(self.worker.now());
            }
            let response = lease.send(request).await?;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS && !self.upgrade {
                return Err(Failed {
                    error: ProxyError::BadAnswer("it left HTTP without being asked".into()),
                    request: None,
                    reused: false,
                });
            }
            Ok((response, lease))
        };
        let Some(after) = self.to.try_timeout() else {
            return sent.await;
        };
        match timeout(after, sent).await {
            Ok(sent) => sent,
            Err(_) => {
                let error = ProxyError::Timeout {
                    what: "per-try",
                    after,
                };
                Err(Failed {
                    error,
                    request: None,
                    reused: false,
                })
            }
        }
    }

    fn next_request(&mut self) -> Option<Request<RequestBody>> {
        if let Some(request) = self.request.take() {
            return Some(request);
        }
        let parts = self.spare.clone()?;
        Some(Request::from_parts(parts, self.source.again()?))
    }

    /// A pooled connection that was closed before anything was written on it says nothing about
    /// its endpoint: the next is taken at once, off the budget.
    fn is_stale(&mut self, error: &ProxyError, reused: bool) -> bool {
        let stale = reused && self.request.is_some() && matches!(error, ProxyError::Unsent(_));
        self.stale += u32::from(stale);
        stale && self.stale < STALE
    }

    fn may_retry(&self, error: &ProxyError, reused: bool) -> bool {
        self.retries < self.plan.attempts
            && self.plan.after_error(error, reused)
            && (self.request.is_some() || self.spare.is_some() && self.source.can_repeat())
            && self.take_from_budget()
    }

    fn wants_another<B>(&self, response: &Response<B>, endpoint: &Endpoint, grpc: bool) -> bool {
        let mesh = endpoint.peer.is_some();
        self.retries < self.plan.attempts
            && self
                .plan
                .after_response(response.status(), response.headers(), grpc, mesh)
            && self.spare.is_some()
            && self.source.can_repeat()
            && self.take_from_budget()
    }

    fn take_from_budget(&self) -> bool {
        let now = self.worker.shared.clock.now_ms();
        self.to
            .shared
            .budget
            .try_retry(now, &self.to.policy.retry.budget)
    }

    fn exhausted(&self, error: &ProxyError) -> Flags {
        let was_retried = self.retries > 0 && error.retry() != Retry::Never;
        if was_retried {
            Flags::RETRY_LIMIT
        } else {
            Flags::NONE
        }
    }

    /// What a try says about the endpoint that it asked; true where it took it out.
    fn learn(&mut self, tried: &Result<(Response<Incoming>, Lease), Failed>) -> bool {
        let Some((endpoint, latency)) = self.told() else {
            return false;
        };
        let now = self.worker.now();
        match tried {
            Ok((response, _)) if !response.status().is_server_error() => {
                endpoint.health.success();
                endpoint.load.observe(now, latency);
                return false;
            }
            // Its proxy answered for an application that is not up: as if it were not reached.
            Ok((response, _))
                if endpoint.peer.is_some() && answered_unprocessed(response.headers()) =>
            {
                endpoint.load.observe_failure(now, self.cost(latency));
            }
            Ok(_) => endpoint.load.observe_failure(now, latency),
            Err(Failed { error, reused, .. }) => {
                let counts = match error {
                    ProxyError::Connect { .. } => true,
                    // The close of an idle connection, and what was refused in good order.
                    ProxyError::Closed(_) if *reused => false,
                    error => error.retry() != Retry::Safe && error.fault() == Fault::Upstream,
                };
                if !counts {
                    return false;
                }
                endpoint.load.observe_failure(now, self.cost(latency));
            }
        }
        self.eject(&endpoint, now)
    }

    /// The time for the whole request went while an endpoint did not answer.
    fn ran_out(&mut self, exchange: &mut Exchange) {
        let Some((endpoint, latency)) = self.told() else {
            return;
        };
        let now = self.worker.now();
        endpoint.load.observe_failure(now, self.cost(latency));
        if self.eject(&endpoint, now) {
            exchange.flags = exchange.flags.with(Flags::EJECTED);
        }
    }

    /// Whom the present try asked and how long ago, once.
    fn told(&mut self) -> Option<(Rc<Endpoint>, Duration)> {
        let (endpoint, begun) = self.asked.take()?;
        let latency = self.worker.now().saturating_duration_since(begun.get());
        Some((endpoint, latency))
    }

    /// What it may cost to wait for one that does not answer.
    fn cost(&self, latency: Duration) -> Duration {
        latency.max(self.to.policy.timeouts.connect)
    }

    /// Counts a failure of one endpoint among others. One that the caller chose has no others.
    fn eject(&self, endpoint: &Endpoint, now: std::time::Instant) -> bool {
        let (Some(outlier), Picker::Among(port)) = (&self.to.policy.outlier, &self.picker) else {
            return false;
        };
        let Shared {
            clock, observer, ..
        } = &*self.worker.shared;
        let outliers = &self.to.shared.outliers;
        let out = outliers.failure(&endpoint.health, clock.ms(now), port.endpoints(), outlier);
        if let (Some(out), Some(service)) = (out, &endpoint.service) {
            observer.ejected(service);
            observer.out(service, out);
        }
        out.is_some()
    }
}

impl Drop for Tries<'_> {
    /// A caller that leaves has waited for nothing: of that, too, the endpoint's estimate learns, or one
    /// that never answers would look better with every caller that gives up. Whose fault it was is not
    /// known, so it ejects nobody.
    fn drop(&mut self) {
        if let Some((endpoint, latency)) = self.told() {
            endpoint.load.observe_failure(self.worker.now(), latency);
        }
    }
}
