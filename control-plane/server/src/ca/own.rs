//! The controller's own server certificate, from its own CA.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::sleep;
use turnpike_certs::{
    Authority, CredentialStore, InvalidBundle, InvalidCredentials, KeyRequest, LEAF_LIFETIME,
    RequestError, SignError, TrustBundle, renew_at,
};
use turnpike_rules::{Identity, identity::InvalidIdentity};

/// The name under which clients dial it.
pub const DNS_NAME: &str = "turnpike-controller.turnpike-system.svc";
const RETRY: Duration = Duration::from_secs(30);
/// How often the clock is looked at.
const STEP: Duration = Duration::from_secs(10);

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

    /// Renews for as long as it is polled. In steps: a machine that was suspended, or whose clock was
    /// set, must not serve for hours what has ended.
    pub async fn keep_fresh(&self) {
        self.keep_fresh_by(SystemTime::now).await;
    }

    async fn keep_fresh_by(&self, clock: impl Fn() -> SystemTime) {
        loop {
            let now = clock();
            match self.due().duration_since(now) {
                Ok(left) if !left.is_zero() => sleep(left.min(STEP)).await,
                _ => {
                    if let Err(error) = self.renew(now) {
                        tracing::error!(%error, "cannot renew the controller's own certificate");
                        sleep(RETRY).await;
                    }
                }
            }
        }
    }

    fn due(&self) -> SystemTime {
        self.store.load().map_or(SystemTime::UNIX_EPOCH, |current| {
            // One server: there is nobody to spread the renewals among.
            renew_at(current.not_before(), current.not_after(), 0.0)
        })
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
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

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

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_jumps_is_noticed_within_a_step() {
        let start = SystemTime::now();
        let authority = Authority::generate("cluster.local", ROOT_LIFETIME, start).unwrap();
        let own = OwnCertificate::new(Arc::new(authority), "cluster.local").unwrap();
        let store = own.store();
        let began = tokio::time::Instant::now();
        // What a suspended machine slept through; the time of timers stood still.
        let suspended = Arc::new(AtomicU64::new(0));
        let seen = suspended.clone();
        let clock = move || start + began.elapsed() + Duration::from_secs(seen.load(Relaxed));
        let keeping = tokio::spawn(async move { own.keep_fresh_by(clock).await });
        let serial = || store.load().unwrap().serial().to_owned();

        let first = serial();
        sleep(LEAF_LIFETIME / 2 - Duration::from_secs(600)).await;
        assert_eq!(serial(), first, "before half of its life");
        sleep(Duration::from_secs(1200)).await;
        let second = serial();
        assert_ne!(second, first, "after half of its life");

        suspended.store(2 * LEAF_LIFETIME.as_secs(), Relaxed);
        sleep(2 * STEP).await;
        assert_ne!(
            serial(),
            second,
            "it has ended while the machine was suspended"
        );
        let now = start + began.elapsed() + 2 * LEAF_LIFETIME;
        assert!(store.load().unwrap().not_after() > now);
        keeping.abort();
    }
}
