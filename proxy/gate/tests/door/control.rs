//! A small controller and agent for the gate under test: real gRPC and TLS, policy by hand.

use std::{
    collections::BTreeSet,
    net::{IpAddr, TcpListener},
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::SystemTime,
};

use futures_util::Stream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};
use turnpike_certs::{
    Authority, ClientAuth, CredentialStore, KeyRequest, LEAF_LIFETIME, TrustBundle,
    server_config_with,
};
use turnpike_rules::{
    Identity,
    pod::{Members, PodEgress},
};
use turnpike_wire::{
    ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
    channel::accept_tls,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as Wire,
        aggregated_discovery_service_server::{
            AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
        },
    },
    node::{
        FeedEvent, LocalPod, RemovedPod, Synced, WatchRequest,
        feed_event::Event,
        feed_server::{Feed, FeedServer},
    },
    resource::Resource,
};

pub(crate) const NAME: &str = "turnpike-controller.turnpike-system.svc";

/// What the controller and the agent say; changes take effect at once.
pub(crate) struct Control {
    pub(crate) authority: Authority,
    pub(crate) roots: TrustBundle,
    /// Certificates given out.
    pub(crate) issued: Arc<AtomicUsize>,
    egress: watch::Sender<Vec<PodEgress>>,
    pods: watch::Sender<Vec<LocalPod>>,
    agent_away: watch::Sender<bool>,
}

pub(crate) fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "turnpike-system", account).unwrap()
}

impl Control {
    pub(crate) fn new() -> Self {
        let now = SystemTime::now();
        let authority = Authority::generate("cluster.local", 10 * LEAF_LIFETIME, now).unwrap();
        let roots = TrustBundle::from_pem(authority.certificate_pem().as_bytes()).unwrap();
        let (egress, pods) = (watch::Sender::new(vec![]), watch::Sender::new(vec![]));
        Self {
            authority,
            roots,
            issued: Arc::default(),
            egress,
            pods,
            agent_away: watch::Sender::new(false),
        }
    }

    pub(crate) fn set_egress(&self, egress: Vec<PodEgress>) {
        self.egress.send_replace(egress);
    }

    pub(crate) fn set_pods(&self, pods: Vec<LocalPod>) {
        self.pods.send_replace(pods);
    }

    /// Whoever follows the feed goes on; nobody begins to.
    pub(crate) fn set_agent_away(&self, away: bool) {
        self.agent_away.send_replace(away);
    }

    /// Serves discovery and certificates on `listener`, the feed on `socket`.
    pub(crate) async fn serve(&self, listener: TcpListener, socket: &Path) {
        let own = identity("turnpike-controller");
        let request = KeyRequest::new(&own).unwrap();
        let now = SystemTime::now();
        let issued = self
            .authority
            .sign_server(request.csr_pem(), &own, &[NAME], LEAF_LIFETIME, now)
            .unwrap();
        let credentials = request
            .into_credentials(&issued.chain, self.roots.clone())
            .unwrap();
        let store = CredentialStore::new(credentials);
        listener.set_nonblocking(true).unwrap();
        let incoming = accept_tls(
            tokio::net::TcpListener::from_std(listener).unwrap(),
            server_config_with(store, &["h2"], ClientAuth::None),
        );
        let key = self.authority.key_pem();
        let authority = Authority::from_pem(self.authority.certificate_pem(), &key).unwrap();
        let controller = Server::builder()
            .add_service(AggregatedDiscoveryServiceServer::new(Ads(self
                .egress
                .clone())))
            .add_service(IstioCertificateServiceServer::new(Ca(
                authority,
                self.issued.clone(),
            )))
            .serve_with_incoming(incoming);
        tokio::spawn(async move { controller.await.unwrap() });
        let listener = tokio::net::UnixListener::bind(socket).unwrap();
        let agent = Server::builder()
            .add_service(FeedServer::new(Agent {
                pods: self.pods.clone(),
                away: self.agent_away.clone(),
            }))
            .serve_with_incoming(UnixListenerStream::new(listener));
        tokio::spawn(async move { agent.await.unwrap() });
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

struct Ads(watch::Sender<Vec<PodEgress>>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let mut requests = request.into_inner();
        let mut egress = self.0.subscribe();
        let (answers, stream) = mpsc::channel(16);
        tokio::spawn(async move {
            let mut sent = BTreeSet::new();
            let mut subscribed = false;
            loop {
                tokio::select! {
                    request = requests.message() => {
                        let Ok(Some(request)) = request else { return };
                        assert!(request.error_detail.is_none(), "{request:?}");
                        if !request.response_nonce.is_empty() {
                            continue;
                        }
                        if request.type_url == Members::TYPE_URL {
                            continue;
                        }
                        subscribed = true;
                    }
                    changed = egress.changed() => if changed.is_err() { return },
                }
                if subscribed {
                    let answer = snapshot(&egress.borrow_and_update(), &mut sent);
                    if answers.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

fn snapshot(egress: &[PodEgress], sent: &mut BTreeSet<String>) -> DeltaDiscoveryResponse {
    let version = format!("{:x}", fastrand::u64(..));
    let resources: Vec<_> = egress
        .iter()
        .map(|egress| Wire {
            name: format!("cluster/{}/{}", egress.namespace, egress.name),
            version: version.clone(),
            resource: Some(prost_types::Any {
                type_url: PodEgress::TYPE_URL.into(),
                value: egress.encode(),
            }),
        })
        .collect();
    let names: BTreeSet<_> = resources
        .iter()
        .map(|resource| resource.name.clone())
        .collect();
    let removed_resources = sent.difference(&names).cloned().collect();
    *sent = names;
    DeltaDiscoveryResponse {
        type_url: PodEgress::TYPE_URL.into(),
        nonce: version,
        resources,
        removed_resources,
        ..Default::default()
    }
}

struct Ca(Authority, Arc<AtomicUsize>);

#[tonic::async_trait]
impl IstioCertificateService for Ca {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let csr = request.into_inner().csr;
        let gate = identity("turnpike-gate");
        let issued = self.0.sign(&csr, &gate, LEAF_LIFETIME, SystemTime::now());
        let issued = issued.map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.1.fetch_add(1, SeqCst);
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: issued.chain,
        }))
    }
}

struct Agent {
    pods: watch::Sender<Vec<LocalPod>>,
    away: watch::Sender<bool>,
}

#[tonic::async_trait]
impl Feed for Agent {
    type WatchStream = Answers<FeedEvent>;

    async fn watch(
        &self,
        _: Request<WatchRequest>,
    ) -> Result<Response<Answers<FeedEvent>>, Status> {
        if *self.away.borrow() {
            return Err(Status::unavailable("the agent is away"));
        }
        let mut pods = self.pods.subscribe();
        let (events, stream) = mpsc::channel(64);
        tokio::spawn(async move {
            let mut known = pods.borrow_and_update().clone();
            let first = known.iter().cloned().map(Event::Added);
            let mut next: Vec<_> = first.chain([Event::Synced(Synced {})]).collect();
            loop {
                for event in next {
                    if events
                        .send(Ok(FeedEvent { event: Some(event) }))
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
                if pods.changed().await.is_err() {
                    return;
                }
                let now = pods.borrow_and_update().clone();
                let gone = known.iter().filter(|pod| !now.contains(pod)).map(|pod| {
                    Event::Removed(RemovedPod {
                        container_id: pod.container_id.clone(),
                        addresses: pod.addresses.clone(),
                    })
                });
                next = gone.chain(now.iter().cloned().map(Event::Added)).collect();
                known = now;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

pub(crate) fn local_pod(name: &str, addresses: &[IpAddr]) -> LocalPod {
    let octets = |address: &IpAddr| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    LocalPod {
        uid: format!("uid-{name}"),
        namespace: "shop".into(),
        name: name.into(),
        service_account: "pay".into(),
        container_id: format!("container-{name}"),
        addresses: addresses.iter().map(octets).collect(),
        selected: true,
    }
}
