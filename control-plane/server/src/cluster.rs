//! What a controller does in a cluster beside serving: it answers the injection webhook, and keeps
//! in the API what pods and the API server need to trust it.

use std::sync::Arc;

use anyhow::Context;
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use turnpike_certs::{Authority, ClientAuth, CredentialStore, server_config_with};
use turnpike_daemon::tasks::Tasks;
use turnpike_discovery::Discovery;
use turnpike_kubernetes::{
    Impairments,
    cluster::{ClusterSource, Stores},
    keep::{InjectorBundle, RootConfigMaps},
    notices::OutsiderNotices,
};

use crate::{
    config::WebhookConfig,
    controller::bind,
    feed::Health,
    metrics::Metrics,
    status::StatusWriter,
    webhook::{self, Injector, SettingsFile},
};

/// The ConfigMap with the mesh's root, in every namespace.
const ROOT_CONFIG_MAP: &str = "turnpike-root";
const ALPN: [&str; 2] = ["h2", "http/1.1"];

/// A cluster's part of the controller, with its port bound.
pub(crate) struct Cluster {
    client: Client,
    stores: Stores,
    roots: RootConfigMaps,
    webhook: Option<Webhook>,
}

#[derive(Debug)]
struct Webhook {
    listener: TcpListener,
    settings: SettingsFile,
    bundle: InjectorBundle,
    namespaces: Api<Namespace>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").finish_non_exhaustive()
    }
}

impl Cluster {
    pub(crate) async fn new(
        client: &Client,
        source: &ClusterSource,
        authority: &Authority,
        impairments: &Impairments,
        webhook: Option<WebhookConfig>,
    ) -> anyhow::Result<Self> {
        let stores = source.stores().clone();
        let roots = authority.certificate_pem().to_owned();
        let webhook = match webhook {
            Some(config) => Some(Webhook::new(client, &roots, impairments, config).await?),
            None => None,
        };
        Ok(Self {
            client: client.clone(),
            roots: RootConfigMaps {
                client: client.clone(),
                namespaces: stores.namespaces.clone(),
                impairments: impairments.clone(),
                name: ROOT_CONFIG_MAP.to_owned(),
                roots,
            },
            stores,
            webhook,
        })
    }

    /// Starts its tasks; they end with `tasks`. The webhook's ends a while after `stop`: then what is
    /// returned is cancelled.
    pub(crate) fn spawn(
        self,
        tasks: &mut Tasks,
        certificate: Arc<CredentialStore>,
        discovery: &Discovery,
        health: &Arc<Health>,
        metrics: &Metrics,
        stop: &CancellationToken,
    ) -> Option<CancellationToken> {
        let Self {
            client,
            stores,
            roots,
            webhook,
        } = self;
        tasks.spawn("the root in every namespace", roots.run());
        let statuses = StatusWriter {
            client: client.clone(),
            policies: stores.policies.clone(),
            discovery: discovery.clone(),
            applied: health.applied().clone(),
            impairments: health.impairments().clone(),
        };
        let synced = health.clone();
        tasks.spawn("statuses", async move {
            // Before, what a policy needs may yet come.
            synced.synced().await;
            statuses.run().await;
        });
        let Webhook {
            listener,
            settings,
            bundle,
            namespaces,
        } = webhook?;
        let injector = Injector {
            settings: settings.settings(),
            namespaces: stores.namespaces.clone(),
            api: namespaces,
            metrics: metrics.clone(),
        };
        let notices = OutsiderNotices {
            client: client.clone(),
            namespaces: stores.namespaces.clone(),
            outsiders: stores.outsiders.clone(),
            impairments: health.impairments().clone(),
            settings: settings.settings(),
        };
        tasks.spawn("notices to pods outside the mesh", notices.run());
        let tls = server_config_with(certificate, &ALPN, ClientAuth::None);
        tasks.spawn("the injector's settings", settings.follow());
        tasks.spawn("the webhook's caBundle", bundle.run());
        let ended = CancellationToken::new();
        let guard = ended.clone().drop_guard();
        let serving = webhook::serve(listener, tls, injector, stop.clone());
        tasks.spawn("the injector", async move {
            let _guard = guard;
            serving.await;
        });
        Some(ended)
    }
}

impl Webhook {
    async fn new(
        client: &Client,
        roots: &str,
        impairments: &Impairments,
        config: WebhookConfig,
    ) -> anyhow::Result<Self> {
        let WebhookConfig {
            listen,
            configuration,
            inject_config,
        } = config;
        let settings = SettingsFile::open(inject_config, impairments.clone())
            .context("cannot use --inject-config")?;
        Ok(Self {
            listener: bind(listen, "--webhook").await?,
            settings,
            bundle: InjectorBundle {
                client: client.clone(),
                impairments: impairments.clone(),
                name: configuration,
                roots: roots.to_owned(),
            },
            namespaces: Api::all(client.clone()),
        })
    }
}
