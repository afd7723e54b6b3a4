//! Whether and when a request is sent again.

mod budget;

use std::time::Duration;

use http::{HeaderMap, Method, StatusCode};
use turnpike_rules::{
    route::Route,
    traffic::{self, Backoff, RetryConditions},
};

pub(crate) use budget::Budget;

use crate::error::{ProxyError, Retry, answered_unprocessed};

/// The retries that hold for one request: its route's, or its Service's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) attempts: u32,
    conditions: &'a RetryConditions,
    backoff: Backoff,
    idempotent: bool,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(
        service: &'a traffic::Retry,
        route: Option<&'a Route>,
        method: &Method,
    ) -> Self {
        let own = route.and_then(|route| route.retry.as_ref());
        let conditions = own.map_or(&service.conditions, |own| &own.conditions);
        Self {
            attempts: own.map_or(service.attempts, |own| own.attempts),
            conditions,
            backoff: own.and_then(|own| own.backoff).unwrap_or(service.backoff),
            idempotent: is_idempotent(method) || conditions.non_idempotent,
        }
    }

    /// Whether a try that was sent may have to be sent again, so that what was sent must be kept.
    /// `tells`: the far side may say that it did not process what it got.
    pub(crate) fn may_resend(&self, tells: bool) -> bool {
        let Self {
            attempts,
            conditions,
            idempotent,
            ..
        } = self;
        let RetryConditions {
            statuses,
            reset: _,
            grpc,
            non_idempotent: _,
        } = conditions;
        *attempts > 0 && (tells || *idempotent || !statuses.is_empty() || !grpc.is_empty())
    }

    /// Whether a try that failed may be repeated. `reused`: on a connection that had served
    /// before, which its server may have closed just then.
    pub(crate) fn after_error(&self, error: &ProxyError, reused: bool) -> bool {
        match error.retry() {
            Retry::Safe => true,
            // RFC 9112 §9.3.1: a client may repeat an idempotent request that met the close of a
            // connection.
            Retry::IfIdempotent if self.idempotent => {
                self.conditions.reset || reused && matches!(error, ProxyError::Closed(_))
            }
            Retry::IfIdempotent | Retry::Never => false,
        }
    }

    /// Whether this answer is to be replaced by another try. `mesh_peer`: it came from a proxy of
    /// the mesh, authenticated.
    pub(crate) fn after_response(
        &self,
        status: StatusCode,
        headers: &HeaderMap,
        grpc: bool,
        mesh_peer: bool,
    ) -> bool {
        if mesh_peer && answered_unprocessed(headers) {
            return true;
        }
        let listed = self.conditions.statuses.contains(&status.as_u16());
        let grpc_listed = grpc && !self.conditions.grpc.is_empty() && {
            let status = headers
                .get("grpc-status")
                .and_then(|value| value.to_str().ok());
            let status = status.and_then(|text| text.parse::<u32>().ok());
            status.is_some_and(|status| self.conditions.grpc.contains(&status))
        };
        // gRPC's requests are POST; whoever lists a status says that it may be repeated.
        listed && self.idempotent || grpc_listed
    }

    /// The pause before retry `number` (from 1), fully jittered by `random` in 0..1.
    pub(crate) fn pause(&self, number: u32, random: f64) -> Duration {
        let Backoff { base, max } = self.backoff;
        let factor = 1u32
            .checked_shl(number.saturating_sub(1).min(16))
            .unwrap_or(u32::MAX);
        base.saturating_mul(factor)
            .min(max)
            .mul_f64(random.clamp(0.0, 1.0))
    }
}

/// RFC 9110 §9.2.2.
fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::PUT | Method::DELETE | Method::OPTIONS | Method::TRACE
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed() -> ProxyError {
        ProxyError::Closed("gone".into())
    }

    #[test]
    fn by_default_only_what_was_not_processed_or_met_a_closing_connection() {
        let service = traffic::Retry::default();
        let get = Plan::new(&service, None, &Method::GET);
        let post = Plan::new(&service, None, &Method::POST);
        for plan in [get, post] {
            assert!(plan.after_error(&ProxyError::Refused, false));
            assert!(plan.after_error(&ProxyError::Unsent("closed".into()), true));
            assert!(!plan.after_error(&closed(), false));
            assert!(!plan.after_error(&ProxyError::Malformed("x".into()), false));
        }
        assert!(get.after_error(&closed(), true));
        assert!(!post.after_error(&closed(), true));
    }

    #[test]
    fn conditions_widen_it() {
        let conditions = RetryConditions {
            statuses: vec![503],
            reset: true,
            grpc: vec![14],
            non_idempotent: false,
        };
        let service = traffic::Retry {
            conditions,
            ..traffic::Retry::default()
        };
        let get = Plan::new(&service, None, &Method::GET);
        let post = Plan::new(&service, None, &Method::POST);
        let mut headers = HeaderMap::new();
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        assert!(get.after_error(&closed(), false) && !post.after_error(&closed(), false));
        assert!(get.after_response(unavailable, &headers, false, false));
        assert!(!post.after_response(unavailable, &headers, false, false));
        assert!(!get.after_response(StatusCode::OK, &headers, false, false));
        headers.insert("grpc-status", "14".parse().unwrap());
        assert!(post.after_response(StatusCode::OK, &headers, true, false));
    }

    #[test]
    fn only_an_authenticated_proxy_is_believed_that_nothing_was_processed() {
        let service = traffic::Retry::default();
        let post = Plan::new(&service, None, &Method::POST);
        let mut headers = HeaderMap::new();
        headers.insert(crate::error::ERROR_HEADER, "connect".parse().unwrap());
        assert!(post.after_response(StatusCode::SERVICE_UNAVAILABLE, &headers, false, true));
        assert!(!post.after_response(StatusCode::SERVICE_UNAVAILABLE, &headers, false, false));
    }

    #[test]
    fn pauses_double_up_to_the_most() {
        let service = traffic::Retry::default();
        let plan = Plan::new(&service, None, &Method::GET);
        let pauses: Vec<_> = (1..=6).map(|n| plan.pause(n, 1.0).as_millis()).collect();
        assert_eq!(pauses, [25, 50, 100, 200, 250, 250]);
        assert_eq!(plan.pause(3, 0.0), Duration::ZERO);
        assert_eq!(plan.pause(u32::MAX, 1.0), Duration::from_millis(250));
    }
}
