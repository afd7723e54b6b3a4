//! Requests from elsewhere: each is authorised, then sent to the application as it was judged.

use std::{borrow::Cow, cell::OnceCell, rc::Rc, sync::Arc};

use http::{HeaderValue, Method, Request, Response, Uri, Version, request::Parts};
use hyper::body::Incoming;
use turnpike_rules::{
    authz::{Call, HttpCall},
    host::HostOrIp,
    workload::SelfConfig,
};

use super::Caller;
use crate::{
    endpoint::Endpoint,
    error::{ERROR_HEADER, ProxyError, RequestKind, inbound_response},
    http::{
        self as proxy, Handler,
        body::ResponseBody,
        destination::{Destination, Picker, Policy},
        exchange::{Connection, Exchange, Finish},
        forward::forward,
        headers::{self, Checked},
        progress::{Judge, Live},
        upgrade::Asked,
    },
    io::Stream,
    observe::HttpSeries,
};

/// Answers the requests of one caller's connection.
struct Requests {
    caller: Caller,
    connection: Rc<Connection>,
    app: Rc<Endpoint>,
    /// `x-forwarded-client-cert`, which says who calls.
    client_cert: Option<HeaderValue>,
    series: [OnceCell<Arc<dyn HttpSeries>>; 2],
}

impl Caller {
    pub(super) async fn serve_http(self, stream: impl Stream, http2: bool) {
        let worker = self.worker.clone();
        let connection = self.connection();
        let client_cert = self.identity.as_ref().and_then(|identity| {
            let own = &worker.inbound.config().identity;
            HeaderValue::try_from(format!("By={own};URI={identity}")).ok()
        });
        let requests = Requests {
            app: worker.inbound.app(&worker, self.original),
            caller: self,
            connection: connection.clone(),
            client_cert,
            series: [OnceCell::new(), OnceCell::new()],
        };
        proxy::serve(&worker, stream, http2, Rc::new(requests), connection).await;
    }
}

impl Handler for Requests {
    async fn call(self: Rc<Self>, request: Request<Incoming>) -> Response<ResponseBody> {
        let (mut parts, body) = request.into_parts();
        let http2 = parts.version == Version::HTTP_2;
        let (checked, refused) = match headers::check(&mut parts) {
            Ok(checked) => (checked, None),
            Err(error) => (Checked::default(), Some(error)),
        };
        let worker = &self.caller.worker;
        let mut exchange = Exchange::begin(&self.connection, worker.now(), &mut parts, &checked);
        exchange.series = Some(self.series(checked.grpc));
        exchange.service = self.caller.service.clone();
        let kind = RequestKind {
            grpc: checked.grpc,
            http2,
            upgrade: checked.upgrade,
        };
        let asked = if checked.upgrade {
            Asked::take(&mut parts)
        } else {
            None
        };
        let upgrade = checked.upgrade;
        let answered = match refused {
            Some(error) => Err(error),
            None => match self.admit(&mut parts, checked) {
                Ok(live) => {
                    exchange.progress.judged_by(live);
                    let to = self.destination();
                    let forwarded = forward(worker, &to, None, parts, body, &mut exchange, upgrade);
                    forwarded.await
                }
                Err(error) => Err(error),
            },
        };
        let mut answered = match answered {
            Ok(answered) => answered,
            Err(error) => {
                exchange.failed(&error);
                let response = inbound_response(&error, kind);
                exchange.responded(response.status(), response.headers());
                let finish = Box::new(Finish::new(exchange));
                return response.map(|body| body.ending_in(finish));
            }
        };
        let response = &mut answered.response;
        // Only a proxy may say that a request was not processed.
        response.headers_mut().remove(&ERROR_HEADER);
        exchange.responded(response.status(), response.headers());
        if let Some(asked) = asked {
            return asked.answer(worker, answered, exchange, http2);
        }
        let mut response = answered.into_response(exchange);
        headers::strip_hop(response.headers_mut());
        response
    }
}

impl Requests {
    fn series(&self, grpc: bool) -> Arc<dyn HttpSeries> {
        let observer = &self.caller.worker.shared.observer;
        let cell = &self.series[usize::from(grpc)];
        let origin = &self.caller.origin;
        cell.get_or_init(|| origin.http(observer, self.caller.labels(grpc)))
            .clone()
    }

    fn destination(&self) -> Destination {
        let inbound = &self.caller.worker.inbound;
        Destination {
            picker: Picker::Application(self.app.clone()),
            circuit: inbound.circuit.clone(),
            shared: inbound.shared.clone(),
            policy: Policy::Own(inbound.policy.clone()),
            route: None,
        }
    }

    /// Judges a request and puts it into the form that was judged.
    fn admit(self: &Rc<Self>, parts: &mut Parts, checked: Checked) -> Result<Live, ProxyError> {
        let config = self.caller.worker.inbound.config();
        let host = checked.host;
        self.judge_request(&config, &parts.method, &parts.uri, host.as_ref())?;
        if has_rules(&config) && parts.method != Method::CONNECT {
            let path = headers::normal_path(&parts.uri)?;
            if let Cow::Owned(path) = path {
                headers::set_path(&mut parts.uri, &path)?;
            }
        }
        headers::set_client_cert(&mut parts.headers, self.client_cert.as_ref());
        Ok(Live {
            judge: self.clone(),
            judged: config,
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            host,
            withdrawn: false,
        })
    }

    fn judge_request(
        &self,
        config: &SelfConfig,
        method: &Method,
        uri: &Uri,
        host: Option<&HostOrIp>,
    ) -> Result<(), ProxyError> {
        self.caller
            .judge(config)
            .map_err(|(_, why)| ProxyError::Unauthorized(why))?;
        if !has_rules(config) {
            // Nothing is judged by its path, so that no path is refused either: a pod that joins
            // the mesh keeps serving what it served.
            return Ok(());
        }
        let path = match *method {
            Method::CONNECT => Cow::Borrowed("/"),
            _ => headers::normal_path(uri)?,
        };
        let host = host.map(|host| match host {
            HostOrIp::Name(name) => Cow::Borrowed(name.as_str()),
            HostOrIp::Ip(address) => Cow::Owned(address.to_string()),
        });
        let http = HttpCall {
            method: method.as_str(),
            host: host.as_deref().unwrap_or_default(),
            path: &path,
        };
        let verdict = config.authorization.check(&Call {
            http: Some(http),
            ..self.caller.call()
        });
        if verdict.allowed {
            Ok(())
        } else {
            Err(ProxyError::Unauthorized(format!(
                "this request is {verdict}"
            )))
        }
    }
}

fn has_rules(config: &SelfConfig) -> bool {
    !config.authorization.deny.is_empty() || !config.authorization.allow.is_empty()
}

impl Judge for Requests {
    fn config(&self) -> Arc<SelfConfig> {
        self.caller.worker.inbound.config()
    }

    fn allows(
        &self,
        config: &SelfConfig,
        method: &Method,
        uri: &Uri,
        host: Option<&HostOrIp>,
    ) -> bool {
        self.judge_request(config, method, uri, host).is_ok()
    }
}
