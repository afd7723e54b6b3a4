//! Pods, their sidecars, and what the control side would tell them.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use tokio::sync::watch;
use turnpike_certs::{
    Authority, CredentialStore, Credentials, KeyRequest, LEAF_LIFETIME, TrustBundle,
};
use turnpike_rules::{
    Identity, ServiceKey,
    authz::Authorization,
    service::{Endpoint, EndpointState, PortMapping, Protocol, Service, ServicePort},
    traffic::TrafficPolicy,
    workload::{BackedService, MtlsMode, Names, SelfConfig, Telemetry, Workload, WorkloadPort},
};
use turnpike_sidecar::{
    DataPlane,
    capture::OriginalDestination,
    config::{Bounds, Config, Listen},
    mesh::{Answer, Directory, EndpointView, Lookup, Mesh, Missing, ServiceView, ServiceWatch},
    observe::{
        AccessRecord, Direction, HttpOutcome, HttpSeries, Labels, Mirrored, Observer, Refusal,
        RefusalReason, Span, TcpSeries,
    },
};

/// The address of the Service under test.
pub(crate) const VIP: &str = "10.96.0.1:80";
pub(crate) const LOOPBACK: &str = "127.0.0.1:0";

pub(crate) fn key() -> ServiceKey {
    ServiceKey::new("cluster", "shop", "web")
}

pub(crate) fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account).unwrap()
}

/// A root, and workloads certified by it.
pub(crate) struct Trust(Authority);

impl Trust {
    pub(crate) fn new() -> Self {
        Self(Authority::generate("cluster.local", 10 * LEAF_LIFETIME, SystemTime::now()).unwrap())
    }

    pub(crate) fn credentials(&self, account: &str, now: SystemTime) -> Credentials {
        let identity = identity(account);
        let request = KeyRequest::new(&identity).unwrap();
        let issued = self
            .0
            .sign(request.csr_pem(), &identity, LEAF_LIFETIME, now)
            .unwrap();
        let roots = TrustBundle::from_pem(self.0.certificate_pem().as_bytes()).unwrap();
        request.into_credentials(&issued.chain, roots).unwrap()
    }

    pub(crate) fn store(&self, account: &str) -> Arc<CredentialStore> {
        CredentialStore::new(self.credentials(account, SystemTime::now()))
    }
}

/// What the control side answers.
#[derive(Debug, Default)]
pub(crate) struct Known {
    destinations: Mutex<HashMap<IpAddr, Lookup>>,
    /// How long it takes to answer for an address.
    pub(crate) delay: Mutex<Duration>,
    services: Mutex<HashMap<ServiceKey, watch::Sender<Arc<ServiceView>>>>,
}

impl Directory for Known {
    fn destination(&self, address: IpAddr) -> Answer<Lookup> {
        let lookup = self.destinations.lock().unwrap().get(&address).cloned();
        let delay = *self.delay.lock().unwrap();
        Box::pin(async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            lookup.unwrap_or(Lookup::Unknown)
        })
    }

    fn service(&self, key: &ServiceKey) -> Answer<Result<ServiceWatch, Missing>> {
        let watch = self
            .services
            .lock()
            .unwrap()
            .get(key)
            .map(watch::Sender::subscribe);
        Box::pin(async move { watch.ok_or(Missing::Absent) })
    }
}

impl Known {
    pub(crate) fn set_service(&self, view: ServiceView) {
        let key = view.service.key.clone();
        for vip in &view.service.vips {
            let lookup = Lookup::Service(key.clone());
            self.destinations.lock().unwrap().insert(*vip, lookup);
        }
        let mut services = self.services.lock().unwrap();
        match services.get(&key) {
            Some(sender) => drop(sender.send_replace(Arc::new(view))),
            None => drop(services.insert(key, watch::channel(Arc::new(view)).0)),
        }
    }

    pub(crate) fn remove_service(&self, key: &ServiceKey) {
        self.services.lock().unwrap().remove(key);
    }

    /// The control plane is away, and was never asked.
    pub(crate) fn set_unanswered(&self, address: IpAddr) {
        let mut destinations = self.destinations.lock().unwrap();
        destinations.insert(address, Lookup::Unanswered);
    }

    pub(crate) fn set_workload(&self, workload: Workload) {
        let lookup = Lookup::Workload(Arc::new(workload.clone()));
        self.destinations
            .lock()
            .unwrap()
            .insert(workload.address, lookup);
    }
}

/// A Service `web` on port 80 of [`VIP`].
pub(crate) fn web(endpoints: &[(SocketAddr, Option<&str>)]) -> ServiceView {
    let endpoints = endpoints
        .iter()
        .map(|(address, account)| endpoint(*address, *account));
    ServiceView {
        service: Service {
            key: key(),
            consumer: None,
            vips: vec![VIP.parse::<SocketAddr>().unwrap().ip()],
            ports: vec![ServicePort {
                port: 80,
                name: "http".into(),
                protocol: Protocol::Detect,
                routes: Default::default(),
            }],
            traffic: TrafficPolicy::default(),
            shards: Vec::new(),
        },
        endpoints: endpoints.collect(),
    }
}

pub(crate) fn endpoint(address: SocketAddr, account: Option<&str>) -> EndpointView {
    EndpointView {
        endpoint: Endpoint {
            uid: format!("uid-of-{address}").into(),
            address: address.ip(),
            identity: account.map(identity),
            zone: "a".into(),
            state: EndpointState::Serving,
            names: None,
        },
        ports: [PortMapping {
            service_port: 80,
            target_port: address.port(),
        }]
        .into(),
    }
}

/// What a pod knows of itself: it backs `web` with its port `port`.
pub(crate) fn own(account: &str, port: u16) -> SelfConfig {
    SelfConfig {
        uid: format!("{account}-uid").into(),
        namespace: "shop".into(),
        name: account.into(),
        identity: identity(account),
        names: Names::unlabelled(account, "shop").into(),
        zone: "a".into(),
        ports: vec![WorkloadPort {
            port,
            protocol: Protocol::Detect,
        }],
        probe_ports: Vec::new(),
        mtls: MtlsMode::Permissive,
        port_mtls: Vec::new(),
        authorization: Authorization::default(),
        backs: vec![BackedService {
            key: key(),
            ports: vec![PortMapping {
                service_port: 80,
                target_port: port,
            }],
        }],
        telemetry: Telemetry::default(),
        mesh_prefixes: vec!["10.0.0.0/8".parse().unwrap()],
    }
}

/// Keeps what the data plane reports.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recorder(Arc<Mutex<Recorded>>);

#[derive(Debug, Default)]
pub(crate) struct Recorded {
    pub(crate) refusals: Vec<(RefusalReason, String)>,
    pub(crate) outcomes: Vec<(Labels, HttpOutcome)>,
    pub(crate) lines: Vec<Line>,
    pub(crate) tcp: Vec<String>,
    /// Of Services: ejections, copies.
    pub(crate) notes: Vec<String>,
}

/// An access log record, as far as tests look at it.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) status: u16,
    pub(crate) flags: String,
    pub(crate) details: String,
    pub(crate) attempts: u32,
    pub(crate) route: Option<String>,
    pub(crate) received: u64,
    pub(crate) sent: u64,
    pub(crate) peer: Option<Identity>,
}

impl Recorder {
    pub(crate) fn get<T>(&self, look: impl FnOnce(&Recorded) -> T) -> T {
        look(&self.0.lock().unwrap())
    }

    /// Waits until something was recorded; reports follow the bytes.
    pub(crate) async fn wait<T>(&self, look: impl Fn(&Recorded) -> Option<T>) -> T {
        for _ in 0..1000 {
            if let Some(found) = self.get(&look) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!(
            "not recorded within ten seconds; what was: {:#?}",
            self.0.lock().unwrap()
        );
    }

    fn note(&self, note: String) {
        self.0.lock().unwrap().notes.push(note);
    }

    pub(crate) fn forget_notes(&self) {
        self.0.lock().unwrap().notes.clear();
    }

    pub(crate) async fn note_of(&self, note: &str) {
        let noted = |recorded: &Recorded| recorded.notes.iter().any(|each| each == note);
        self.wait(|recorded| noted(recorded).then_some(())).await;
    }

    pub(crate) async fn line(&self, index: usize) -> Line {
        self.wait(|recorded| recorded.lines.get(index).cloned())
            .await
    }

    pub(crate) async fn refusal(&self, reason: RefusalReason) -> String {
        self.wait(|recorded| {
            let found = recorded.refusals.iter().find(|(why, _)| *why == reason);
            found.map(|(_, details)| details.clone())
        })
        .await
    }
}

impl Observer for Recorder {
    fn http(&self, labels: &Labels) -> Arc<dyn HttpSeries> {
        Arc::new(Series(self.clone(), labels.clone()))
    }

    fn tcp(&self, labels: &Labels) -> Arc<dyn TcpSeries> {
        Arc::new(Series(self.clone(), labels.clone()))
    }

    fn span(&self, _: Direction, _: &mut HeaderMap) -> Option<Box<dyn Span>> {
        None
    }

    fn logs(&self) -> bool {
        true
    }

    fn log(&self, record: &AccessRecord<'_>) {
        self.0.lock().unwrap().lines.push(Line {
            status: record.http.as_ref().map_or(0, |http| http.status),
            flags: record.flags.to_string(),
            details: record.details.unwrap_or_default().to_owned(),
            attempts: record.attempts,
            route: record.route.map(str::to_owned),
            received: record.received,
            sent: record.sent,
            peer: record.peer.cloned(),
        });
    }

    fn ejected(&self, service: &ServiceKey) {
        self.note(format!("{} ejected", service.name));
    }

    fn out(&self, service: &ServiceKey, endpoints: usize) {
        self.note(format!("{} out {endpoints}", service.name));
    }

    fn mirrored(&self, service: &ServiceKey, copy: Mirrored) {
        self.note(format!("{} mirrored {}", service.name, copy.as_str()));
    }

    fn refused(&self, refusal: &Refusal<'_>) {
        let refusal = (refusal.reason, refusal.details.to_owned());
        self.0.lock().unwrap().refusals.push(refusal);
    }
}

#[derive(Debug)]
struct Series(Recorder, Labels);

impl HttpSeries for Series {
    fn finished(&self, outcome: &HttpOutcome) {
        self.0
            .0
            .lock()
            .unwrap()
            .outcomes
            .push((self.1.clone(), *outcome));
    }
}

impl TcpSeries for Series {
    fn opened(&self) {
        self.0.0.lock().unwrap().tcp.push("opened".into());
    }
    fn transferred(&self, received: u64, sent: u64) {
        self.0
            .0
            .lock()
            .unwrap()
            .tcp
            .push(format!("{received}/{sent}"));
    }
    fn closed(&self, flags: turnpike_sidecar::observe::Flags) {
        self.0.0.lock().unwrap().tcp.push(format!("closed {flags}"));
    }
}

/// One pod's proxy.
pub(crate) struct Sidecar {
    pub(crate) plane: DataPlane,
    pub(crate) known: Arc<Known>,
    pub(crate) seen: Recorder,
    pub(crate) own: watch::Sender<Arc<SelfConfig>>,
    pub(crate) store: Arc<CredentialStore>,
}

/// How a sidecar differs from the usual.
pub(crate) struct Setup {
    pub(crate) outbound_to: SocketAddr,
    pub(crate) inbound_to: SocketAddr,
    pub(crate) own: SelfConfig,
    pub(crate) bounds: Bounds,
    pub(crate) workers: usize,
}

impl Setup {
    /// A pod that calls [`VIP`].
    pub(crate) fn caller() -> Self {
        Self::new("caller", 9)
    }

    /// A pod whose application listens on `app`.
    pub(crate) fn callee(account: &str, app: SocketAddr) -> Self {
        Self {
            inbound_to: app,
            ..Self::new(account, app.port())
        }
    }

    fn new(account: &str, port: u16) -> Self {
        Self {
            outbound_to: VIP.parse().unwrap(),
            inbound_to: "127.0.0.1:9".parse().unwrap(),
            own: own(account, port),
            bounds: Bounds::default(),
            workers: 1,
        }
    }

    pub(crate) fn start(self, trust: &Trust) -> Sidecar {
        let store = trust.store(self.own.identity.service_account());
        self.start_with(store)
    }

    pub(crate) fn start_with(self, store: Arc<CredentialStore>) -> Sidecar {
        let known = Arc::new(Known::default());
        let seen = Recorder::default();
        let (own, own_watch) = watch::channel(Arc::new(self.own));
        let mesh = Mesh::new(own_watch, known.clone(), store.clone(), "cluster");
        let listen = |to| Listen {
            addresses: vec![LOOPBACK.parse().unwrap()],
            original: OriginalDestination::Fixed(to),
        };
        let config = Config {
            outbound: listen(self.outbound_to),
            inbound: listen(self.inbound_to),
            pod_addresses: Vec::new(),
            workers: self.workers,
            bounds: self.bounds,
        };
        let plane = DataPlane::start(config, mesh, Arc::new(seen.clone())).unwrap();
        Sidecar {
            plane,
            known,
            seen,
            own,
            store,
        }
    }
}

impl Sidecar {
    pub(crate) fn outbound(&self) -> SocketAddr {
        self.plane.outbound_addresses()[0]
    }

    pub(crate) fn inbound(&self) -> SocketAddr {
        self.plane.inbound_addresses()[0]
    }

    pub(crate) fn set_own(&self, change: impl FnOnce(&mut SelfConfig)) {
        let mut own = SelfConfig::clone(&self.own.borrow());
        change(&mut own);
        self.own.send_replace(Arc::new(own));
    }
}

/// Two pods: a caller, and `web` with an application at `app`.
pub(crate) struct Pair {
    pub(crate) caller: Sidecar,
    pub(crate) callee: Sidecar,
}

impl Pair {
    pub(crate) fn new(app: SocketAddr) -> Self {
        Self::with(app, |_| {})
    }

    pub(crate) fn with(app: SocketAddr, change: impl FnOnce(&mut ServiceView)) -> Self {
        let trust = Trust::new();
        let callee = Setup::callee("web", app).start(&trust);
        let caller = Setup::caller().start(&trust);
        let mut view = web(&[(callee.inbound(), Some("web"))]);
        change(&mut view);
        caller.known.set_service(view);
        Self { caller, callee }
    }
}
