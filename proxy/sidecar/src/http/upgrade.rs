//! Connections that leave HTTP: WebSocket and other upgrades, CONNECT.

use std::{future::poll_fn, rc::Rc, time::Duration};

use http::{HeaderValue, Method, Response, StatusCode, header, request::Parts};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;

use super::{
    body::ResponseBody,
    exchange::{End, Exchange},
    forward::Answered,
    headers::strip_hop,
    progress::Interrupted,
};
use crate::{drain::Stage, tcp, worker::Worker};

/// How often it is looked whether a connection that left HTTP is still allowed.
const LOOK: Duration = Duration::from_millis(500);

/// The client's side of a request that asks to leave HTTP; taken before the request is sent on.
pub(crate) struct Asked {
    client: OnUpgrade,
    connect: bool,
}

impl Asked {
    pub(crate) fn take(parts: &mut Parts) -> Option<Self> {
        let client = parts.extensions.remove::<OnUpgrade>()?;
        Some(Self {
            client,
            connect: parts.method == Method::CONNECT,
        })
    }

    /// Passes the answer on. Where it grants what was asked, bytes flow from then on and not
    /// before; where not, the connection serves no further request.
    pub(crate) fn answer(
        self,
        worker: &Rc<Worker>,
        answered: Answered,
        exchange: Box<Exchange>,
        http2: bool,
    ) -> Response<ResponseBody> {
        let status = answered.response.status();
        let granted = status == StatusCode::SWITCHING_PROTOCOLS && !self.connect
            || status.is_success() && self.connect;
        if !granted {
            let mut response = answered.into_response(exchange);
            strip_hop(response.headers_mut());
            if !http2 {
                serve_no_more(&mut response);
            }
            return response;
        }
        let (mut response, mut finish) = answered.into_parts(exchange);
        let server = hyper::upgrade::on(&mut response);
        let worker = worker.clone();
        // Ends with either side, or when the worker is cut.
        tokio::task::spawn_local(async move {
            let cut = worker.shared.drain.clone();
            let counts = tcp::Counts::default();
            let relayed = async {
                if let Ok((client, server)) = tokio::try_join!(self.client, server) {
                    relay(client, server, &counts).await;
                }
            };
            let mut look = tokio::time::interval(LOOK);
            let mut relayed = std::pin::pin!(relayed);
            let progress = finish.exchange.progress.clone();
            let end = loop {
                tokio::select! {
                    () = &mut relayed => break End::Complete,
                    why = poll_fn(|cx| progress.poll_interrupted(cx)) => match why {
                        Interrupted::Idle => break End::Idle,
                        Interrupted::Withdrawn => break End::Withdrawn,
                    },
                    () = cut.reached(Stage::Cut) => break End::Complete,
                    _ = look.tick() => {
                        progress.received.set(counts.received.get());
                        progress.sent.set(counts.sent.get());
                        progress.look(worker.shared.clock.now_ms());
                    }
                }
            };
            progress.received.set(counts.received.get());
            progress.sent.set(counts.sent.get());
            // The connection is no HTTP connection any more, and serves nobody else.
            finish.lease = None;
            finish.end(end);
        });
        let (parts, _) = response.into_parts();
        Response::from_parts(parts, ResponseBody::empty())
    }
}

/// Has the connection end with this answer to a request that asked to leave HTTP and did not: what
/// the client sends next may be meant for the other protocol.
pub(crate) fn serve_no_more(response: &mut Response<ResponseBody>) {
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
}

async fn relay(client: Upgraded, server: Upgraded, counts: &tcp::Counts) {
    let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
    let _ = tcp::relay(&mut client, &mut server, counts, None).await;
}
