//! Connections that leave HTTP: WebSocket and other upgrades, CONNECT.

use std::{rc::Rc, time::Duration};

use http::{HeaderValue, Method, Response, StatusCode, header, request::Parts};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;

use super::{
    body::ResponseBody,
    exchange::{End, Exchange},
    forward::Answered,
    headers::strip_hop,
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
    /// before; where not, the connection serves no further request, since what the client sends
    /// next may be meant for the other protocol.
    pub(crate) fn answer(
        self,
        worker: &Rc<Worker>,
        answered: Answered,
        exchange: Exchange,
        http2: bool,
    ) -> Response<ResponseBody> {
        let status = answered.response.status();
        let granted = status == StatusCode::SWITCHING_PROTOCOLS && !self.connect
            || status.is_success() && self.connect;
        if !granted {
            let mut response = answered.into_response(exchange);
            strip_hop(response.headers_mut());
            if !http2 {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            return response;
        }
        let (mut response, mut finish) = answered.into_parts(exchange);
        let server = hyper::upgrade::on(&mut response);
        let worker = worker.clone();
        let received = finish.exchange.received.clone();
        // Ends with either side, or when the worker is cut.
        tokio::task::spawn_local(async move {
            let cut = worker.shared.drain.clone();
            let relayed = async {
                let (client, server) = tokio::try_join!(self.client, server).ok()?;
                Some(relay(client, server).await)
            };
            let mut look = tokio::time::interval(LOOK);
            let mut relayed = std::pin::pin!(relayed);
            let end = loop {
                tokio::select! {
                    totals = &mut relayed => {
                        let (up, down) = totals.unwrap_or_default();
                        received.set(received.get() + up);
                        finish.exchange.count_sent(down);
                        break End::Complete;
                    }
                    () = cut.reached(Stage::Cut) => break End::Complete,
                    _ = look.tick() => {
                        if !finish.exchange.still_allowed() {
                            break End::Withdrawn;
                        }
                    }
                }
            };
            // The connection is no HTTP connection any more, and serves nobody else.
            finish.lease = None;
            finish.end(end);
        });
        let (parts, _) = response.into_parts();
        Response::from_parts(parts, ResponseBody::empty())
    }
}

async fn relay(client: Upgraded, server: Upgraded) -> (u64, u64) {
    let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
    let counts = tcp::Counts::default();
    let _ = tcp::relay(&mut client, &mut server, &counts).await;
    (counts.received.get(), counts.sent.get())
}
