//! The composition root.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use kube::Client;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use turnpike_api::ObjectKey;
use turnpike_certs::{Authority, ClientAuth, server_config_with};
use turnpike_daemon::tasks::Tasks;
use turnpike_discovery::Discovery;
use turnpike_kubernetes::{
    Event, Place, Source,
    cluster::{self, ClusterSource},
    directory::DirectorySource,
};
use turnpike_model::{Model, Settings};
use turnpike_wire::{channel::accept_tls, names::ALPN_GRPC};

use crate::{
    Args, Metrics,
    auth::{AuthenticateLayer, Authenticator, JwtAuthenticator, JwtConfig, ReviewAuthenticator},
    ca::{CertificateService, Journal, OwnCertificate, RootSecret, StateDir, publish},
    cluster::Cluster,
    config::{Config, KubernetesConfig, SourceConfig, TokensConfig},
    feed::{self, Health},
    pages::{self, Pages},
};

/// The record of what was issued, in the state directory.
const JOURNAL: &str = "issued.jsonl";
/// A client that answers no ping in time is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// For calls in flight when the controller is told to stop.
const DRAIN: Duration = Duration::from_secs(5);
/// Calls at once in one connection; a data plane process needs two.
const STREAMS_PER_CONNECTION: u32 = 32;

/// A controller with its ports bound and its root loaded.
#[derive(Debug)]
pub struct Controller {
    grpc: TcpListener,
    http: TcpListener,
    source: AnySource,
    /// `None`: there is no cluster, only a folder.
    cluster: Option<Cluster>,
    discovery: Discovery,
    health: Arc<Health>,
    metrics: Metrics,
    own: OwnCertificate,
    issuer: CertificateService,
    authenticate: AuthenticateLayer,
    /// Held until the end.
    _state: StateDir,
}

#[derive(Debug)]
enum AnySource {
    Directory(DirectorySource),
    Cluster(ClusterSource),
}

impl Source for AnySource {
    async fn next(&mut self) -> Option<Event> {
        match self {
            Self::Directory(source) => source.next().await,
            Self::Cluster(source) => source.next().await,
        }
    }

    fn place(&self, object: &ObjectKey) -> Option<Place> {
        match self {
            Self::Directory(source) => source.place(object),
            Self::Cluster(source) => source.place(object),
        }
    }
}

impl Controller {
    pub async fn start(args: Args) -> anyhow::Result<Self> {
        let Config {
            cluster,
            network,
            trust_domain,
            listen,
            http,
            state_dir,
            root_cert_out,
            audience,
            source,
            tokens,
        } = args.valid()?;
        let state = StateDir::open(&state_dir).context("cannot use the state directory")?;
        let api = Api::connect(&source, &tokens).await?;
        let authority = Arc::new(root(&source, &api, &state, &trust_domain).await?);
        if let Some(path) = root_cert_out
            && let Err(error) = publish(&path, authority.certificate_pem())
        {
            // What runs already trusts the root it has; serving it matters more.
            tracing::error!(path = %path.display(), %error, "cannot write the root certificate");
        }
        let metrics = Metrics::new();
        let health = Arc::<Health>::default();
        metrics.observe_impairments(health.impairments());
        let journal_path = state.path().join(JOURNAL);
        let journal = Journal::start(&journal_path)
            .context("cannot start the writer of the issuance record")?;
        let own = OwnCertificate::new(authority.clone(), &trust_domain)
            .context("cannot make the controller's own certificate")?;
        let issuer = CertificateService::new(authority.clone(), journal, metrics.clone());
        let authenticator = authenticator(tokens, &api, audience, &trust_domain)?;
        let (source, in_cluster) = match source {
            SourceConfig::Directory(folder) => (directory(&folder)?, None),
            SourceConfig::Kubernetes(config) => {
                let (client, server) = api.get()?;
                let source = ClusterSource::start(client, server);
                let impairments = health.impairments();
                let in_cluster =
                    Cluster::new(client, &source, &authority, impairments, config.webhook).await?;
                (AnySource::Cluster(source), Some(in_cluster))
            }
        };
        let settings = Settings {
            cluster: cluster.into(),
            trust_domain: trust_domain.into(),
            network: network.into(),
        };
        let discovery = Discovery::new(Model::new(settings));
        metrics.observe(&discovery);
        Ok(Self {
            grpc: bind(listen, "--listen").await?,
            http: bind(http, "--http").await?,
            source,
            cluster: in_cluster,
            discovery,
            health,
            authenticate: AuthenticateLayer::new(authenticator, metrics.clone()),
            metrics,
            own,
            issuer,
            _state: state,
        })
    }

    /// Serves until `stop`.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let Self {
            grpc,
            http,
            source,
            cluster,
            discovery,
            health,
            metrics,
            own,
            issuer,
            authenticate,
            _state,
        } = self;
        tracing::info!(
            grpc = %grpc.local_addr()?,
            http = %http.local_addr()?,
            "the controller is up"
        );
        let store = own.store();
        let mut tasks = Tasks::default();
        let pages = Pages {
            metrics: metrics.clone(),
            discovery: discovery.clone(),
            health: health.clone(),
        };
        tasks.spawn("pages", pages::serve(http, pages));
        let webhook_ended = cluster.and_then(|cluster| {
            let certificate = store.clone();
            cluster.spawn(
                &mut tasks,
                certificate,
                &discovery,
                &health,
                &metrics,
                &stop,
            )
        });
        let feed = feed::run(source, discovery.clone(), health.clone(), metrics);
        tasks.spawn("the source", feed);
        tasks.spawn("the controller's own certificate", async move {
            own.keep_fresh().await;
        });

        tokio::select! {
            // First: once it says that it is ready, it ends in order.
            biased;
            () = health.synced() => {}
            () = stop.cancelled() => return Ok(()),
            ended = tasks.ended() => return Err(ended.into()),
        }
        // Not `stop` itself: by that a server without calls ends at once, as if by itself.
        let drain = CancellationToken::new();
        let router = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(STREAMS_PER_CONNECTION)
            .layer(authenticate)
            .add_service(discovery.service())
            .add_service(issuer.into_server());
        let config = server_config_with(store, &[ALPN_GRPC], ClientAuth::None);
        let served =
            router.serve_with_incoming_shutdown(accept_tls(grpc, config), drain.cancelled());
        let mut served = std::pin::pin!(served);
        tokio::select! {
            // First: what ends because of it has not ended by itself.
            biased;
            () = stop.cancelled() => {}
            ended = tasks.ended() => return Err(ended.into()),
            ended = &mut served => return ended.context("gRPC ended by itself"),
        }
        tracing::info!("stopping");
        health.stop();
        discovery.stop();
        drain.cancel();
        match tokio::time::timeout(DRAIN, served).await {
            Ok(ended) => ended.context("gRPC did not end well")?,
            Err(_) => tracing::warn!("calls were still in flight after {DRAIN:?}"),
        }
        if let Some(webhook_ended) = webhook_ended {
            webhook_ended.cancelled().await;
        }
        Ok(())
    }
}

/// The way to the Kubernetes API, where anything needs one.
struct Api(Option<(Client, String)>);

impl Api {
    async fn connect(source: &SourceConfig, tokens: &TokensConfig) -> anyhow::Result<Self> {
        let needed =
            matches!(source, SourceConfig::Kubernetes(_)) || matches!(tokens, TokensConfig::Review);
        Ok(Self(match needed {
            true => Some(cluster::connect().await?),
            false => None,
        }))
    }

    fn get(&self) -> anyhow::Result<(&Client, &str)> {
        let (client, server) = self.0.as_ref().context("no Kubernetes API is configured")?;
        Ok((client, server))
    }
}

async fn root(
    source: &SourceConfig,
    api: &Api,
    state: &StateDir,
    trust_domain: &str,
) -> anyhow::Result<Authority> {
    let now = SystemTime::now();
    let authority = match source {
        SourceConfig::Kubernetes(KubernetesConfig {
            namespace,
            root_secret: Some(name),
            ..
        }) => {
            let (client, _) = api.get()?;
            let secret = RootSecret::new(client.clone(), namespace, name);
            secret
                .root(trust_domain, now)
                .await
                .map_err(anyhow::Error::from)
        }
        _ => state.root(trust_domain, now).map_err(anyhow::Error::from),
    };
    authority.context("there is no CA")
}

fn authenticator(
    tokens: TokensConfig,
    api: &Api,
    audience: String,
    trust_domain: &str,
) -> anyhow::Result<Arc<dyn Authenticator>> {
    let trust_domain = trust_domain.to_owned();
    Ok(match tokens {
        TokensConfig::Jwks { issuer, jwks } => {
            let jwt = JwtConfig {
                issuer,
                audience,
                jwks,
                trust_domain,
            };
            Arc::new(JwtAuthenticator::new(jwt).context("cannot use --token-jwks")?)
        }
        TokensConfig::Review => {
            let (client, _) = api.get()?;
            let client = client.clone();
            Arc::new(ReviewAuthenticator::new(client, audience, trust_domain))
        }
    })
}

fn directory(folder: &Path) -> anyhow::Result<AnySource> {
    let source = DirectorySource::start(folder)
        .with_context(|| format!("cannot use --source-dir `{}`", folder.display()))?;
    Ok(AnySource::Directory(source))
}

pub(crate) async fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| format!("cannot listen on {flag} {address}"))
}
