//! What is typed on the command line, and what of it is valid.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Parser, ValueEnum};

/// The namespace of the control plane. Its name is in the controller's certificate and in the
/// rights of agents and gates.
const NAMESPACE: &str = "turnpike-system";

/// The controller: discovery and the CA for one cluster.
#[derive(Clone, Debug, Parser)]
#[command(name = "turnpike-controller", version)]
pub struct Args {
    /// Name of the cluster, the first part of resource names.
    #[arg(long, env = "TURNPIKE_CLUSTER", default_value = "cluster", value_parser = label)]
    pub cluster: String,
    /// Network that pod addresses belong to.
    #[arg(long, env = "TURNPIKE_NETWORK", default_value = "default", value_parser = label)]
    pub network: String,
    /// Of every identity that is issued.
    #[arg(long, env = "TURNPIKE_TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Where the objects to serve come from.
    #[arg(long, env = "TURNPIKE_SOURCE", value_enum, default_value = "directory")]
    pub source: SourceKind,
    /// With --source directory: folder of YAML with the objects; watched.
    #[arg(long, env = "TURNPIKE_SOURCE_DIR")]
    pub source_dir: Option<PathBuf>,
    /// Discovery and CA, gRPC over TLS.
    #[arg(long, env = "TURNPIKE_LISTEN", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// Metrics, health and, for callers on the same host, /debug.
    #[arg(long, env = "TURNPIKE_HTTP", default_value = "0.0.0.0:15014")]
    pub http: SocketAddr,
    /// The record of what was issued and, without --root-secret, the root's private key.
    #[arg(long, env = "TURNPIKE_STATE_DIR")]
    pub state_dir: PathBuf,
    /// Where the public root certificate is written for others to trust.
    #[arg(long, env = "TURNPIKE_ROOT_CERT_OUT")]
    pub root_cert_out: Option<PathBuf>,
    /// How callers' service-account tokens are verified: with the issuer's keys from a file, or by
    /// the API server.
    #[arg(long, env = "TURNPIKE_TOKENS", value_enum, default_value = "jwks")]
    pub tokens: TokensKind,
    /// With --tokens jwks: who issues the tokens.
    #[arg(long, env = "TURNPIKE_TOKEN_ISSUER")]
    pub token_issuer: Option<String>,
    /// With --tokens jwks: the issuer's public keys.
    #[arg(long, env = "TURNPIKE_TOKEN_JWKS")]
    pub token_jwks: Option<PathBuf>,
    /// The audience that tokens must be meant for.
    #[arg(long, env = "TURNPIKE_AUDIENCE", default_value = "istio-ca")]
    pub audience: String,
    /// The control plane's own namespace.
    #[arg(long, env = "TURNPIKE_NAMESPACE", default_value = NAMESPACE)]
    pub namespace: String,
    /// With --source kubernetes: the Secret that keeps the root, made at the first start.
    #[arg(long, env = "TURNPIKE_ROOT_SECRET")]
    pub root_secret: Option<String>,
    /// With --source kubernetes: where the injector answers the API server, HTTPS.
    #[arg(long, env = "TURNPIKE_WEBHOOK")]
    pub webhook: Option<SocketAddr>,
    /// The MutatingWebhookConfiguration whose caBundle the controller keeps.
    #[arg(long, env = "TURNPIKE_WEBHOOK_CONFIGURATION")]
    pub webhook_configuration: Option<String>,
    /// The injector's settings, YAML; read again when they change.
    #[arg(long, env = "TURNPIKE_INJECT_CONFIG")]
    pub inject_config: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceKind {
    /// A folder of YAML.
    Directory,
    /// The Kubernetes API, as KUBECONFIG or the pod's service account leads to it.
    Kubernetes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TokensKind {
    /// The issuer's keys from a file.
    Jwks,
    /// TokenReview.
    Review,
}

/// Flags that fit together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) cluster: String,
    pub(crate) network: String,
    pub(crate) trust_domain: String,
    pub(crate) listen: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) state_dir: PathBuf,
    pub(crate) root_cert_out: Option<PathBuf>,
    pub(crate) audience: String,
    pub(crate) source: SourceConfig,
    pub(crate) tokens: TokensConfig,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SourceConfig {
    Directory(PathBuf),
    Kubernetes(KubernetesConfig),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KubernetesConfig {
    pub(crate) namespace: String,
    /// `None`: the root is in the state directory.
    pub(crate) root_secret: Option<String>,
    pub(crate) webhook: Option<WebhookConfig>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WebhookConfig {
    pub(crate) listen: SocketAddr,
    pub(crate) configuration: String,
    pub(crate) inject_config: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TokensConfig {
    Jwks { issuer: String, jwks: PathBuf },
    Review,
}

/// Flags that contradict each other, or miss each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidArgs {
    #[error("{flag} is needed with {with}")]
    Missing {
        flag: &'static str,
        with: &'static str,
    },
    #[error("{flag} has no meaning with {with}; leave one of the two out")]
    Contradiction {
        flag: &'static str,
        with: &'static str,
    },
    #[error(
        "--namespace `{0}` is refused: the controller's certificate and the rights of agents and \
         gates name {NAMESPACE}; install the control plane there"
    )]
    Namespace(String),
}

const DIRECTORY: &str = "--source directory";
const KUBERNETES: &str = "--source kubernetes";
const JWKS: &str = "--tokens jwks";
const REVIEW: &str = "--tokens review";

impl Args {
    pub(crate) fn valid(self) -> Result<Config, InvalidArgs> {
        let Self {
            cluster,
            network,
            trust_domain,
            source,
            source_dir,
            listen,
            http,
            state_dir,
            root_cert_out,
            tokens,
            token_issuer,
            token_jwks,
            audience,
            namespace,
            root_secret,
            webhook,
            webhook_configuration,
            inject_config,
        } = self;
        if namespace != NAMESPACE {
            return Err(InvalidArgs::Namespace(namespace));
        }
        let webhook = self::webhook(webhook, webhook_configuration, inject_config)?;
        let source = match source {
            SourceKind::Directory => {
                none(root_secret.as_ref(), "--root-secret", DIRECTORY)?;
                none(webhook.as_ref(), "--webhook", DIRECTORY)?;
                SourceConfig::Directory(some(source_dir, "--source-dir", DIRECTORY)?)
            }
            SourceKind::Kubernetes => {
                none(source_dir.as_ref(), "--source-dir", KUBERNETES)?;
                SourceConfig::Kubernetes(KubernetesConfig {
                    namespace,
                    root_secret,
                    webhook,
                })
            }
        };
        let tokens = match tokens {
            TokensKind::Jwks => TokensConfig::Jwks {
                issuer: some(token_issuer, "--token-issuer", JWKS)?,
                jwks: some(token_jwks, "--token-jwks", JWKS)?,
            },
            TokensKind::Review => {
                none(token_issuer.as_ref(), "--token-issuer", REVIEW)?;
                none(token_jwks.as_ref(), "--token-jwks", REVIEW)?;
                TokensConfig::Review
            }
        };
        Ok(Config {
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
        })
    }
}

fn webhook(
    listen: Option<SocketAddr>,
    configuration: Option<String>,
    inject_config: Option<PathBuf>,
) -> Result<Option<WebhookConfig>, InvalidArgs> {
    let Some(listen) = listen else {
        let missing = |flag: &'static str| InvalidArgs::Missing {
            flag: "--webhook",
            with: flag,
        };
        if configuration.is_some() {
            return Err(missing("--webhook-configuration"));
        }
        if inject_config.is_some() {
            return Err(missing("--inject-config"));
        }
        return Ok(None);
    };
    Ok(Some(WebhookConfig {
        listen,
        configuration: some(configuration, "--webhook-configuration", "--webhook")?,
        inject_config: some(inject_config, "--inject-config", "--webhook")?,
    }))
}

fn some<T>(value: Option<T>, flag: &'static str, with: &'static str) -> Result<T, InvalidArgs> {
    value.ok_or(InvalidArgs::Missing { flag, with })
}

fn none<T>(value: Option<&T>, flag: &'static str, with: &'static str) -> Result<(), InvalidArgs> {
    match value {
        Some(_) => Err(InvalidArgs::Contradiction { flag, with }),
        None => Ok(()),
    }
}

/// It stands between slashes and in server names.
fn label(text: &str) -> Result<String, String> {
    let valid = !text.is_empty()
        && text.len() <= 63
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    if valid {
        Ok(text.to_owned())
    } else {
        Err("allowed are lower case letters, digits and `-`, 63 at most".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid(flags: &str) -> Result<Config, String> {
        let command = ["turnpike-controller", "--state-dir", "/s"];
        let args = Args::try_parse_from(command.into_iter().chain(flags.split_whitespace()))
            .map_err(|error| error.to_string())?;
        args.valid().map_err(|error| error.to_string())
    }

    #[test]
    fn flags_that_fit_together() {
        let config = valid("--source-dir /d --token-issuer i --token-jwks /j").unwrap();
        assert_eq!(config.source, SourceConfig::Directory("/d".into()));
        let config = valid(
            "--source kubernetes --tokens review --root-secret ca --webhook 127.0.0.1:1 \
             --webhook-configuration w --inject-config /c",
        )
        .unwrap();
        assert_eq!(config.tokens, TokensConfig::Review);
        let SourceConfig::Kubernetes(KubernetesConfig { webhook, .. }) = config.source else {
            panic!()
        };
        assert_eq!(webhook.unwrap().configuration, "w");
    }

    #[test]
    fn contradictions_are_said_in_words() {
        for (flags, expected) in [
            ("", "--source-dir is needed with --source directory"),
            (
                "--source-dir /d",
                "--token-issuer is needed with --tokens jwks",
            ),
            (
                "--source kubernetes --source-dir /d",
                "--source-dir has no meaning with --source kubernetes; leave one of the two out",
            ),
            (
                "--source kubernetes --tokens review --token-jwks /j",
                "--token-jwks has no meaning with --tokens review; leave one of the two out",
            ),
            (
                "--source-dir /d --root-secret ca",
                "--root-secret has no meaning with --source directory; leave one of the two out",
            ),
            (
                "--source kubernetes --webhook 127.0.0.1:1",
                "--webhook-configuration is needed with --webhook",
            ),
            (
                "--source kubernetes --inject-config /c",
                "--webhook is needed with --inject-config",
            ),
        ] {
            assert_eq!(valid(flags).unwrap_err(), expected, "{flags}");
        }
        let elsewhere = valid("--source kubernetes --namespace mesh").unwrap_err();
        assert!(
            elsewhere.starts_with("--namespace `mesh` is refused"),
            "{elsewhere}"
        );
    }
}
