//! A controller whose every answer the test decides: delta ADS and the CA, over TLS on loopback.

#![allow(dead_code, reason = "shared by the tests of several crates")]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use turnpike_certs::{
    Authority, ClientAuth, CredentialStore, KeyRequest, ROOT_LIFETIME, TrustBundle,
    server_config_with,
};
use turnpike_rules::Identity;
use turnpike_wire::{
    ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
    channel::{self, Controller},
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as Packed,
        aggregated_discovery_service_server::{
            AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
        },
    },
    resource::{Resource, pack},
};

pub(crate) const NAME: &str = "turnpike-controller.turnpike-system.svc";
pub(crate) const TOKEN: &str = "a.good.token";
/// Long enough for any machine; nothing waits this long when it works.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The controller and the files its clients read. Stops when dropped.
pub(crate) struct TestController {
    pub(crate) address: SocketAddr,
    pub(crate) authority: Arc<Authority>,
    pub(crate) files: tempfile::TempDir,
    script: Arc<Script>,
    serving: Option<JoinHandle<()>>,
}

/// What the server does, and what it saw.
struct Script {
    world: watch::Sender<World>,
    /// Counts up to cut every stream.
    cut: watch::Sender<u64>,
    seen: watch::Sender<Vec<DeltaDiscoveryRequest>>,
    streams: watch::Sender<u32>,
    ca: Mutex<CaScript>,
    authority: Mutex<Arc<Authority>>,
}

#[derive(Clone, Default)]
struct World {
    resources: BTreeMap<(String, String), Packed>,
    /// Names that are not answered for now.
    held: BTreeSet<String>,
}

struct CaScript {
    lifetime: Duration,
    refuse: Option<Status>,
    issued: u32,
}

impl TestController {
    pub(crate) async fn start() -> Self {
        let authority = Arc::new(root());
        let files = tempfile::tempdir().unwrap();
        std::fs::write(files.path().join("root.pem"), authority.certificate_pem()).unwrap();
        std::fs::write(files.path().join("token"), format!("{TOKEN}\n")).unwrap();
        // Of this process alone: one that comes back to its port must find it free.
        let [.., high, low] = std::process::id().to_be_bytes();
        let listener = TcpListener::bind(SocketAddr::from(([127, 9, high, low], 0))).await;
        let listener = listener.unwrap();
        let address = listener.local_addr().unwrap();
        let script = Arc::new(Script {
            world: watch::Sender::new(World::default()),
            cut: watch::Sender::new(0),
            seen: watch::Sender::new(Vec::new()),
            streams: watch::Sender::new(0),
            ca: Mutex::new(CaScript {
                lifetime: Duration::from_secs(24 * 3600),
                refuse: None,
                issued: 0,
            }),
            authority: Mutex::new(authority.clone()),
        });
        let mut controller = Self {
            address,
            authority,
            files,
            script,
            serving: None,
        };
        controller.serve(listener);
        controller
    }

    /// How a client reaches it.
    pub(crate) fn client(&self) -> Controller {
        Controller {
            address: self.address.to_string(),
            server_name: NAME.to_owned(),
            root_file: self.files.path().join("root.pem"),
            token_file: self.files.path().join("token"),
        }
    }

    fn serve(&mut self, listener: TcpListener) {
        let name = Identity::new("cluster.local", "turnpike-system", "controller").unwrap();
        let key = KeyRequest::new(&name).unwrap();
        let day = Duration::from_secs(24 * 3600);
        let issued = self
            .authority
            .sign_server(key.csr_pem(), &name, &[NAME], day, SystemTime::now())
            .unwrap();
        let roots = TrustBundle::new(vec![self.authority.certificate().clone()]).unwrap();
        let credentials = key.into_credentials(&issued.chain, roots).unwrap();
        let store = CredentialStore::new(credentials);
        let config = server_config_with(store, &["h2"], ClientAuth::None);
        let service = Service(self.script.clone());
        let server = tonic::transport::Server::builder()
            .add_service(AggregatedDiscoveryServiceServer::new(service.clone()))
            .add_service(IstioCertificateServiceServer::new(service))
            .serve_with_incoming(channel::accept_tls(listener, config));
        self.serving = Some(tokio::spawn(async move { server.await.unwrap() }));
    }

    /// Takes the server down, as if the process were killed.
    pub(crate) async fn kill(&mut self) {
        let serving = self.serving.take().unwrap();
        serving.abort();
        let _ = serving.await;
        self.cut();
    }

    /// Takes it up again on the same port, under `authority`.
    pub(crate) async fn revive(&mut self, authority: Authority) {
        self.authority = Arc::new(authority);
        *self.script.authority.lock().unwrap() = self.authority.clone();
        let listener = loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        self.serve(listener);
    }

    /// Puts a resource into the world, or replaces it.
    pub(crate) fn put<R: Resource>(&self, name: &str, version: &str, resource: &R) {
        self.put_packed(R::TYPE_URL, pack(name, version, resource));
    }

    pub(crate) fn put_packed(&self, type_url: &str, resource: Packed) {
        let key = (type_url.to_owned(), resource.name.clone());
        self.script.world.send_modify(|world| {
            world.resources.insert(key, resource);
        });
    }

    pub(crate) fn remove<R: Resource>(&self, name: &str) {
        let key = (R::TYPE_URL.to_owned(), name.to_owned());
        self.script.world.send_modify(|world| {
            world.resources.remove(&key);
        });
    }

    /// Leaves a name unanswered until it is let go.
    pub(crate) fn hold(&self, name: &str) {
        self.script.world.send_modify(|world| {
            world.held.insert(name.to_owned());
        });
    }

    pub(crate) fn let_go(&self, name: &str) {
        self.script.world.send_modify(|world| {
            world.held.remove(name);
        });
    }

    /// Ends every stream.
    pub(crate) fn cut(&self) {
        self.script.cut.send_modify(|cut| *cut += 1);
    }

    /// All requests so far.
    pub(crate) fn seen(&self) -> Vec<DeltaDiscoveryRequest> {
        self.script.seen.borrow().clone()
    }

    pub(crate) fn forget_seen(&self) {
        self.script.seen.send_modify(Vec::clear);
    }

    /// Waits for a request like this.
    pub(crate) async fn see(
        &self,
        what: &str,
        like: impl Fn(&DeltaDiscoveryRequest) -> bool,
    ) -> DeltaDiscoveryRequest {
        let mut seen = self.script.seen.subscribe();
        let wait = seen.wait_for(|seen| seen.iter().any(&like));
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(seen) => seen
                .unwrap()
                .iter()
                .find(|request| like(request))
                .unwrap()
                .clone(),
            Err(_) => panic!("never seen: {what}; seen: {:#?}", self.seen()),
        }
    }

    /// Waits until this many streams have been opened since the start.
    pub(crate) async fn streams(&self, count: u32) {
        let mut streams = self.script.streams.subscribe();
        let wait = streams.wait_for(|opened| *opened >= count);
        tokio::time::timeout(PATIENCE, wait)
            .await
            .expect("streams")
            .unwrap();
    }

    pub(crate) fn ca_lifetime(&self, lifetime: Duration) {
        self.script.ca.lock().unwrap().lifetime = lifetime;
    }

    pub(crate) fn ca_refuses(&self, status: Option<Status>) {
        self.script.ca.lock().unwrap().refuse = status;
    }

    pub(crate) fn ca_issued(&self) -> u32 {
        self.script.ca.lock().unwrap().issued
    }
}

impl Drop for TestController {
    fn drop(&mut self) {
        if let Some(serving) = &self.serving {
            serving.abort();
        }
        self.cut();
    }
}

pub(crate) fn root() -> Authority {
    Authority::generate("cluster.local", ROOT_LIFETIME, SystemTime::now()).unwrap()
}

#[derive(Clone)]
struct Service(Arc<Script>);

fn authorised<T>(request: &Request<T>) -> Result<(), Status> {
    let given = request
        .metadata()
        .get("authorization")
        .and_then(|value| value.to_str().ok());
    if given == Some(format!("Bearer {TOKEN}").as_str()) {
        Ok(())
    } else {
        Err(Status::unauthenticated("the token is not valid"))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        authorised(&request)?;
        let (responses, stream) = mpsc::channel(8);
        let script = self.0.clone();
        script.streams.send_modify(|streams| *streams += 1);
        let mut requests = request.into_inner();
        // Nothing is answered, not even with headers, before the first request: the strictest
        // server a client may meet.
        let first = requests
            .message()
            .await?
            .ok_or_else(|| Status::cancelled("no request"))?;
        tokio::spawn(converse(script, first, requests, responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// What one stream is subscribed to, and what it was told.
#[derive(Default)]
struct Told {
    names: BTreeMap<String, BTreeSet<String>>,
    /// `None`: that there is no such thing.
    versions: HashMap<(String, String), Option<String>>,
    nonce: u64,
}

async fn converse(
    script: Arc<Script>,
    first: DeltaDiscoveryRequest,
    mut requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
) {
    let mut told = Told::default();
    told.listen(&first);
    script.seen.send_modify(|seen| seen.push(first));
    let mut world = script.world.subscribe();
    let mut cut = script.cut.subscribe();
    cut.mark_unchanged();
    loop {
        let now = world.borrow_and_update().clone();
        for response in told.due(&now) {
            if responses.send(Ok(response)).await.is_err() {
                return;
            }
        }
        tokio::select! {
            request = requests.message() => match request {
                Ok(Some(request)) => {
                    told.listen(&request);
                    script.seen.send_modify(|seen| seen.push(request));
                }
                _ => return,
            },
            changed = world.changed() => if changed.is_err() { return },
            _ = cut.changed() => {
                let _ = responses.send(Err(Status::unavailable("cut by the test"))).await;
                return;
            }
        }
    }
}

impl Told {
    fn listen(&mut self, request: &DeltaDiscoveryRequest) {
        let type_url = &request.type_url;
        let names = self.names.entry(type_url.clone()).or_default();
        for name in &request.resource_names_unsubscribe {
            names.remove(name);
            self.versions.remove(&(type_url.clone(), name.clone()));
        }
        for name in &request.resource_names_subscribe {
            names.insert(name.clone());
            self.versions.remove(&(type_url.clone(), name.clone()));
        }
        for (name, version) in &request.initial_resource_versions {
            self.versions
                .insert((type_url.clone(), name.clone()), Some(version.clone()));
        }
    }

    fn due(&mut self, world: &World) -> Vec<DeltaDiscoveryResponse> {
        let mut responses = Vec::new();
        for (type_url, names) in &self.names {
            let of_type = |(of, _): &(String, String)| of == type_url;
            let mut asked: BTreeSet<String> = names.iter().filter(|n| *n != "*").cloned().collect();
            if names.contains("*") {
                let here = world.resources.keys().filter(|key| of_type(key));
                asked.extend(here.map(|(_, name)| name.clone()));
                let before = self
                    .versions
                    .iter()
                    .filter(|(key, told)| of_type(key) && told.is_some());
                asked.extend(before.map(|((_, name), _)| name.clone()));
            }
            let (mut resources, mut removed) = (Vec::new(), Vec::new());
            for name in asked.difference(&world.held) {
                let key = (type_url.clone(), name.clone());
                let now = world.resources.get(&key);
                let version = now.map(|resource| resource.version.clone());
                if self.versions.get(&key) == Some(&version) {
                    continue;
                }
                match now {
                    Some(resource) => resources.push(resource.clone()),
                    None => removed.push(name.clone()),
                }
                self.versions.insert(key, version);
            }
            if resources.is_empty() && removed.is_empty() {
                continue;
            }
            self.nonce += 1;
            responses.push(DeltaDiscoveryResponse {
                type_url: type_url.clone(),
                resources,
                removed_resources: removed,
                nonce: self.nonce.to_string(),
                ..Default::default()
            });
        }
        responses
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        authorised(&request)?;
        let mut ca = self.0.ca.lock().unwrap();
        if let Some(status) = &ca.refuse {
            return Err(status.clone());
        }
        let identity = Identity::new("cluster.local", "shop", "web").unwrap();
        let csr = &request.get_ref().csr;
        let authority = self.0.authority.lock().unwrap().clone();
        let issued = authority
            .sign(csr, &identity, ca.lifetime, SystemTime::now())
            .map_err(|error| Status::permission_denied(error.to_string()))?;
        ca.issued += 1;
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: issued.chain,
        }))
    }
}
