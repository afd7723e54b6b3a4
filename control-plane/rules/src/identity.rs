//! Workload identities: `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`.

use std::{fmt, str::FromStr};

/// A workload's identity, as Istio and Linkerd write it in a certificate's URI SAN.
///
/// Each part is a DNS label (the trust domain: a DNS name), so the text form is canonical and two
/// identities are equal exactly when their URIs are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    trust_domain: String,
    namespace: String,
    service_account: String,
}

/// Why a text is not a workload identity.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
pub struct InvalidIdentity(String);

impl Identity {
    pub fn new(
        trust_domain: impl Into<String>,
        namespace: impl Into<String>,
        service_account: impl Into<String>,
    ) -> Result<Self, InvalidIdentity> {
        let identity = Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        };
        let valid = is_dns_name(&identity.trust_domain)
            && is_dns_name(&identity.namespace)
            && is_dns_name(&identity.service_account);
        if valid {
            Ok(identity)
        } else {
            Err(InvalidIdentity(identity.to_string()))
        }
    }

    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trust_domain,
            namespace,
            service_account,
        } = self;
        write!(
            f,
            "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"
        )
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidIdentity(text.chars().take(256).collect());
        let rest = text.strip_prefix("spiffe://").ok_or_else(invalid)?;
        let mut parts = rest.split('/');
        match (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) {
            (Some(trust_domain), Some("ns"), Some(namespace), Some("sa"), Some(account), None) => {
                Self::new(trust_domain, namespace, account).map_err(|_| invalid())
            }
            _ => Err(invalid()),
        }
    }
}

/// RFC 1123 subdomain, lower case: what Kubernetes accepts for all three parts.
fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        let text = "spiffe://cluster.local/ns/shop/sa/web";
        let identity: Identity = text.parse().unwrap();
        assert_eq!(identity.namespace(), "shop");
        assert_eq!(identity.to_string(), text);
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/ns/a/b/c",
            "SPIFFE://td/ns/a/sa/b",
            "spiffe://td/ns/a\0/sa/b",
            "spiffe://td/ns/A/sa/b",
            "spiffe://td:1/ns/a/sa/b",
        ] {
            assert!(
                text.parse::<Identity>().is_err(),
                "{text:?} must not be an identity"
            );
        }
    }
}
