//! `istio.v1.auth.IstioCertificateService`.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tonic::{Code, Request, Response, Status};
use turnpike_certs::{Authority, Issued, LEAF_LIFETIME, SignError};
use turnpike_discovery::Caller;
use turnpike_wire::ca::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
};

use super::{
    journal::{Entry, Journal},
    limit::RateLimit,
};
use crate::{metrics::Metrics, text::one_line};

/// The shortest life that is worth a certificate.
const SHORTEST: Duration = Duration::from_secs(60);

/// Issues certificates to authenticated callers.
#[derive(Debug)]
pub struct CertificateService {
    authority: Arc<Authority>,
    journal: Journal,
    limits: Mutex<Limits>,
    metrics: Metrics,
}

/// Many pods share an identity and start together; one pod needs a certificate twice a day.
#[derive(Debug)]
struct Limits {
    by_pod: RateLimit<(String, Option<Arc<str>>)>,
    by_identity: RateLimit<String>,
}

/// Why a certificate was not issued.
#[derive(Debug)]
struct Refused {
    reason: &'static str,
    code: Code,
    message: String,
}

impl CertificateService {
    pub fn new(authority: Arc<Authority>, journal: Journal, metrics: Metrics) -> Self {
        let limits = Limits {
            by_pod: RateLimit::new(20, Duration::from_secs(6)),
            by_identity: RateLimit::new(2_000, Duration::from_millis(20)),
        };
        Self {
            authority,
            journal,
            limits: Mutex::new(limits),
            metrics,
        }
    }

    pub fn into_server(self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self)
    }

    async fn issue(
        &self,
        caller: &Caller,
        request: &IstioCertificateRequest,
    ) -> Result<Issued, Refused> {
        self.within_limits(caller, Instant::now())?;
        let now = SystemTime::now();
        let lifetime = lifetime(request.validity_duration);
        let issued = self
            .authority
            .sign(&request.csr, &caller.identity, lifetime, now)?;
        let entry = Entry {
            issued: timestamp(now),
            serial: issued.serial.clone(),
            identity: caller.identity.to_string(),
            pod: caller.pod.as_ref().map(|pod| pod.name.to_string()),
            pod_uid: caller.pod.as_ref().map(|pod| pod.uid.to_string()),
            node: caller.node.as_ref().map(ToString::to_string),
            not_after: timestamp(issued.not_after),
        };
        self.journal.record(&entry).await.map_err(|error| Refused {
            reason: "journal",
            code: Code::Unavailable,
            message: format!("{error}; nothing was issued, try again later"),
        })?;
        Ok(issued)
    }

    fn within_limits(&self, caller: &Caller, now: Instant) -> Result<(), Refused> {
        let mut limits = self.limits.lock();
        let identity = caller.identity.to_string();
        let pod = caller.pod.as_ref().map(|pod| pod.uid.clone());
        let taken = limits
            .by_pod
            .take((identity.clone(), pod), now)
            .and_then(|()| limits.by_identity.take(identity, now));
        taken.map_err(|wait| Refused {
            reason: "rate",
            code: Code::ResourceExhausted,
            message: format!("too many requests; try again in {} s", wait.as_secs() + 1),
        })
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let caller = request.extensions().get::<Arc<Caller>>().cloned();
        let caller = caller.ok_or_else(|| Status::unauthenticated("no caller is known"))?;
        let pod = caller.pod.as_ref().map(|pod| &*pod.name);
        match self.issue(&caller, request.get_ref()).await {
            Ok(issued) => {
                self.metrics.issued();
                tracing::info!(
                    target: "audit",
                    identity = %caller.identity,
                    pod,
                    node = caller.node.as_deref(),
                    serial = issued.serial,
                    not_after = timestamp(issued.not_after),
                    "issued a certificate"
                );
                Ok(Response::new(IstioCertificateResponse {
                    cert_chain: issued.chain,
                }))
            }
            Err(Refused {
                reason,
                code,
                message,
            }) => {
                self.metrics.refused(reason);
                tracing::warn!(
                    target: "audit",
                    identity = %caller.identity,
                    pod,
                    node = caller.node.as_deref(),
                    reason,
                    "refused a certificate: {}",
                    // It may quote the request.
                    one_line(&message)
                );
                Err(Status::new(code, message))
            }
        }
    }
}

impl From<SignError> for Refused {
    fn from(error: SignError) -> Self {
        let (reason, code) = match &error {
            SignError::WrongIdentity { .. } => ("identity", Code::PermissionDenied),
            SignError::TooLong(_)
            | SignError::Malformed(_)
            | SignError::Signature
            | SignError::KeyType => ("request", Code::InvalidArgument),
            SignError::IssuerExpired | SignError::Sign(_) => ("signer", Code::Unavailable),
        };
        Self {
            reason,
            code,
            message: error.to_string(),
        }
    }
}

/// What the caller asks for in seconds, within bounds; without a wish the longest.
fn lifetime(asked: i64) -> Duration {
    match u64::try_from(asked) {
        Ok(seconds) if seconds > 0 => Duration::from_secs(seconds).clamp(SHORTEST, LEAF_LIFETIME),
        _ => LEAF_LIFETIME,
    }
}

fn timestamp(at: SystemTime) -> String {
    OffsetDateTime::from(at)
        .format(&Rfc3339)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use proptest::prelude::*;
    use turnpike_certs::{KeyRequest, ROOT_LIFETIME};
    use turnpike_rules::Identity;

    use super::*;

    fn identity() -> Identity {
        Identity::new("cluster.local", "shop", "web").unwrap()
    }

    #[test]
    fn lifetimes_are_capped() {
        for (asked, expected) in [
            (0, LEAF_LIFETIME),
            (-5, LEAF_LIFETIME),
            (1, SHORTEST),
            (3600, Duration::from_secs(3600)),
            (i64::MAX, LEAF_LIFETIME),
        ] {
            assert_eq!(lifetime(asked), expected, "{asked}");
        }
    }

    /// A request with some of its bytes changed, cut or doubled, in proper PEM.
    fn damaged(edits: &[(usize, u8)], keep: usize) -> String {
        let pem = KeyRequest::new(&identity()).unwrap().csr_pem().to_owned();
        let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        let mut der = STANDARD.decode(body).unwrap();
        for (at, byte) in edits {
            let at = at % der.len();
            der[at] = *byte;
        }
        der.truncate(keep.max(1));
        let body = STANDARD.encode(der);
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n")
    }

    fn csr() -> impl Strategy<Value = String> {
        let edits = proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4);
        prop_oneof![
            any::<String>(),
            (edits, 1..600usize).prop_map(|(edits, keep)| damaged(&edits, keep)),
        ]
    }

    proptest! {
        /// Whatever is asked: no panic, and no certificate but for the caller's own identity.
        #[test]
        fn no_request_breaks_the_ca(csr in csr(), validity_duration in any::<i64>()) {
            let folder = tempfile::tempdir().unwrap();
            let authority =
                Authority::generate("cluster.local", ROOT_LIFETIME, SystemTime::now()).unwrap();
            let journal = Journal::start(&folder.path().join("issued.jsonl")).unwrap();
            let service =
                CertificateService::new(Arc::new(authority), journal, Metrics::default());
            let caller = Caller { identity: identity(), pod: None, node: None, expires: None };
            let request = IstioCertificateRequest { csr, validity_duration, metadata: None };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            if let Ok(issued) = runtime.block_on(service.issue(&caller, &request)) {
                use rustls_pki_types::{CertificateDer, pem::PemObject};
                let leaf = CertificateDer::from_pem_slice(issued.chain[0].as_bytes()).unwrap();
                prop_assert_eq!(turnpike_certs::peer_identity(&leaf).unwrap(), identity());
            }
        }
    }
}
