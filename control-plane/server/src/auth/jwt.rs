//! Service-account tokens, verified with the issuer's public keys from a JWKS file.

use std::{
    fs, io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{
    Algorithm, DecodingKey, Validation, decode, decode_header,
    errors::ErrorKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet},
};
use parking_lot::Mutex;
use serde::Deserialize;
use turnpike_discovery::{Caller, PodRef};
use turnpike_rules::Identity;

use super::{AuthError, Authenticator};

/// How far the issuer's clock and ours may be apart.
const LEEWAY: Duration = Duration::from_secs(60);
/// A token longer than this is refused unread; Kubernetes' have about 1,200 bytes.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
const MAX_JWKS_BYTES: u64 = 1 << 20;

#[derive(Clone, Debug)]
pub struct JwtConfig {
    pub issuer: String,
    pub audience: String,
    /// Read again whenever it changes. While it cannot be read, no token is accepted.
    pub jwks: PathBuf,
    pub trust_domain: String,
}

/// Verifies tokens by themselves, without asking anybody.
#[derive(Debug)]
pub struct JwtAuthenticator {
    config: JwtConfig,
    keys: Mutex<Option<Loaded>>,
}

#[derive(Debug)]
struct Loaded {
    /// Of the file that the keys are from.
    stamp: Stamp,
    keys: Arc<JwkSet>,
}

type Stamp = (Option<SystemTime>, u64, u64);

impl JwtAuthenticator {
    /// Reads the keys once, so that a wrong file is found at the start.
    pub fn new(config: JwtConfig) -> Result<Self, AuthError> {
        let authenticator = Self {
            config,
            keys: Mutex::new(None),
        };
        authenticator.keys()?;
        Ok(authenticator)
    }

    fn keys(&self) -> Result<Arc<JwkSet>, AuthError> {
        let mut loaded = self.keys.lock();
        let current = self.stamp();
        if let (Some(known), Ok(stamp)) = (&*loaded, &current)
            && known.stamp == *stamp
        {
            return Ok(known.keys.clone());
        }
        *loaded = None;
        let path = self.config.jwks.display();
        let unavailable = |reason: String| AuthError::Unavailable(format!("`{path}`: {reason}"));
        let stamp = current.map_err(|error| unavailable(error.to_string()))?;
        if stamp.1 > MAX_JWKS_BYTES {
            return Err(unavailable(format!(
                "{} bytes are too many for a JWKS",
                stamp.1
            )));
        }
        let text = fs::read(&self.config.jwks).map_err(|error| unavailable(error.to_string()))?;
        let keys: JwkSet = serde_json::from_slice(&text)
            .map_err(|error| unavailable(format!("not a JWKS: {error}")))?;
        let keys = Arc::new(keys);
        *loaded = Some(Loaded {
            stamp,
            keys: keys.clone(),
        });
        Ok(keys)
    }

    fn stamp(&self) -> io::Result<Stamp> {
        use std::os::unix::fs::MetadataExt;
        let metadata = fs::metadata(&self.config.jwks)?;
        Ok((metadata.modified().ok(), metadata.len(), metadata.ino()))
    }

    fn verify(&self, token: &str, now: SystemTime) -> Result<Claims, AuthError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(AuthError::Malformed(format!(
                "{} bytes are too many",
                token.len()
            )));
        }
        let header =
            decode_header(token).map_err(|error| AuthError::Malformed(error.to_string()))?;
        let kid = header.kid.unwrap_or_default();
        let keys = self.keys()?;
        let key = keys.find(&kid);
        let key = key.ok_or_else(|| AuthError::UnknownKey(kid.chars().take(64).collect()))?;
        // The key says with which algorithm it is used; what the token says does not count.
        let algorithm = algorithm(key).filter(|algorithm| *algorithm == header.alg);
        let algorithm = algorithm.ok_or(AuthError::Signature)?;
        let decoding = DecodingKey::from_jwk(key)
            .map_err(|error| AuthError::Unavailable(error.to_string()))?;
        let mut validation = Validation::new(algorithm);
        validation.set_audience(&[&self.config.audience]);
        validation.set_issuer(&[&self.config.issuer]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        // The times are checked below, against the clock that the caller of this function has.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        let claims = decode::<Claims>(token, &decoding, &validation)
            .map_err(|error| self.refusal(error.kind()))?
            .claims;
        claims.check_time(now)?;
        Ok(claims)
    }

    fn refusal(&self, kind: &ErrorKind) -> AuthError {
        match kind {
            ErrorKind::InvalidSignature => AuthError::Signature,
            ErrorKind::InvalidIssuer => AuthError::Issuer(self.config.issuer.clone()),
            ErrorKind::InvalidAudience => AuthError::Audience(self.config.audience.clone()),
            ErrorKind::MissingRequiredClaim(claim) => {
                AuthError::Claims(format!("`{claim}` is missing"))
            }
            ErrorKind::Json(error) => AuthError::Claims(error.to_string()),
            other => AuthError::Malformed(format!("{other:?}").chars().take(128).collect()),
        }
    }

    fn caller(&self, claims: Claims) -> Result<Caller, AuthError> {
        let Claims {
            sub,
            exp,
            kubernetes,
            ..
        } = claims;
        let Kubernetes {
            namespace,
            serviceaccount,
            pod,
            node,
        } = kubernetes;
        let expected = format!("system:serviceaccount:{namespace}:{}", serviceaccount.name);
        if sub != expected {
            return Err(AuthError::Claims(
                "`sub` and `kubernetes.io` name different service accounts".into(),
            ));
        }
        let identity = Identity::new(&self.config.trust_domain, namespace, serviceaccount.name)
            .map_err(|error| AuthError::Claims(error.to_string()))?;
        let bound = |reference: Bound| {
            let Bound { name, uid } = reference;
            let uid = uid.filter(|uid| !uid.is_empty());
            uid.map(|uid| PodRef {
                name: name.into(),
                uid: uid.into(),
            })
        };
        let expires = UNIX_EPOCH
            .checked_add(Duration::from_secs(exp))
            .and_then(|at| at.checked_add(LEEWAY))
            .ok_or_else(|| AuthError::Claims("`exp` is beyond all time".into()))?;
        Ok(Caller {
            identity,
            pod: pod.and_then(bound),
            node: node.map(|node| node.name.into()),
            expires: Some(expires),
        })
    }
}

#[tonic::async_trait]
impl Authenticator for JwtAuthenticator {
    async fn authenticate(&self, token: &str, now: SystemTime) -> Result<Caller, AuthError> {
        self.verify(token, now)
            .and_then(|claims| self.caller(claims))
    }
}

/// `None`: a kind of key that no service-account issuer uses, a secret above all.
fn algorithm(key: &Jwk) -> Option<Algorithm> {
    match &key.algorithm {
        AlgorithmParameters::RSA(_) => Some(Algorithm::RS256),
        AlgorithmParameters::EllipticCurve(curve) if curve.curve == EllipticCurve::P256 => {
            Some(Algorithm::ES256)
        }
        _ => None,
    }
}

/// As Kubernetes writes them.
/// Source: <https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/>.
#[derive(Debug, Deserialize)]
struct Claims {
    sub: String,
    exp: u64,
    #[serde(default)]
    nbf: Option<u64>,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Kubernetes,
}

#[derive(Debug, Deserialize)]
struct Kubernetes {
    namespace: String,
    serviceaccount: Bound,
    #[serde(default)]
    pod: Option<Bound>,
    #[serde(default)]
    node: Option<Bound>,
}

#[derive(Debug, Deserialize)]
struct Bound {
    name: String,
    #[serde(default)]
    uid: Option<String>,
}

impl Claims {
    fn check_time(&self, now: SystemTime) -> Result<(), AuthError> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let leeway = LEEWAY.as_secs();
        if now >= self.exp.saturating_add(leeway) {
            return Err(AuthError::Expired);
        }
        if self.nbf.is_some_and(|nbf| nbf > now.saturating_add(leeway)) {
            return Err(AuthError::NotYet);
        }
        Ok(())
    }
}
