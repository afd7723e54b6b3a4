//! What is typed on the command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::Parser;

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
    /// Folder of YAML with the objects to serve; watched.
    #[arg(long, env = "TURNPIKE_SOURCE_DIR")]
    pub source_dir: PathBuf,
    /// Discovery and CA, gRPC over TLS.
    #[arg(long, env = "TURNPIKE_LISTEN", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// Metrics, health and, for callers on the same host, /debug.
    #[arg(long, env = "TURNPIKE_HTTP", default_value = "0.0.0.0:15014")]
    pub http: SocketAddr,
    /// The root's private key, and the record of what was issued.
    #[arg(long, env = "TURNPIKE_STATE_DIR")]
    pub state_dir: PathBuf,
    /// Where the public root certificate is written for others to trust.
    #[arg(long, env = "TURNPIKE_ROOT_CERT_OUT")]
    pub root_cert_out: Option<PathBuf>,
    /// Who issues the service-account tokens.
    #[arg(long, env = "TURNPIKE_TOKEN_ISSUER")]
    pub token_issuer: String,
    /// The issuer's public keys.
    #[arg(long, env = "TURNPIKE_TOKEN_JWKS")]
    pub token_jwks: PathBuf,
    /// The audience that tokens must be meant for.
    #[arg(long, env = "TURNPIKE_AUDIENCE", default_value = "istio-ca")]
    pub audience: String,
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
