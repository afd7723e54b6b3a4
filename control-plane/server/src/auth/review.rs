//! Service-account tokens, shown to the API server (TokenReview).
//!
//! The token's own words are believed in one direction only: a token that says of itself that it
//! has ended, or is for others, is refused without asking. Nothing but the API server's answer
//! accepts one.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::dangerous::insecure_decode_claims;
use k8s_openapi::{
    api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::{sync::Semaphore, time::timeout};
use turnpike_discovery::{Caller, PodRef};
use turnpike_rules::Identity;

use super::{AuthError, Authenticator};

/// A token longer than this is refused unread; Kubernetes' have about 1,200 bytes.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// How far the issuer's clock and ours may be apart; the API server judges by its own.
const LEEWAY: Duration = Duration::from_secs(60);
/// For how long an answer is remembered: a pod asks for its certificate and its streams in one go.
/// A token that is revoked meanwhile is accepted for as long.
const REMEMBERED: Duration = Duration::from_secs(30);
/// Answers remembered at most; past that those that have ended go, or else all.
const MOST_REMEMBERED: usize = 10_000;
/// Questions at once; further callers wait, for [`PATIENCE`] at most.
const AT_ONCE: usize = 32;
const PATIENCE: Duration = Duration::from_secs(5);
/// What the API server says of a pod's token.
/// Source: <https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/>.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Asks the API server about each token.
pub struct ReviewAuthenticator {
    api: Api<TokenReview>,
    audience: String,
    trust_domain: String,
    asking: Semaphore,
    remembered: Mutex<Remembered>,
}

impl std::fmt::Debug for ReviewAuthenticator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReviewAuthenticator")
            .finish_non_exhaustive()
    }
}

impl ReviewAuthenticator {
    pub fn new(client: Client, audience: String, trust_domain: String) -> Self {
        Self {
            api: Api::all(client),
            audience,
            trust_domain,
            asking: Semaphore::new(AT_ONCE),
            remembered: Mutex::default(),
        }
    }

    async fn ask(&self, token: &str) -> Result<TokenReviewStatus, AuthError> {
        let unavailable = |why: String| AuthError::Unavailable(why);
        let review = TokenReview {
            metadata: ObjectMeta::default(),
            spec: TokenReviewSpec {
                audiences: Some(vec![self.audience.clone()]),
                token: Some(token.to_owned()),
            },
            status: None,
        };
        let asked = async {
            let _permit = self.asking.acquire().await;
            self.api.create(&PostParams::default(), &review).await
        };
        match timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => answer
                .status
                .ok_or_else(|| unavailable("the API server gave no verdict".into())),
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => Err(unavailable(format!(
                "{}; grant verb create on tokenreviews of apiGroup authentication.k8s.io to the \
                 controller",
                status.message
            ))),
            Ok(Err(error)) => Err(unavailable(format!("the API server: {error}"))),
            Err(_) => Err(unavailable(format!(
                "the API server has not answered within {} s",
                PATIENCE.as_secs()
            ))),
        }
    }
}

#[tonic::async_trait]
impl Authenticator for ReviewAuthenticator {
    async fn authenticate(&self, token: &str, now: SystemTime) -> Result<Caller, AuthError> {
        let claims = Claims::read(token)?;
        claims.check(&self.audience, now)?;
        let digest: TokenDigest = Sha256::digest(token.as_bytes()).into();
        if let Some(caller) = self.remembered.lock().get(&digest, now) {
            return Ok(caller);
        }
        let status = self.ask(token).await?;
        let caller = judge(status, &claims, &self.audience, &self.trust_domain)?;
        let mut remembered = self.remembered.lock();
        remembered.put(digest, caller.clone(), now);
        Ok(caller)
    }
}

/// A caller from the API server's verdict.
fn judge(
    status: TokenReviewStatus,
    claims: &Claims,
    audience: &str,
    trust_domain: &str,
) -> Result<Caller, AuthError> {
    let TokenReviewStatus {
        audiences,
        authenticated,
        error,
        user,
    } = status;
    if authenticated != Some(true) {
        return Err(refusal(error.as_deref().unwrap_or_default(), audience));
    }
    // A server that knows nothing of audiences names none, and has not checked them.
    if !audiences.iter().flatten().any(|named| named == audience) {
        return Err(AuthError::Audience(audience.to_owned()));
    }
    let UserInfo {
        extra, username, ..
    } = user.unwrap_or_default();
    let username = username.unwrap_or_default();
    let account = username.strip_prefix("system:serviceaccount:");
    let (namespace, name) = account
        .and_then(|account| account.split_once(':'))
        .ok_or_else(|| {
            let name: String = username.chars().take(128).collect();
            AuthError::Claims(format!("it is `{name}`'s, who is none"))
        })?;
    let identity = Identity::new(trust_domain, namespace, name)
        .map_err(|error| AuthError::Claims(error.to_string()))?;
    let extra = extra.unwrap_or_default();
    let one = |key: &str| {
        let mut values = extra.get(key).into_iter().flatten();
        values.find(|value| !value.is_empty()).cloned()
    };
    let pod = one(POD_NAME).zip(one(POD_UID)).map(|(name, uid)| PodRef {
        name: name.into(),
        uid: uid.into(),
    });
    Ok(Caller {
        identity,
        pod,
        node: one(NODE_NAME).map(Into::into),
        expires: Some(claims.end()),
    })
}

/// By the words of the API server, which has no codes for it.
fn refusal(error: &str, audience: &str) -> AuthError {
    if error.contains("expired") {
        AuthError::Expired
    } else if error.contains("audience") {
        AuthError::Audience(audience.to_owned())
    } else {
        let error = error.trim();
        let text = if error.is_empty() {
            "it gives no reason"
        } else {
            error
        };
        AuthError::Refused(text.chars().take(256).collect())
    }
}

/// What a token says of itself, unverified.
#[derive(Debug, Deserialize)]
struct Claims {
    exp: u64,
    #[serde(default)]
    aud: Audiences,
}

#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
enum Audiences {
    #[default]
    None,
    One(String),
    Many(Vec<String>),
}

impl Claims {
    fn read(token: &str) -> Result<Self, AuthError> {
        if token.len() > MAX_TOKEN_BYTES {
            let text = format!("{} bytes are too many", token.len());
            return Err(AuthError::Malformed(text));
        }
        insecure_decode_claims(token).map_err(|error| {
            let text = format!("{error}; a projected service-account token has `exp` and `aud`");
            AuthError::Malformed(text.chars().take(256).collect())
        })
    }

    fn check(&self, audience: &str, now: SystemTime) -> Result<(), AuthError> {
        let meant = match &self.aud {
            Audiences::None => false,
            Audiences::One(one) => one == audience,
            Audiences::Many(many) => many.iter().any(|one| one == audience),
        };
        if !meant {
            return Err(AuthError::Audience(audience.to_owned()));
        }
        if now >= self.end() + LEEWAY {
            return Err(AuthError::Expired);
        }
        Ok(())
    }

    fn end(&self) -> SystemTime {
        // Year 9999: no clock goes far beyond.
        let seconds = self.exp.min(253_402_300_799);
        UNIX_EPOCH + Duration::from_secs(seconds)
    }
}

type TokenDigest = [u8; 32];

/// Callers by the digest of their token: who reads our memory finds no token here.
#[derive(Debug, Default)]
struct Remembered(HashMap<TokenDigest, (Caller, SystemTime)>);

impl Remembered {
    fn get(&self, digest: &TokenDigest, now: SystemTime) -> Option<Caller> {
        let (caller, until) = self.0.get(digest)?;
        (now < *until).then(|| caller.clone())
    }

    /// Never past the token's own end.
    fn put(&mut self, digest: TokenDigest, caller: Caller, now: SystemTime) {
        let end = caller.expires.unwrap_or(now);
        let until = end.min(now + REMEMBERED);
        if self.0.len() >= MOST_REMEMBERED {
            self.0.retain(|_, (_, until)| now < *until);
            if self.0.len() >= MOST_REMEMBERED {
                self.0.clear();
            }
        }
        self.0.insert(digest, (caller, until));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn claims(exp: u64, aud: &str) -> Claims {
        serde_json::from_str(&format!(r#"{{"exp": {exp}, "aud": {aud}}}"#)).unwrap()
    }

    fn verdict(audiences: &[&str], username: &str, extra: &[(&str, &str)]) -> TokenReviewStatus {
        let extra: BTreeMap<String, Vec<String>> = extra
            .iter()
            .map(|(key, value)| ((*key).to_owned(), vec![(*value).to_owned()]))
            .collect();
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(audiences.iter().map(|a| (*a).to_owned()).collect()),
            error: None,
            user: Some(UserInfo {
                username: Some(username.to_owned()),
                extra: Some(extra),
                ..UserInfo::default()
            }),
        }
    }

    fn judged(status: TokenReviewStatus) -> Result<Caller, AuthError> {
        judge(
            status,
            &claims(NOW, r#"["istio-ca"]"#),
            "istio-ca",
            "cluster.local",
        )
    }

    const WEB: &str = "system:serviceaccount:shop:web";

    #[test]
    fn a_pod_and_its_node_are_the_servers_words() {
        let extra = [(POD_NAME, "web-1"), (POD_UID, "u1"), (NODE_NAME, "node-a")];
        let caller = judged(verdict(&["istio-ca"], WEB, &extra)).unwrap();
        assert_eq!(
            caller.identity.to_string(),
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        let pod = caller.pod.unwrap();
        assert_eq!((&*pod.name, &*pod.uid), ("web-1", "u1"));
        assert_eq!(caller.node.as_deref(), Some("node-a"));
        assert_eq!(
            caller.expires,
            Some(at(NOW)),
            "with the token, not a moment later"
        );
        let unbound = judged(verdict(&["istio-ca"], WEB, &[(POD_NAME, "web-1")])).unwrap();
        assert_eq!((unbound.pod, unbound.node), (None, None));
    }

    #[test]
    fn what_the_server_does_not_vouch_for_is_refused() {
        let audience = || AuthError::Audience("istio-ca".into());
        assert_eq!(
            judged(verdict(&[], WEB, &[])),
            Err(audience()),
            "not checked"
        );
        assert_eq!(judged(verdict(&["other"], WEB, &[])), Err(audience()));
        for name in [
            "kubernetes-admin",
            "system:node:a",
            "system:serviceaccount:shop",
            "",
        ] {
            let refused = judged(verdict(&["istio-ca"], name, &[]));
            assert!(
                matches!(refused, Err(AuthError::Claims(_))),
                "{name}: {refused:?}"
            );
        }
        let not = |error: &str| {
            let mut status = verdict(&["istio-ca"], WEB, &[]);
            status.authenticated = None;
            status.error = Some(error.to_owned());
            judged(status).unwrap_err()
        };
        let expired = "[invalid bearer token, service account token has expired]";
        assert_eq!(not(expired), AuthError::Expired);
        let gone = "[invalid bearer token, Token has been invalidated]";
        assert_eq!(not(gone), AuthError::Refused(gone.into()));
    }

    #[test]
    fn a_token_is_never_accepted_by_its_own_words() {
        assert_eq!(
            claims(NOW, r#""istio-ca""#).check("istio-ca", at(NOW - 1)),
            Ok(())
        );
        let late = claims(NOW, r#"["a", "istio-ca"]"#).check("istio-ca", at(NOW + 61));
        assert_eq!(late, Err(AuthError::Expired));
        let foreign = claims(NOW, r#"["api"]"#).check("istio-ca", at(NOW - 1));
        assert_eq!(foreign, Err(AuthError::Audience("istio-ca".into())));
        for token in [
            "",
            "a.b",
            "a.b.c",
            "e30.e30.",
            &"x".repeat(MAX_TOKEN_BYTES + 1),
        ] {
            let refused = Claims::read(token);
            assert!(
                matches!(refused, Err(AuthError::Malformed(_))),
                "{token}: {refused:?}"
            );
        }
    }

    #[test]
    fn what_is_remembered_ends_with_the_token_and_is_bounded() {
        let caller = judged(verdict(&["istio-ca"], WEB, &[])).unwrap();
        let mut all = Remembered::default();
        let digest = |n: usize| {
            let mut digest = [0; 32];
            digest[..8].copy_from_slice(&n.to_be_bytes());
            digest
        };
        all.put(digest(0), caller.clone(), at(NOW - 5));
        assert!(all.get(&digest(0), at(NOW - 1)).is_some());
        assert!(
            all.get(&digest(0), at(NOW)).is_none(),
            "the token has ended"
        );
        all.put(digest(1), caller.clone(), at(NOW - 1000));
        assert!(all.get(&digest(1), at(NOW - 1000) + REMEMBERED).is_none());
        assert!(all.get(&digest(2), at(NOW - 1000)).is_none());
        for n in 0..2 * MOST_REMEMBERED {
            all.put(digest(n), caller.clone(), at(NOW - 500));
            assert!(all.0.len() <= MOST_REMEMBERED);
            assert!(all.get(&digest(n), at(NOW - 500)).is_some());
        }
    }
}
