//! The way to the API server.

use std::time::Duration;

use kube::{Client, Config};

const CONNECT: Duration = Duration::from_secs(5);
/// Without a byte. A watch ends earlier by itself ([`super::kinds`]), so this cuts only what hangs.
const SILENCE: Duration = Duration::from_secs(45);
const WRITE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no Kubernetes API is configured: {0}; in a pod mount its service account's token \
         (automountServiceAccountToken), elsewhere set KUBECONFIG"
    )]
    Config(#[from] kube::config::InferConfigError),
    #[error("the configuration of the Kubernetes API cannot be used: {0}")]
    Client(#[from] kube::Error),
}

/// From KUBECONFIG, or as a pod in the cluster. With the server's URL, for messages. Nothing is
/// sent yet.
pub async fn connect() -> Result<(Client, String), ClientError> {
    let mut config = Config::infer().await?;
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(SILENCE);
    config.write_timeout = Some(WRITE);
    // Each caller has its own pauses, bounds and words for what goes on.
    config.default_retry = false;
    let server = config.cluster_url.to_string();
    let server = server.trim_end_matches('/').to_owned();
    Ok((Client::try_from(config)?, server))
}
