//! Service-account tokens as a Kubernetes API server issues them: signed, bound to a pod and a
//! node, for one audience.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use time::OffsetDateTime;

pub const ISSUER: &str = "https://kubernetes.box";
pub const AUDIENCE: &str = "istio-ca";

/// Who a token speaks for.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    pub namespace: &'a str,
    pub service_account: &'a str,
    /// Name and UID.
    pub pod: Option<(&'a str, &'a str)>,
    pub node: Option<&'a str>,
}

/// Signs tokens with a key of its own; [`Issuer::publish`] gives the controller the public half.
pub struct Issuer {
    key: EncodingKey,
    public: Vec<u8>,
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuer").finish_non_exhaustive()
    }
}

impl Issuer {
    const KEY_ID: &'static str = "box";

    pub fn new() -> Result<Self> {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let key = EncodingKey::from_ec_der(&pair.serialize_der());
        Ok(Self {
            key,
            public: pair.public_key_raw().to_vec(),
        })
    }

    /// Writes the public key as a JWKS.
    pub fn publish(&self, path: &Path) -> Result<()> {
        // SEC 1 §2.3.3: 4, then both coordinates of 32 bytes.
        let coordinates = self
            .public
            .get(1..65)
            .context("a P-256 point has 65 bytes")?;
        let (x, y) = coordinates.split_at(32);
        let keys = json!({"keys": [{
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": Self::KEY_ID,
            "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
        }]});
        std::fs::write(path, keys.to_string()).with_context(|| path.display().to_string())
    }

    pub fn token(&self, subject: &Subject<'_>, lifetime: Duration) -> Result<String> {
        self.sign(&claims(subject, lifetime))
    }

    /// Signs any claims: for tests that need a wrong one.
    pub fn sign(&self, claims: &Value) -> Result<String> {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(Self::KEY_ID.to_owned());
        Ok(jsonwebtoken::encode(&header, claims, &self.key)?)
    }
}

/// The claims of a bound service-account token.
/// Source: Kubernetes, "Managing Service Accounts", schema for service account private claims.
pub fn claims(subject: &Subject<'_>, lifetime: Duration) -> Value {
    let Subject {
        namespace,
        service_account,
        pod,
        node,
    } = subject;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let mut bound = json!({
        "namespace": namespace,
        "serviceaccount": {"name": service_account, "uid": format!("sa-{namespace}-{service_account}")},
    });
    if let Some((name, uid)) = pod {
        bound["pod"] = json!({"name": name, "uid": uid});
    }
    if let Some(node) = node {
        bound["node"] = json!({"name": node, "uid": format!("node-{node}")});
    }
    json!({
        "iss": ISSUER,
        "aud": [AUDIENCE],
        "sub": format!("system:serviceaccount:{namespace}:{service_account}"),
        "iat": now, "nbf": now, "exp": now + lifetime.as_secs() as i64,
        "kubernetes.io": bound,
    })
}
