//! Certificates from the CA, renewed before they end.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::{sleep, timeout};
use turnpike_certs::{
    CLOCK_SKEW, CredentialStore, Credentials, InvalidCredentials, KeyRequest, LEAF_LIFETIME,
    RequestError, renew_at,
};
use turnpike_rules::Identity;

use crate::{
    backoff::Backoff,
    ca::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
    channel::{ConnectError, Controller, reasons},
};

const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// How soon a changed root bundle is trusted.
const ROOTS_INTERVAL: Duration = Duration::from_secs(10);
/// The shortest pause between two certificates, however short they live.
const RENEWAL_FLOOR: Duration = Duration::from_secs(1);
const RETRY_BASE: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the CA refused: {0}")]
    Refused(String),
    #[error("the CA did not answer within {FETCH_TIMEOUT:?}")]
    TimedOut,
    #[error("the CA's answer is unusable: {0}")]
    Invalid(#[from] InvalidCredentials),
    #[error("the CA issued for {found}, not for {expected}")]
    WrongIdentity {
        expected: Box<Identity>,
        found: Box<Identity>,
    },
}

/// Makes a new key and has it certified for `identity`.
pub async fn fetch(
    controller: &Controller,
    identity: &Identity,
) -> Result<Credentials, FetchError> {
    timeout(FETCH_TIMEOUT, issue(controller, identity))
        .await
        .unwrap_or(Err(FetchError::TimedOut))
}

async fn issue(controller: &Controller, identity: &Identity) -> Result<Credentials, FetchError> {
    let roots = controller.roots().await?;
    let key = KeyRequest::new(identity)?;
    let request = controller
        .request(IstioCertificateRequest {
            csr: key.csr_pem().to_owned(),
            validity_duration: LEAF_LIFETIME.as_secs().cast_signed(),
            metadata: None,
        })
        .await?;
    let mut client = IstioCertificateServiceClient::new(controller.connect().await?);
    let answer = client.create_certificate(request).await.map_err(|status| {
        FetchError::Refused(format!("{:?}: {}", status.code(), status.message()))
    })?;
    let credentials = key.into_credentials(&answer.into_inner().cert_chain, roots)?;
    if credentials.identity() != identity {
        return Err(FetchError::WrongIdentity {
            expected: Box::new(identity.clone()),
            found: Box::new(credentials.identity().clone()),
        });
    }
    Ok(credentials)
}

/// Fills `store`, then renews at half life and follows changes of the root bundle, for as long as
/// it is polled. What cannot be renewed stays in the store: until its end it is still good, and
/// after it every peer refuses it by itself.
pub async fn keep_fresh(controller: Controller, identity: Identity, store: Arc<CredentialStore>) {
    let mut backoff = Backoff::new(RETRY_BASE, RETRY_MAX);
    loop {
        if let Some(current) = store.load() {
            until_due(&controller, &current, &store).await;
        }
        match fetch(&controller, &identity).await {
            Ok(credentials) => {
                tracing::info!(
                    identity = %identity,
                    serial = credentials.serial(),
                    not_after = unix_seconds(credentials.not_after()),
                    "certificate issued"
                );
                store.replace(credentials);
                backoff.reset();
            }
            Err(error) => {
                let pause = backoff.next_pause();
                let runway = store.load().map(|current| left(&current).as_secs());
                tracing::warn!(
                    identity = %identity,
                    error = reasons(&error),
                    retry_ms = pause.as_millis(),
                    valid_for_seconds = runway,
                    "cannot renew the certificate"
                );
                sleep(pause).await;
            }
        }
    }
}

/// Waits until `current` must be replaced: it is due, or the roots have changed so that it no
/// longer leads to one.
async fn until_due(controller: &Controller, current: &Credentials, store: &CredentialStore) {
    let valid = current.not_before()..current.not_after();
    let due = due(valid, fastrand::f64(), SystemTime::now());
    // In steps, since the clock may be set, and to see new roots.
    while let Ok(wait) = due.duration_since(SystemTime::now()) {
        sleep(wait.min(ROOTS_INTERVAL)).await;
        match controller.roots().await {
            Ok(roots) => {
                if let Err(error) = store.replace_roots(roots) {
                    tracing::warn!(%error, "the roots have changed; renewing the certificate now");
                    return;
                }
            }
            Err(error) => tracing::warn!(%error, "keeping the roots as they are"),
        }
    }
}

/// When a certificate is renewed that is valid for so long. `jitter`, from 0 to 1, spreads those
/// that were issued together.
fn due(valid: Range<SystemTime>, jitter: f64, now: SystemTime) -> SystemTime {
    // It was issued after its beginning, which allows for clocks that differ.
    let issued = (valid.start + CLOCK_SKEW).min(valid.end);
    renew_at(issued, valid.end, jitter).max(now + RENEWAL_FLOOR)
}

fn left(credentials: &Credentials) -> Duration {
    credentials
        .not_after()
        .duration_since(SystemTime::now())
        .unwrap_or_default()
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_life_is_left_at_the_least_and_jitter_spreads() {
        let issued = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let valid = || issued - CLOCK_SKEW..issued + LEAF_LIFETIME;
        let at = |jitter| due(valid(), jitter, issued).duration_since(issued).unwrap();
        assert_eq!(at(0.0), LEAF_LIFETIME / 2);
        assert_eq!(at(1.0), LEAF_LIFETIME * 2 / 5);
        let spread: Vec<_> = (0..10u8).map(|n| at(f64::from(n) / 10.0)).collect();
        assert!(
            spread.is_sorted_by(|later, earlier| later > earlier),
            "{spread:?}"
        );
        // Overdue, or as good as: at once, and not in a storm.
        let end = issued + LEAF_LIFETIME;
        for now in [issued + LEAF_LIFETIME * 3 / 4, end, end + LEAF_LIFETIME] {
            assert_eq!(due(valid(), 0.5, now), now + RENEWAL_FLOOR);
        }
        // Shorter than the skew of clocks.
        let short = issued..issued + Duration::from_secs(2);
        assert_eq!(due(short, 0.0, issued), issued + Duration::from_secs(2));
    }
}
