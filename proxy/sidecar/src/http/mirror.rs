//! Copies of requests, for a Service that is to see them and whose answers nobody waits for.
//!
//! A copy is sent when the request itself has its answer: it is made of what was read of the body
//! by then, so that the request never waits for it.

use std::{cell::Cell, rc::Rc, time::Duration};

use http::{Request, request::Parts};
use http_body_util::BodyExt;
use tokio::time::timeout;
use turnpike_rules::{ServiceKey, route::Filter};

use super::{
    body::{RequestBody, Source},
    forward::InFlight,
};
use crate::{
    observe::Mirrored,
    pool::Pool,
    service::{Port, Service},
    tls::Inside,
    worker::Worker,
};

/// Copies under way at once, of one worker. Past it, further ones are dropped and counted.
const MOST: usize = 128;
/// Copies that one request makes.
const PER_REQUEST: usize = 4;
/// For the whole of a copy, where the Service sets no timeout of its own.
const DEADLINE: Duration = Duration::from_secs(15);

/// Counts the copies of a worker.
#[derive(Debug, Default)]
pub(crate) struct Copies(Rc<Cell<usize>>);

struct Place(Rc<Cell<usize>>);

impl Copies {
    fn enter(&self) -> Option<Place> {
        let count = self.0.get();
        (count < MOST).then(|| {
            self.0.set(count + 1);
            Place(self.0.clone())
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

/// Who is to get a copy of one request.
pub(crate) struct Copy {
    to: Vec<(ServiceKey, u16)>,
    head: Parts,
}

impl Copy {
    /// By the filters of a route and its backend, as chance has it. The head is the one that goes
    /// to the backend.
    pub(crate) fn of<'a>(filters: impl Iterator<Item = &'a Filter>, parts: &Parts) -> Option<Self> {
        let to: Vec<_> = filters
            .filter_map(|filter| match filter {
                Filter::Mirror {
                    service,
                    port,
                    per_million,
                } if fastrand::u32(..1_000_000) < *per_million => Some((service.clone(), *port)),
                _ => None,
            })
            .take(PER_REQUEST)
            .collect();
        // CONNECT and upgrades are conversations: half of one is of no use to anybody.
        let talks = parts.headers.contains_key(http::header::UPGRADE)
            || parts.method == http::Method::CONNECT;
        (!to.is_empty() && !talks).then(|| {
            let (mut head, ()) = Request::new(()).into_parts();
            head.method = parts.method.clone();
            head.uri = parts.uri.clone();
            head.version = parts.version;
            head.headers = parts.headers.clone();
            Self { to, head }
        })
    }

    /// Sends it, with the body as far as `source` still has the whole of it.
    pub(crate) fn send(self, worker: &Rc<Worker>, source: &Source) {
        let Self { to, head } = self;
        for (service, port) in to {
            let place = worker.copies.enter();
            let (Some(place), Some(body)) = (place, source.copy()) else {
                worker.shared.observer.mirrored(&service, Mirrored::Dropped);
                continue;
            };
            let (worker, head) = (worker.clone(), head.clone());
            // Ends by its deadline, or with the worker.
            tokio::task::spawn_local(async move {
                let request = Request::from_parts(head, body);
                let copy = deliver(&worker, &service, port, request).await;
                worker
                    .shared
                    .observer
                    .mirrored(&service, copy.unwrap_or(Mirrored::Failed));
                drop(place);
            });
        }
    }
}

/// `None` where it failed.
async fn deliver(
    worker: &Rc<Worker>,
    key: &ServiceKey,
    port: u16,
    request: Request<RequestBody>,
) -> Option<Mirrored> {
    let (service, port) = worker.port(key, port).await.ok()?;
    let deadline = service
        .view()
        .service
        .traffic
        .timeouts
        .request
        .unwrap_or(DEADLINE);
    timeout(deadline, exchange(worker, &service, &port, request))
        .await
        .ok()?
}

async fn exchange(
    worker: &Rc<Worker>,
    service: &Rc<Service>,
    port: &Port,
    request: Request<RequestBody>,
) -> Option<Mirrored> {
    // The copies must not push out the requests that the Service's own callers send.
    let limit = port.view.service.traffic.circuit.max_requests;
    let Some(_permit) = service.shared.requests.try_acquire(limit) else {
        return Some(Mirrored::Dropped);
    };
    let endpoint = port.pick(worker, &[])?;
    let _in_flight = InFlight::on(&endpoint);
    let inside = match request.version() {
        http::Version::HTTP_2 => Inside::Http2,
        _ => Inside::Http1,
    };
    service.make_room();
    let mut lease = Pool::lease(&endpoint, worker, &service.circuit, inside)
        .await
        .ok()?;
    let mut body = lease.send(request).await.ok()?.into_body();
    while let Some(frame) = body.frame().await {
        frame.ok()?;
    }
    lease.release();
    Some(Mirrored::Answered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_a_thousandth_is_copied() {
        fastrand::seed(1);
        let (parts, ()) = Request::new(()).into_parts();
        let copies = |per_million| {
            let mirror = Filter::Mirror {
                service: ServiceKey::new("cluster", "shop", "shadow"),
                port: 80,
                per_million,
            };
            let copied = |_: &u32| Copy::of([&mirror].into_iter(), &parts).is_some();
            (0..100_000u32).filter(copied).count()
        };
        assert_eq!((copies(0), copies(1_000_000)), (0, 100_000));
        let thousandth = copies(1_000);
        assert!((60..140).contains(&thousandth), "{thousandth}");
    }
}
