//! The injector's settings: as a file says them, checked.

use std::collections::BTreeSet;

use serde::Deserialize;

/// What sidecars are told, the same for all pods.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct InjectConfig {
    pub image: String,
    /// Always, IfNotPresent or Never. `None`: what Kubernetes makes of the image's tag.
    pub image_pull_policy: Option<String>,
    /// `host:port`.
    pub controller: String,
    /// The DNS name in the controller's certificate.
    pub controller_name: String,
    pub cluster: String,
    pub network: String,
    pub trust_domain: String,
    /// The ConfigMap with `root.pem`, in every namespace.
    pub root_config_map: String,
    pub token_audience: String,
    /// Kubelet renews the token at four fifths of this.
    pub token_expiration_seconds: i64,
    pub otlp_endpoint: Option<String>,
    /// Threads of the proxy. `None`: it decides by its CPU limit.
    pub workers: Option<u32>,
    /// Quantities, as Kubernetes writes them.
    pub cpu_request: String,
    /// `None`: no limit.
    pub cpu_limit: Option<String>,
    pub memory_request: String,
    pub memory_limit: String,
    pub exempt_namespaces: Vec<String>,
}

impl Default for InjectConfig {
    fn default() -> Self {
        Self {
            image: "turnpike/proxy:latest".to_owned(),
            image_pull_policy: None,
            controller: "turnpike-controller.turnpike-system.svc:15012".to_owned(),
            controller_name: "turnpike-controller.turnpike-system.svc".to_owned(),
            cluster: "cluster".to_owned(),
            network: "default".to_owned(),
            trust_domain: "cluster.local".to_owned(),
            root_config_map: "turnpike-root".to_owned(),
            token_audience: "istio-ca".to_owned(),
            token_expiration_seconds: 3600,
            otlp_endpoint: None,
            workers: None,
            cpu_request: "20m".to_owned(),
            cpu_limit: None,
            memory_request: "32Mi".to_owned(),
            memory_limit: "256Mi".to_owned(),
            exempt_namespaces: vec!["kube-system".to_owned(), "turnpike-system".to_owned()],
        }
    }
}

/// Why a file of settings cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// With line and column.
    #[error("{0}")]
    Syntax(String),
    #[error("`{field}` is refused: {allowed}")]
    Value {
        field: &'static str,
        allowed: &'static str,
    },
}

impl InjectConfig {
    /// Reads YAML. What is left out is as by default, what is unknown is refused: a misspelt
    /// setting would reach every pod as its default.
    pub fn parse(text: &str) -> Result<Self, InvalidConfig> {
        let config: Self = serde_saphyr::from_str(text)
            .map_err(|error| InvalidConfig::Syntax(error.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// What the API server would refuse in each pod, or no sidecar could start with.
    fn check(&self) -> Result<(), InvalidConfig> {
        let Self {
            image,
            image_pull_policy,
            controller,
            controller_name,
            cluster,
            network,
            trust_domain,
            root_config_map,
            token_audience,
            token_expiration_seconds,
            otlp_endpoint,
            workers,
            cpu_request,
            cpu_limit,
            memory_request,
            memory_limit,
            exempt_namespaces,
        } = self;
        let refuse = |field, allowed| Err(InvalidConfig::Value { field, allowed });
        for (field, text) in [
            ("image", image),
            ("controllerName", controller_name),
            ("cluster", cluster),
            ("network", network),
            ("trustDomain", trust_domain),
            ("rootConfigMap", root_config_map),
            ("tokenAudience", token_audience),
        ] {
            if text.is_empty() || text.contains(char::is_whitespace) {
                return refuse(field, "it needs a text without spaces");
            }
        }
        let port = controller.rsplit_once(':').map(|(_, port)| port);
        if port.and_then(|port| port.parse::<u16>().ok()).is_none() {
            return refuse("controller", "allowed is HOST:PORT");
        }
        let policy = image_pull_policy.as_deref().unwrap_or("Always");
        if !["Always", "IfNotPresent", "Never"].contains(&policy) {
            return refuse(
                "imagePullPolicy",
                "allowed are Always, IfNotPresent and Never",
            );
        }
        // Each proxy would refuse it, in a log that nobody reads until traces are missed.
        let endpoint = otlp_endpoint.as_deref().unwrap_or("http://");
        if !endpoint.starts_with("http://") {
            return refuse(
                "otlpEndpoint",
                "allowed is http://HOST:PORT, OTLP over gRPC without TLS",
            );
        }
        if *token_expiration_seconds < 600 {
            return refuse("tokenExpirationSeconds", "Kubernetes allows 600 or more");
        }
        if *workers == Some(0) {
            return refuse(
                "workers",
                "allowed are 1 or more; leave it out to let the proxy decide",
            );
        }
        let cpu_limit = cpu_limit.iter().map(|limit| ("cpuLimit", limit));
        for (field, text) in cpu_limit.chain([
            ("cpuRequest", cpu_request),
            ("memoryRequest", memory_request),
            ("memoryLimit", memory_limit),
        ]) {
            if !is_quantity(text) {
                return refuse(field, "allowed are quantities such as 20m, 1, 64Mi or 1Gi");
            }
        }
        let exempt: BTreeSet<&str> = exempt_namespaces.iter().map(String::as_str).collect();
        if !exempt.contains("turnpike-system") {
            return refuse(
                "exemptNamespaces",
                "turnpike-system must be in it: the controller cannot wait for its own sidecar",
            );
        }
        Ok(())
    }
}

/// A number and a suffix, as Kubernetes reads them.
fn is_quantity(text: &str) -> bool {
    const SUFFIXES: [&str; 14] = [
        "", "n", "u", "m", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei",
    ];
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, suffix) = text.split_at(end.unwrap_or(text.len()));
    number.parse::<f64>().is_ok_and(f64::is_finite) && SUFFIXES.contains(&suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_as_by_default() {
        let config = InjectConfig::parse("image: r.example/proxy:1\nmemoryLimit: 1Gi\n").unwrap();
        let expected = InjectConfig {
            image: "r.example/proxy:1".into(),
            memory_limit: "1Gi".into(),
            ..InjectConfig::default()
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn what_no_sidecar_could_start_with_is_refused() {
        for (text, expected) in [
            ("imag: x", "unknown field `imag`"),
            ("image: ''", "`image` is refused"),
            ("image: a b", "`image` is refused"),
            ("imagePullPolicy: Often", "`imagePullPolicy` is refused"),
            (
                "otlpEndpoint: https://collector:4317",
                "`otlpEndpoint` is refused",
            ),
            ("controller: host", "`controller` is refused"),
            (
                "tokenExpirationSeconds: 60",
                "`tokenExpirationSeconds` is refused",
            ),
            ("cpuRequest: much", "`cpuRequest` is refused"),
            ("cpuLimit: ''", "`cpuLimit` is refused"),
            ("memoryLimit: 1Gb", "`memoryLimit` is refused"),
            ("memoryLimit: .", "`memoryLimit` is refused"),
            ("workers: 0", "`workers` is refused"),
            ("workers: some", "workers"),
            ("exemptNamespaces: []", "`exemptNamespaces` is refused"),
            ("image: [", ""),
        ] {
            let error = InjectConfig::parse(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        for quantity in ["20m", "1", "0.5", "64Mi", "1Gi", "100M"] {
            assert!(is_quantity(quantity), "{quantity}");
        }
    }
}
