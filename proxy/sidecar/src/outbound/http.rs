//! The application's requests: routed, sent to an endpoint, answered.

use std::{cell::RefCell, net::SocketAddr, rc::Rc, sync::Arc};

use http::{Request, Response, Version, request::Parts};
use hyper::body::Incoming;
use turnpike_rules::route::{RequestView, Route};

use super::Direct;
use crate::{
    error::{ERROR_HEADER, ProxyError, RequestKind, outbound_response},
    http::{
        Handler,
        body::ResponseBody,
        destination::{Destination, Picker, Policy},
        exchange::{Connection, Exchange, Finish},
        filters,
        forward::{Answered, forward},
        headers::{self, Checked},
        mirror::Copy,
        upgrade::{self, Asked},
    },
    mesh::Missing,
    service::{Port, Service},
    worker::Worker,
};

/// What the connection was opened to.
pub(super) enum Target {
    Service {
        service: RefCell<Rc<Service>>,
        port: u16,
    },
    Pod(RefCell<Rc<Direct>>),
}

/// Answers the requests of one connection of the application.
pub(super) struct Outbound {
    worker: Rc<Worker>,
    connection: Rc<Connection>,
    target: Target,
    original: SocketAddr,
}

impl Handler for Outbound {
    async fn call(self: Rc<Self>, request: Request<Incoming>) -> Response<ResponseBody> {
        let (mut parts, body) = request.into_parts();
        let http2 = parts.version == Version::HTTP_2;
        let checked = headers::check(&mut parts);
        let (checked, refused) = match checked {
            Ok(checked) => (checked, None),
            Err(error) => (Checked::default(), Some(error)),
        };
        let now = self.worker.now();
        let mut exchange = Exchange::begin(&self.connection, now, &mut parts, &checked);
        let kind = RequestKind {
            grpc: checked.grpc,
            http2,
            upgrade: checked.upgrade,
        };
        let answered = match refused {
            Some(error) => Err(error),
            None => self.answer(parts, body, &checked, &mut exchange).await,
        };
        let mut response = match answered {
            Ok(Answer::Forwarded(finishing)) => {
                return finishing.finish(&self.worker, exchange, http2);
            }
            Ok(Answer::Own(mut response)) => {
                if kind.upgrade && !http2 {
                    upgrade::serve_no_more(&mut response);
                }
                response
            }
            Err(error) => {
                exchange.failed(&error);
                outbound_response(&error, kind)
            }
        };
        exchange.responded(response.status(), response.headers());
        let finish = Box::new(Finish::new(exchange));
        response = response.map(|body| body.ending_in(finish));
        response
    }
}

/// What becomes of a request.
enum Answer {
    Own(Response<ResponseBody>),
    Forwarded(Forwarded),
}

struct Forwarded {
    answered: Answered,
    route: Option<Arc<Route>>,
    backend: usize,
    asked: Option<Asked>,
}

impl Forwarded {
    fn finish(
        mut self,
        worker: &Rc<Worker>,
        mut exchange: Box<Exchange>,
        http2: bool,
    ) -> Response<ResponseBody> {
        let endpoint = &self.answered.endpoint;
        let grpc = exchange.grpc;
        exchange.series = Some(endpoint.http_series(&*worker.shared.observer, grpc));
        exchange.callee = endpoint.identity().cloned();
        exchange.service = endpoint.service.clone();
        let of_mesh = endpoint.peer.is_some();
        let response = &mut self.answered.response;
        if !of_mesh {
            // It says that a proxy answers, and there is none.
            response.headers_mut().remove(&ERROR_HEADER);
        }
        exchange.responded(response.status(), response.headers());
        if let Some(route) = &self.route {
            filters::on_response(&route.filters, response.headers_mut());
            if let Some(backend) = route.backends.get(self.backend) {
                filters::on_response(&backend.filters, response.headers_mut());
            }
        }
        exchange.route = self.route;
        if let Some(asked) = self.asked {
            return asked.answer(worker, self.answered, exchange, http2);
        }
        let mut response = self.answered.into_response(exchange);
        headers::strip_hop(response.headers_mut());
        response
    }
}

impl Outbound {
    pub(super) fn new(
        worker: Rc<Worker>,
        connection: Rc<Connection>,
        target: Target,
        original: SocketAddr,
    ) -> Self {
        Self {
            worker,
            connection,
            target,
            original,
        }
    }

    async fn answer(
        &self,
        mut parts: Parts,
        body: Incoming,
        checked: &Checked,
        exchange: &mut Exchange,
    ) -> Result<Answer, ProxyError> {
        let mut to = match &self.target {
            Target::Pod(direct) => {
                self.current_pod(direct)
                    .await?
                    .destination(&self.worker)
                    .await
            }
            Target::Service { service, port } => {
                let (service, port) = self.current(service, *port).await?;
                destination(&service, port)
            }
        };
        let mut backend = 0;
        if let Some(routed) = self.route(&to, &mut parts, checked)? {
            match routed {
                Routed::Redirected(response) => return Ok(Answer::Own(response)),
                Routed::To(route) => {
                    exchange.route = Some(route.clone());
                    (to, backend) = self.backend(route, &mut parts).await?;
                }
            }
        }
        // Known before a response is: failures count for the Service too.
        exchange.service = match &to.picker {
            Picker::Among(port) => Some(port.view.service.key.clone()),
            Picker::Pod(endpoint) | Picker::Application(endpoint) => endpoint.service.clone(),
        };
        let copy = to.route.as_ref().and_then(|route| {
            let of_backend = route.backends.get(backend).into_iter();
            let of_backend = of_backend.flat_map(|backend| &backend.filters);
            Copy::of(route.filters.iter().chain(of_backend), &parts)
        });
        let asked = if checked.upgrade {
            Asked::take(&mut parts)
        } else {
            None
        };
        let forwarded = forward(
            &self.worker,
            &to,
            copy,
            parts,
            body,
            exchange,
            checked.upgrade || asked.is_some(),
        );
        match forwarded.await {
            Ok(answered) => {
                let route = to.route;
                Ok(Answer::Forwarded(Forwarded {
                    answered,
                    route,
                    backend,
                    asked,
                }))
            }
            Err(error) => {
                let observer = &*self.worker.shared.observer;
                let endpoint = to.picker.pick(&self.worker, &[]);
                exchange.series = endpoint.map(|e| e.http_series(observer, exchange.grpc));
                Err(error)
            }
        }
    }

    /// The Service as it is now, asked for again if it went away.
    async fn current(
        &self,
        held: &RefCell<Rc<Service>>,
        port: u16,
    ) -> Result<(Rc<Service>, Rc<Port>), ProxyError> {
        let service = held.borrow().clone();
        if let Ok(Some(found)) = service.port(&self.worker, port) {
            return Ok((service, found));
        }
        let (service, found) = self.worker.port(&service.key, port).await?;
        held.replace(service.clone());
        Ok((service, found))
    }

    /// What stands now at the address that the connection was opened to.
    async fn current_pod(&self, held: &RefCell<Rc<Direct>>) -> Result<Rc<Direct>, ProxyError> {
        let direct = held.borrow().clone();
        let endpoint = self.worker.pod_at(&direct.endpoint).await?;
        if Rc::ptr_eq(&endpoint, &direct.endpoint) {
            return Ok(direct);
        }
        let direct = Rc::new(Direct::new(&self.worker, endpoint));
        held.replace(direct.clone());
        Ok(direct)
    }

    /// The route for a request; `None` where the Service has none and takes all itself.
    fn route(
        &self,
        to: &Destination,
        parts: &mut Parts,
        checked: &Checked,
    ) -> Result<Option<Routed>, ProxyError> {
        let Picker::Among(port) = &to.picker else {
            return Ok(None);
        };
        let table = &port.declared().routes;
        if table.routes.is_empty() {
            return Ok(None);
        }
        let path = headers::normal_path(&parts.uri)?;
        let view = RequestView {
            method: parts.method.as_str(),
            path: &path,
            headers: &parts.headers,
            query: parts.uri.query(),
        };
        let Some(route) = table.find(&view).cloned() else {
            let service = port.view.service.key.clone();
            return Err(ProxyError::NoRoute {
                service,
                port: port.port,
            });
        };
        let host = checked.host.as_ref().map(ToString::to_string);
        let host = host.unwrap_or_else(|| self.original.ip().to_string());
        if let Some(response) = filters::redirected(&route, &parts.uri, &path, &host, port.port) {
            return Ok(Some(Routed::Redirected(response)));
        }
        if path != parts.uri.path() {
            let path = path.into_owned();
            headers::set_path(&mut parts.uri, &path)?;
        }
        filters::on_request(&route.filters, &route, parts)?;
        Ok(Some(Routed::To(route)))
    }

    /// One of a route's backends by weight, with its own filters applied.
    async fn backend(
        &self,
        route: Arc<Route>,
        parts: &mut Parts,
    ) -> Result<(Destination, usize), ProxyError> {
        let Some(backend) = route.pick(fastrand::u32(..)) else {
            return Err(ProxyError::NoBackend {
                route: route.name.clone(),
                why: "has no backend with a weight; add a backendRef".to_owned(),
            });
        };
        let index = route
            .backends
            .iter()
            .position(|each| std::ptr::eq(each, backend));
        filters::on_request(&backend.filters, &route, parts)?;
        let Some((service, port)) = &backend.to else {
            return Err(ProxyError::NoBackend {
                route: route.name.clone(),
                why: "sends this share to what is no Service; name one in the backendRef"
                    .to_owned(),
            });
        };
        let found = self.worker.port(service, *port).await;
        let (service, port) = found.map_err(|error| match error {
            // Its share fails for good, as its status says.
            ProxyError::NoService(_, Missing::Absent) | ProxyError::NoPort { .. } => {
                ProxyError::NoBackend {
                    route: route.name.clone(),
                    why: format!("sends this share nowhere: {error}"),
                }
            }
            error => error,
        })?;
        let mut to = destination(&service, port);
        to.route = Some(route.clone());
        Ok((to, index.unwrap_or(0)))
    }
}

enum Routed {
    To(Arc<Route>),
    Redirected(Response<ResponseBody>),
}

fn destination(service: &Rc<Service>, port: Rc<Port>) -> Destination {
    service.make_room();
    Destination {
        circuit: service.circuit.clone(),
        shared: service.shared.clone(),
        policy: Policy::OfService(port.view.clone()),
        picker: Picker::Among(port),
        route: None,
    }
}
