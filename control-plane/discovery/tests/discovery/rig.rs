//! A discovery server over real TLS on loopback, and clients that speak plain delta ADS.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, transport::Server};
use turnpike_api::{Kind, Object};
use turnpike_certs::{
    Authority, ClientAuth, CredentialStore, KeyRequest, LEAF_LIFETIME, ROOT_LIFETIME, TrustBundle,
    controller_client_config, server_config_with,
};
use turnpike_discovery::{Caller, Discovery, PodRef};
use turnpike_model::{Model, Settings};
use turnpike_rules::Identity;
use turnpike_wire::{
    channel::{accept_tls, connect},
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    names::ALPN_GRPC,
    rpc,
};

const SERVER: &str = "turnpike-controller.turnpike-system.svc";
/// Far beyond what anything here takes; reached only where something is lost.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const WEB: &str = "shop/web/uid-web-1/node-a";
pub(crate) const AGENT: &str = "turnpike-system/turnpike-node/uid-agent/node-a";

pub(crate) struct Rig {
    pub(crate) discovery: Discovery,
    address: String,
    roots: TrustBundle,
}

impl Rig {
    pub(crate) async fn start() -> Self {
        let settings = Settings {
            cluster: "cluster".into(),
            trust_domain: "cluster.local".into(),
            network: "default".into(),
        };
        let discovery = Discovery::new(Model::new(settings));
        let (store, roots) = credentials();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let config = server_config_with(store, &[ALPN_GRPC], ClientAuth::None);
        let server = Server::builder()
            .layer(tonic::service::InterceptorLayer::new(authenticate))
            .add_service(discovery.service())
            .serve_with_incoming(accept_tls(listener, config));
        tokio::spawn(server);
        Self {
            discovery,
            address,
            roots,
        }
    }

    pub(crate) fn apply(&self, kind: Kind, value: Value) {
        let object = Object::deserialize(kind, value).unwrap();
        self.discovery.update(|model| model.apply(object));
    }

    /// Opens a stream as `namespace/account/pod-uid/node`.
    pub(crate) async fn client(&self, caller: &str) -> Client {
        self.open(caller).await.unwrap()
    }

    pub(crate) async fn open(&self, caller: &str) -> Result<Client, Status> {
        let config = controller_client_config(&self.roots, ALPN_GRPC);
        let channel = connect(&self.address, SERVER, config).await.unwrap();
        let (requests, stream) = mpsc::channel(64);
        let mut request = Request::new(ReceiverStream::new(stream));
        request
            .metadata_mut()
            .insert("x-caller", caller.parse().unwrap());
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = client
            .delta_aggregated_resources(request)
            .await?
            .into_inner();
        Ok(Client {
            requests,
            responses,
        })
    }
}

pub(crate) struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Client {
    pub(crate) async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    pub(crate) async fn subscribe(&self, kind: &str, names: &[&str]) {
        self.send(subscription(kind, names, &[])).await;
    }

    pub(crate) async fn unsubscribe(&self, kind: &str, names: &[&str]) {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let request = DeltaDiscoveryRequest {
            type_url: url(kind),
            resource_names_unsubscribe: names,
            ..DeltaDiscoveryRequest::default()
        };
        self.send(request).await;
    }

    pub(crate) async fn response(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let message = timeout(PATIENCE, self.responses.message())
            .await
            .expect("no response");
        message.map(|message| message.expect("the stream ended"))
    }

    /// The next response, acknowledged: names added with their versions, names removed.
    pub(crate) async fn told(&mut self) -> (Vec<(String, String)>, Vec<String>) {
        let response = self.response().await.unwrap();
        self.answer(&response, None).await;
        let added = response
            .resources
            .into_iter()
            .map(|r| (r.name, r.version))
            .collect();
        (added, response.removed_resources)
    }

    pub(crate) async fn names(&mut self) -> (Vec<String>, Vec<String>) {
        let (added, removed) = self.told().await;
        (added.into_iter().map(|(name, _)| name).collect(), removed)
    }

    pub(crate) async fn answer(&self, response: &DeltaDiscoveryResponse, refusal: Option<&str>) {
        let detail = refusal.map(|message| rpc::Status {
            code: 3,
            message: message.into(),
        });
        let request = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: detail,
            ..DeltaDiscoveryRequest::default()
        };
        self.send(request).await;
    }

    /// Proves that nothing else is on its way: a name that is asked for now is answered next.
    pub(crate) async fn nothing_more(&mut self) {
        self.probe("Address", "default/192.0.2.254").await;
    }

    /// The same where an agent asks: types are served in order, and its own come after addresses.
    pub(crate) async fn nothing_more_for_agents(&mut self) {
        self.probe("Members", "cluster/nowhere").await;
    }

    async fn probe(&mut self, kind: &str, name: &str) {
        self.subscribe(kind, &[name]).await;
        let (added, removed) = self.names().await;
        assert_eq!((added, removed), (vec![], vec![name.to_owned()]));
        self.unsubscribe(kind, &[name]).await;
    }
}

pub(crate) fn url(kind: &str) -> String {
    format!("type.googleapis.com/turnpike.mesh.v1.{kind}")
}

pub(crate) fn subscription(
    kind: &str,
    names: &[&str],
    versions: &[(String, String)],
) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: url(kind),
        resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
        initial_resource_versions: versions.iter().cloned().collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

pub(crate) fn pod(name: &str, node: &str, address: &str, ready: bool) -> Value {
    let ready = if ready { "True" } else { "False" };
    json!({
        "metadata": {
            "name": name, "namespace": "shop", "uid": format!("uid-{name}"),
            "labels": {"app": "web"},
        },
        "spec": {
            "nodeName": node, "containers": [{"name": "app", "ports": [{"containerPort": 8080}]}],
            "initContainers": [{"name": "turnpike-proxy", "restartPolicy": "Always"}],
        },
        "status": {"podIP": address, "conditions": [{"type": "Ready", "status": ready}]},
    })
}

pub(crate) fn service(name: &str, app: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "clusterIP": "10.96.0.1", "selector": {"app": app},
            "ports": [{"port": 80, "targetPort": 8080}],
        },
    })
}

/// In the place of a token: tests of who may what are about callers, not about tokens.
fn authenticate(mut request: Request<()>) -> Result<Request<()>, Status> {
    let text = request
        .metadata()
        .get("x-caller")
        .and_then(|value| value.to_str().ok());
    let text = text
        .ok_or_else(|| Status::unauthenticated("no caller"))?
        .to_owned();
    let mut parts = text.split('/');
    let mut next = || parts.next().unwrap_or_default();
    let (namespace, account) = (next(), next());
    let identity = Identity::new("cluster.local", namespace, account).unwrap();
    let uid = next();
    let node = next();
    let caller = Caller {
        identity,
        pod: (!uid.is_empty()).then(|| PodRef {
            name: uid.into(),
            uid: uid.into(),
        }),
        node: (!node.is_empty()).then(|| node.into()),
        // A fifth part: seconds until the token ends.
        expires: next()
            .parse()
            .ok()
            .map(|seconds| std::time::SystemTime::now() + Duration::from_secs(seconds)),
    };
    request.extensions_mut().insert(Arc::new(caller));
    Ok(request)
}

fn credentials() -> (Arc<CredentialStore>, TrustBundle) {
    let now = std::time::SystemTime::now();
    let authority = Authority::generate("cluster.local", ROOT_LIFETIME, now).unwrap();
    let identity =
        Identity::new("cluster.local", "turnpike-system", "turnpike-controller").unwrap();
    let request = KeyRequest::new(&identity).unwrap();
    let issued = authority
        .sign_server(request.csr_pem(), &identity, &[SERVER], LEAF_LIFETIME, now)
        .unwrap();
    let roots = TrustBundle::from_pem(authority.certificate_pem().as_bytes()).unwrap();
    let credentials = request
        .into_credentials(&issued.chain, roots.clone())
        .unwrap();
    (CredentialStore::new(credentials), roots)
}
