//! One address that requests can go to, as one worker sees it.

use std::{
    cell::{Cell, OnceCell},
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use turnpike_rules::{Identity, ServiceKey, workload::Names};

use crate::{
    balance::Load,
    error::ProxyError,
    io::connect,
    observe::{Direction, HttpSeries, Labels, Observer, TcpSeries},
    outlier::Health,
    pool::Pool,
    tls::{Inside, Peer, Upstream},
    worker::Worker,
};

pub(crate) struct Endpoint {
    pub(crate) uid: Arc<str>,
    pub(crate) address: SocketAddr,
    /// `None`: it has no sidecar, and is spoken to in plaintext.
    pub(crate) peer: Option<Peer>,
    pub(crate) service: Option<ServiceKey>,
    pub(crate) names: Option<Arc<Names>>,
    pub(crate) health: Arc<Health>,
    pub(crate) load: Load,
    /// The readmission that `load` knows of.
    readmitted: Cell<u64>,
    pub(crate) pool: Pool,
    http_series: [OnceCell<Arc<dyn HttpSeries>>; 2],
    tcp_series: OnceCell<Arc<dyn TcpSeries>>,
}

impl Endpoint {
    pub(crate) fn new(
        uid: Arc<str>,
        address: SocketAddr,
        peer: Option<Peer>,
        service: Option<ServiceKey>,
        names: Option<Arc<Names>>,
        health: Arc<Health>,
        now: Instant,
    ) -> Rc<Self> {
        Rc::new(Self {
            uid,
            address,
            peer,
            service,
            names,
            readmitted: Cell::new(health.readmission(u64::MAX)),
            health,
            load: Load::new(now),
            pool: Pool::default(),
            http_series: [OnceCell::new(), OnceCell::new()],
            tcp_series: OnceCell::new(),
        })
    }

    /// True once for each time that the endpoint came back after an ejection: what this worker
    /// knows of it is out of date.
    pub(crate) fn came_back(&self, now_ms: u64) -> bool {
        let readmission = self.health.readmission(now_ms);
        readmission != 0 && self.readmitted.replace(readmission) != readmission
    }

    pub(crate) fn identity(&self) -> Option<&Identity> {
        self.peer.as_ref().map(|peer| &peer.identity)
    }

    /// Connects, and handshakes with an endpoint of the mesh. There is no way from here to
    /// plaintext for one that has an identity.
    pub(crate) async fn dial(
        &self,
        worker: &Worker,
        deadline: Duration,
        inside: Inside,
    ) -> Result<Upstream, ProxyError> {
        let dial = async {
            let stream = connect(self.address, deadline).await?;
            match &self.peer {
                None => Ok(Upstream::Plain(stream)),
                Some(peer) => {
                    let stream = worker.shared.tls.connect(stream, peer, inside).await?;
                    Ok(Upstream::Mesh(Box::new(stream)))
                }
            }
        };
        match tokio::time::timeout(deadline, dial).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(self.connect_error(&error)),
            Err(_) => {
                let error = io::Error::new(io::ErrorKind::TimedOut, "the connect timeout passed");
                Err(self.connect_error(&error))
            }
        }
    }

    pub(crate) fn connect_error(&self, error: &io::Error) -> ProxyError {
        ProxyError::Connect {
            address: self.address,
            reason: error.to_string().into(),
        }
    }

    /// The series of outbound requests to it.
    pub(crate) fn http_series(&self, observer: &dyn Observer, grpc: bool) -> Arc<dyn HttpSeries> {
        let cell = &self.http_series[usize::from(grpc)];
        cell.get_or_init(|| observer.http(&self.labels(grpc)))
            .clone()
    }

    pub(crate) fn tcp_series(&self, observer: &dyn Observer) -> Arc<dyn TcpSeries> {
        self.tcp_series
            .get_or_init(|| observer.tcp(&self.labels(false)))
            .clone()
    }

    fn labels(&self, grpc: bool) -> Labels {
        Labels {
            direction: Direction::Outbound,
            peer: self.identity().cloned(),
            names: self.names.clone(),
            service: self.service.clone(),
            passthrough: false,
            grpc,
            mutual_tls: self.peer.is_some(),
        }
    }
}
