//! The composition root.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use turnpike_certs::{ClientAuth, server_config_with};
use turnpike_discovery::Discovery;
use turnpike_kubernetes::directory::DirectorySource;
use turnpike_model::{Model, Settings};
use turnpike_wire::{channel::accept_tls, names::ALPN_GRPC};

use crate::{
    Args, Metrics,
    auth::{AuthenticateLayer, Authenticator, JwtAuthenticator, JwtConfig},
    ca::{CertificateService, Journal, OwnCertificate, StateDir, publish},
    feed::{self, Health},
    http::{self, Pages},
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
    source: DirectorySource,
    discovery: Discovery,
    health: Arc<Health>,
    metrics: Metrics,
    own: OwnCertificate,
    issuer: CertificateService,
    authenticate: AuthenticateLayer,
    /// Held until the end.
    _state: StateDir,
}

impl Controller {
    pub async fn start(args: Args) -> anyhow::Result<Self> {
        let Args {
            cluster,
            network,
            trust_domain,
            source_dir,
            listen,
            http,
            state_dir,
            root_cert_out,
            token_issuer,
            token_jwks,
            audience,
        } = args;
        let state = StateDir::open(&state_dir).context("cannot use the state directory")?;
        let authority = state
            .root(&trust_domain, SystemTime::now())
            .context("there is no CA")?;
        let authority = Arc::new(authority);
        if let Some(path) = root_cert_out
            && let Err(error) = publish(&path, authority.certificate_pem())
        {
            // What runs already trusts the root it has; serving it matters more.
            tracing::error!(path = %path.display(), %error, "cannot write the root certificate");
        }
        let metrics = Metrics::new();
        let journal_path = state.path().join(JOURNAL);
        let journal = Journal::start(&journal_path)
            .context("cannot start the writer of the issuance record")?;
        let own = OwnCertificate::new(authority.clone(), &trust_domain)
            .context("cannot make the controller's own certificate")?;
        let issuer = CertificateService::new(authority, journal, metrics.clone());

        let jwt = JwtConfig {
            issuer: token_issuer,
            audience,
            jwks: token_jwks,
            trust_domain,
        };
        let trust_domain = jwt.trust_domain.as_str().into();
        let authenticator: Arc<dyn Authenticator> =
            Arc::new(JwtAuthenticator::new(jwt).context("cannot use --token-jwks")?);

        let source = DirectorySource::start(&source_dir)
            .with_context(|| format!("cannot use --source-dir `{}`", source_dir.display()))?;
        let settings = Settings {
            cluster: cluster.into(),
            trust_domain,
            network: network.into(),
        };
        let discovery = Discovery::new(Model::new(settings));
        metrics.observe(&discovery);
        Ok(Self {
            grpc: bind(listen, "--listen").await?,
            http: bind(http, "--http").await?,
            source,
            discovery,
            health: Arc::default(),
            authenticate: AuthenticateLayer::new(authenticator, metrics.clone()),
            metrics,
            own,
            issuer,
            _state: state,
        })
    }

    /// Where gRPC is served.
    pub fn grpc_address(&self) -> std::io::Result<SocketAddr> {
        self.grpc.local_addr()
    }

    pub fn http_address(&self) -> std::io::Result<SocketAddr> {
        self.http.local_addr()
    }

    /// Serves until `stop`.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let Self {
            grpc,
            http,
            source,
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
        let pages = Pages {
            metrics: metrics.clone(),
            discovery: discovery.clone(),
            health: health.clone(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(http::serve(http, pages));
        tasks.spawn(feed::run(
            source,
            discovery.clone(),
            health.clone(),
            metrics,
        ));
        tasks.spawn(async move { own.keep_fresh().await });

        tokio::select! {
            () = health.synced() => {}
            () = stop.cancelled() => return Ok(()),
            Some(ended) = tasks.join_next() => anyhow::bail!("a part ended by itself: {ended:?}"),
        }
        let config = server_config_with(store, &[ALPN_GRPC], ClientAuth::None);
        let served = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(STREAMS_PER_CONNECTION)
            .layer(authenticate)
            .add_service(discovery.service())
            .add_service(issuer.into_server())
            .serve_with_incoming_shutdown(accept_tls(grpc, config), stop.clone().cancelled_owned());
        let mut served = std::pin::pin!(served);
        tokio::select! {
            ended = &mut served => return ended.context("gRPC ended by itself"),
            () = stop.cancelled() => {}
            Some(ended) = tasks.join_next() => anyhow::bail!("a part ended by itself: {ended:?}"),
        }
        tracing::info!("stopping");
        health.stop();
        discovery.stop();
        match tokio::time::timeout(DRAIN, served).await {
            Ok(ended) => ended.context("gRPC did not end well")?,
            Err(_) => tracing::warn!("calls were still in flight after {DRAIN:?}"),
        }
        Ok(())
    }
}

async fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| format!("cannot listen on {flag} {address}"))
}
