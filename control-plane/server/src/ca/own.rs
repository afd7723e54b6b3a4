//! The controller's own server certificate, from its own CA.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use turnpike_certs::{
    Authority, CredentialStore, InvalidBundle, InvalidCredentials, KeyRequest, LEAF_LIFETIME,
    RequestError, SignError, TrustBundle, renew_at,
};
use turnpike_rules::{Identity, identity::InvalidIdentity};

/// The name under which clients dial it.
pub const DNS_NAME: &str = "turnpike-controller.turnpike-system.svc";
const RETRY: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    #[error(transparent)]
    Identity(#[from] InvalidIdentity),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Sign(#[from] SignError),
    #[error(transparent)]
    Roots(#[from] InvalidBundle),
    #[error(transparent)]
    Credentials(#[from] InvalidCredentials),
}

/// The certificate in force, and what it takes to make the next.
#[derive(Debug)]
pub struct OwnCertificate {
    authority: Arc<Authority>,
    identity: Identity,
    store: Arc<CredentialStore>,
}

impl OwnCertificate {
    pub fn new(authority: Arc<Authority>, trust_domain: &str) -> Result<Self, OwnError> {
        let identity = Identity::new(trust_domain, "turnpike-system", "turnpike-controller")?;
        let own = Self {
            authority,
            identity,
            store: CredentialStore::empty(),
        };
        own.renew(SystemTime::now())?;
        Ok(own)
    }

    /// Read at each handshake.
    pub fn store(&self) -> Arc<CredentialStore> {
        self.store.clone()
    }

    /// Renews for as long as it is polled.
    pub async fn keep_fresh(&self) {
        loop {
            let now = SystemTime::now();
            let due = self.store.load().map_or(now, |current| {
                // One server: there is nobody to spread the renewals among.
                renew_at(current.not_before(), current.not_after(), 0.0)
            });
            tokio::time::sleep(due.duration_since(now).unwrap_or_default()).await;
            if let Err(error) = self.renew(SystemTime::now()) {
                tracing::error!(%error, "cannot renew the controller's own certificate");
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    fn renew(&self, now: SystemTime) -> Result<(), OwnError> {
        let request = KeyRequest::new(&self.identity)?;
        let issued = self.authority.sign_server(
            request.csr_pem(),
            &self.identity,
            &[DNS_NAME],
            LEAF_LIFETIME,
            now,
        )?;
        let roots = TrustBundle::from_pem(self.authority.certificate_pem().as_bytes())?;
        self.store
            .replace(request.into_credentials(&issued.chain, roots)?);
        tracing::info!(
            serial = issued.serial,
            "made the controller's own certificate"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use turnpike_certs::ROOT_LIFETIME;

    use super::*;

    #[test]
    fn a_renewal_takes_effect_where_the_first_one_did() {
        let now = SystemTime::now();
        let authority = Authority::generate("cluster.local", ROOT_LIFETIME, now).unwrap();
        let own = OwnCertificate::new(Arc::new(authority), "cluster.local").unwrap();
        let store = own.store();
        let first = store.load().unwrap();
        own.renew(now + LEAF_LIFETIME / 2).unwrap();
        let second = store.load().unwrap();
        assert_ne!(first.serial(), second.serial());
        assert!(second.not_after() > first.not_after());
    }
}
