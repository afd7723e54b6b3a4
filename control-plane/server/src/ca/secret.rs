//! The root in a Secret: made by the first controller that starts, read by all that follow, never
//! written again.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use k8s_openapi::{
    ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Api, Client, api::PostParams};
use tokio::time::{Instant, sleep};
use turnpike_certs::{Authority, AuthorityError, ROOT_LIFETIME};
use zeroize::Zeroizing;

const KEY: &str = "root-key.pem";
const CERTIFICATE: &str = "root.pem";
/// How long the API server is waited for at the start; after that the process ends, and is
/// started again by who runs it.
const PATIENCE: Duration = Duration::from_secs(45);
const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("Secret {place} cannot be {done}: {why}")]
    Api {
        place: String,
        done: &'static str,
        why: String,
    },
    #[error("Secret {place} has no `{field}`; {RESTORE}")]
    Missing { place: String, field: &'static str },
    #[error("Secret {place} is not a root: {source}; {RESTORE}")]
    Corrupt {
        place: String,
        source: AuthorityError,
    },
    #[error("cannot make a root: {0}")]
    Generate(AuthorityError),
}

const RESTORE: &str = "restore it from a backup (deleting it makes a new root at the next start, \
                       which no running proxy trusts)";

/// The Secret, and the way to it.
pub struct RootSecret {
    api: Api<Secret>,
    namespace: String,
    name: String,
}

impl std::fmt::Debug for RootSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RootSecret").finish_non_exhaustive()
    }
}

impl RootSecret {
    pub fn new(client: Client, namespace: &str, name: &str) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    /// The root as it is in the Secret, or a new one where there is none. Waits for an API server
    /// that is away or refuses, for it may be coming up with us; a damaged root ends it at once.
    pub async fn root(
        &self,
        trust_domain: &str,
        now: SystemTime,
    ) -> Result<Authority, SecretError> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.read_or_create(trust_domain, now).await {
                Err(error @ SecretError::Api { .. }) if Instant::now() < end => {
                    tracing::warn!("waiting for the root: {error}");
                    sleep(RETRY.mul_f64(0.5 + fastrand::f64())).await;
                }
                settled => return settled,
            }
        }
    }

    /// Of several controllers that start at once one creates it; the others find it there.
    async fn read_or_create(
        &self,
        trust_domain: &str,
        now: SystemTime,
    ) -> Result<Authority, SecretError> {
        if let Some(found) = self.read().await? {
            return Ok(found);
        }
        let authority =
            Authority::generate(trust_domain, ROOT_LIFETIME, now).map_err(SecretError::Generate)?;
        match self
            .api
            .create(&PostParams::default(), &self.secret(&authority))
            .await
        {
            Ok(_) => {
                let place = self.place();
                tracing::info!("made a new root for the mesh in Secret {place}; back it up");
                Ok(authority)
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                let found = self.read().await?;
                found.ok_or_else(|| self.failed("read", "it has just been deleted".to_owned()))
            }
            Err(error) => Err(self.refused("created", "create on secrets", &error)),
        }
    }

    async fn read(&self) -> Result<Option<Authority>, SecretError> {
        let found = self.api.get_opt(&self.name).await;
        let found = found.map_err(|error| self.refused("read", "get on that secret", &error))?;
        let Some(secret) = found else {
            return Ok(None);
        };
        let data = secret.data.unwrap_or_default();
        let field = |field: &'static str| {
            let place = || self.place();
            let value = data.get(field).ok_or_else(|| SecretError::Missing {
                place: place(),
                field,
            })?;
            let text = String::from_utf8_lossy(&value.0).into_owned();
            Ok::<_, SecretError>(Zeroizing::new(text))
        };
        let authority = Authority::from_pem(&field(CERTIFICATE)?, &field(KEY)?);
        let authority = authority.map_err(|source| SecretError::Corrupt {
            place: self.place(),
            source,
        })?;
        Ok(Some(authority))
    }

    /// Immutable, so that nobody overwrites it by accident.
    fn secret(&self, authority: &Authority) -> Secret {
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        let labels = [("app.kubernetes.io/managed-by", "turnpike-controller")];
        Secret {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                namespace: Some(self.namespace.clone()),
                labels: Some(labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into()),
                ..ObjectMeta::default()
            },
            immutable: Some(true),
            data: Some(BTreeMap::from([
                (KEY.to_owned(), bytes(&authority.key_pem())),
                (CERTIFICATE.to_owned(), bytes(authority.certificate_pem())),
            ])),
            type_: Some("Opaque".to_owned()),
            ..Secret::default()
        }
    }

    fn refused(&self, done: &'static str, verb: &str, error: &kube::Error) -> SecretError {
        let why = match error {
            kube::Error::Api(status) if status.code == 403 => {
                format!(
                    "{}; grant verb {verb} in a Role of {}",
                    status.message, self.namespace
                )
            }
            kube::Error::Api(status) if status.code == 404 => {
                format!("{}; does the namespace exist?", status.message)
            }
            error => error.to_string(),
        };
        self.failed(done, why)
    }

    fn failed(&self, done: &'static str, why: String) -> SecretError {
        let place = self.place();
        SecretError::Api { place, done, why }
    }

    fn place(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}
